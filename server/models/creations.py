"""Tickets to create models: one for each name, until the model's values have come.

A ticket reserves no capacity. The limits on the number and size of models are checked when it is given, and enforced
when the values are there. So a caller that asks for a hundred tickets and uploads nothing keeps nobody from creating.
A ticket reserves its name for a limited time. Only an upload extends that time: one that is under way, or one that was
told to come again. A second request for the ticket does not.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from pushstep.proto.errors import BeingCreated, InvalidManifest, NoCreationTicket
from pushstep.proto.process import is_gone
from pushstep.proto.training_pb2 import Process
from pushstep.proto.types_pb2 import Manifest
from pushstep.proto.wire.layout import Layout
from pushstep.proto.wire.names import check_names

from ..arenas.arena import Arenas
from ..coordinator.groups import Group
from ..parts.shard import ModelShard, Ranks

CREATION_S: Final = 120.0
CREATION_RETRY_S: Final = 0.2
# Unused tickets of one connection: as many as it may have calls under way. Beyond that the oldest are dropped.
TICKETS_PER_CONNECTION: Final = 64
# Bytes of all unused tickets with their manifests; and of a ticket without its manifest.
TICKETS_BYTES: Final = 64 << 20
TICKET_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class Proposal:
    """A model that a worker wants to create: laid out, and valid by itself."""

    layout: Layout
    # the laid-out manifest, serialised
    manifest: bytes
    bytes_needed: int
    # of a push of all parameters
    push_bytes: int
    # how it would lie in several ranks: the bytes are then of the part that would lie here
    shard: ModelShard | None = None


def propose(manifest: Manifest, part_bytes: int = 0, ranks: Ranks | None = None) -> Proposal:
    """The model that a manifest describes. InvalidManifest or InvalidHyperparameter if it is not valid.

    It reads nothing but the manifest, so a large one can be checked in a thread. `part_bytes`: of the manifest.
    """
    check_names(manifest)
    manifest.part_bytes = part_bytes
    layout = Layout(manifest)
    for group in manifest.groups:
        Group.make(group)
    if len(layout.first_of_group) != len(manifest.groups):
        raise InvalidManifest(problem="every param group must have parameters")
    shard = None if ranks is None else ranks.shard(layout)
    held = layout if shard is None or shard.part is None else shard.part.layout
    push_bytes = sum(arena.elements * arena.dtype.itemsize for arena in held.arenas)
    manifest_bytes = layout.manifest.SerializeToString()
    return Proposal(layout, manifest_bytes, Arenas.bytes_charged(held), push_bytes, shard)


@dataclass(slots=True, eq=False)
class Creation:
    """A worker's ticket to create a model, until it runs out."""

    ticket: int
    worker: str
    # the laid-out manifest, serialised: a parsed one takes twenty times as much
    manifest: bytes
    bytes_needed: int
    expires_at_s: float
    # that the worker runs in
    process: Process
    # the join that asked for the ticket, and the connection that it came over
    attempt: int = 0
    peer: str = ""
    # uploads of its values that are under way
    uploads: int = 0
    # one upload's values are complete: the creation counts as a model
    has_place: bool = False


class Creations:
    """The tickets in use, by name. No operation takes longer when there are more of them."""

    def __init__(self) -> None:
        self._by_name: dict[str, Creation] = {}
        # tickets without an upload under way, the oldest first; and the same by connection
        self._unused: dict[str, Creation] = {}
        self._unused_of: dict[str, dict[str, Creation]] = {}
        self._unused_bytes = 0
        self._with_places: dict[str, Creation] = {}

    def get(self, name: str) -> Creation | None:
        """The ticket for a name."""
        return self._by_name.get(name)

    def holds(self, name: str, ticket: int, now_s: float) -> bool:
        """Whether a ticket is in use."""
        current = self._current(name, now_s)
        return current is not None and current.ticket == ticket

    def with_places(self) -> Collection[Creation]:
        """The creations that count as models, because their values are there."""
        return self._with_places.values()

    def begin(
        self,
        name: str,
        worker: str,
        manifest: bytes,
        bytes_needed: int,
        now_s: float,
        attempt: int,
        peer: str,
        process: Process,
    ) -> Creation:
        """Give a worker a ticket; if its join comes again, the same ticket again.

        BeingCreated while another worker, whose process is not known to be gone, has the ticket, or once the values of
        a model of this name are there.
        """
        current = self._current(name, now_s)
        if current is not None:
            if current.has_place or (current.worker != worker and not is_gone(current.process)):
                raise BeingCreated(model=name, worker=current.worker, retry_after_s=CREATION_RETRY_S)
            if attempt and current.attempt == attempt:
                return current
            self.end(name)
        until_s = now_s + CREATION_S if current is None else current.expires_at_s
        ticket = secrets.randbits(63) or 1
        # a copy, because a submessage keeps its whole message in memory
        own = Process()
        own.CopyFrom(process)
        made = Creation(ticket, worker, manifest, bytes_needed, until_s, own, attempt, peer)
        self._by_name[name] = made
        self._keep_unused(name, made)
        while len(self._unused_of[peer]) > TICKETS_PER_CONNECTION:
            self.end(next(iter(self._unused_of[peer])))
        while self._unused_bytes > TICKETS_BYTES and len(self._unused) > 1:
            self.end(next(iter(self._unused)))
        return made

    def promised(self, name: str, ticket: int, manifest: bytes, bytes_needed: int, until_s: float) -> None:
        """Have a ticket that rank 0 has given."""
        if self._by_name.get(name) is None or self._by_name[name].ticket != ticket:
            self._by_name[name] = Creation(ticket, "", manifest, bytes_needed, until_s, Process())
            self._keep_unused(name, self._by_name[name])

    def begin_upload(self, name: str, ticket: int, now_s: float) -> Creation:
        """The creation of a ticket, which does not run out while it is uploaded. NoCreationTicket."""
        current = self._current(name, now_s)
        if current is None or current.ticket != ticket:
            raise NoCreationTicket(model=name)
        self._forget_unused(name)
        current.uploads += 1
        return current

    def take_place(self, name: str, creation: Creation) -> None:
        """Count a creation as a model: its values are there."""
        creation.has_place = True
        self._with_places[name] = creation

    def end_upload(
        self, name: str, creation: Creation, now_s: float, *, had_place: bool, comes_again: bool
    ) -> None:
        """Note that an upload has ended.

        Unless an upload made the model, or is about to, the next caller may create it. `had_place`: this upload's
        values made the creation count as a model. `comes_again`: its sender was told to upload again with the same
        ticket.
        """
        creation.uploads -= 1
        if self._by_name.get(name) is not creation:
            return
        if comes_again:
            creation.expires_at_s = now_s + CREATION_S
            if not creation.uploads:
                self._keep_unused(name, creation)
        elif had_place or not creation.has_place:
            self.end(name)

    def end(self, name: str) -> None:
        """Forget a name's ticket."""
        self._forget_unused(name)
        self._with_places.pop(name, None)
        self._by_name.pop(name, None)

    def _current(self, name: str, now_s: float) -> Creation | None:
        """The ticket for a name; None if there is none, or it has run out."""
        current = self._by_name.get(name)
        if current is not None and not current.uploads and current.expires_at_s < now_s:
            self.end(name)
            return None
        return current

    def _keep_unused(self, name: str, creation: Creation) -> None:
        self._unused[name] = creation
        self._unused_of.setdefault(creation.peer, {})[name] = creation
        self._unused_bytes += TICKET_BYTES + len(creation.manifest)

    def _forget_unused(self, name: str) -> None:
        creation = self._unused.pop(name, None)
        if creation is None:
            return
        self._unused_bytes -= TICKET_BYTES + len(creation.manifest)
        of_peer = self._unused_of[creation.peer]
        del of_peer[name]
        if not of_peer:
            del self._unused_of[creation.peer]
