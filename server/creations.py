"""Leave to create models: a ticket for each name, until its values have come.

A ticket takes no place: how many models there may be, and of which size, is looked at when it is given and decided when the
values are there. So whoever asks for a hundred tickets and uploads nothing keeps nobody from creating. It holds its
name, for a while that nothing but an upload extends: one under way, or one that was told to come again. Asking again does
not.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from pushstep.proto.errors import BeingCreated, NoCreationTicket
from pushstep.proto.process import is_gone
from pushstep.proto.training_pb2 import Process

CREATION_S: Final = 120.0
CREATION_RETRY_S: Final = 0.2
# Of one connection, of which nothing has been uploaded yet: as many as it may have calls under way. Beyond, the oldest go.
TICKETS_PER_CONNECTION: Final = 64
# All those with their manifests, and what each takes beside its own.
TICKETS_BYTES: Final = 64 << 20
TICKET_BYTES: Final = 1024


@dataclass(slots=True, eq=False)
class Creation:
    """A worker's leave to create a model, until it runs out."""

    ticket: int
    worker: str
    # as it is laid out, serialised: what is made of it takes twenty times as much
    manifest: bytes
    bytes_needed: int
    expires_at_s: float
    # where that worker runs
    process: Process
    # of the join that asked for it, and whose it was
    attempt: int = 0
    peer: str = ""
    # uploads of its values that are under way
    uploads: int = 0
    # the values of one of them have come: it counts as a model
    has_place: bool = False


class Creations:
    """The tickets that are out, by name. Nothing here takes longer the more of them there are."""

    def __init__(self) -> None:
        self._by_name: dict[str, Creation] = {}
        # those of which nothing is being uploaded, the oldest first; and the same by connection
        self._unused: dict[str, Creation] = {}
        self._unused_of: dict[str, dict[str, Creation]] = {}
        self._unused_bytes = 0
        self._with_places: dict[str, Creation] = {}

    def get(self, name: str) -> Creation | None:
        """The ticket for a name."""
        return self._by_name.get(name)

    def with_places(self) -> Collection[Creation]:
        """Those that are about to be models."""
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
        """Give a worker leave; the same again if its join comes again. BeingCreated while another, or its process, has it."""
        current = self._current(name, now_s)
        if current is not None:
            if current.has_place or (current.worker != worker and not is_gone(current.process)):
                raise BeingCreated(model=name, worker=current.worker, retry_after_s=CREATION_RETRY_S)
            if attempt and current.attempt == attempt:
                return current
            self.end(name)
        until_s = now_s + CREATION_S if current is None else current.expires_at_s
        ticket = secrets.randbits(63) or 1
        # a part of a message keeps all of it
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

    def begin_upload(self, name: str, ticket: int, now_s: float) -> Creation:
        """The creation that a ticket stands for, which does not run out while it is uploaded. NoCreationTicket."""
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
        """An upload has ended. Unless one has made the model, or is about to, the next caller may create it.

        `comes_again`: it was told to, with the same ticket.
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
        """The ticket for a name, unless it has run out."""
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
