"""One push in several parts, one for each rank, under one identity.

All parts leave at once. Rank 0 decides when every rank has its own, and its answer is the push's. A rank that has the
push is not told of it twice: an attempt that breaks is made again for all, and each rank knows the identity.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import MapChanged, NotHeld, PushPending, PushstepError, Unavailable, VersionGone
from pushstep.proto.wire.layout import Layout

from ..membership.receipt import Receipt
from ..transport.attempts import NOTHING, Attempts
from ..transport.retry import TransportFailure, answered
from ..transport.step_call import Step
from ..transport.streams import Body, Exchange, Pulled
from .lanes import failure_of
from .parts import Part
from .transport import ShardedTransport

Outcome = tuple[Receipt, Pulled | None]


class Digests:
    """The digests of the parts of one attempt. Rank 0's commit names them, so it waits for the others' last bytes."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self._lacking = set(ranks)
        self._found: dict[int, int] = {}
        self._broken = False
        self._changed = threading.Condition()

    def put(self, rank: int, digest: int) -> None:
        """A part is made."""
        with self._changed:
            self._found[rank] = digest
            self._lacking.discard(rank)
            self._changed.notify_all()

    def give_up(self) -> None:
        """A part will not be made."""
        with self._changed:
            self._broken = True
            self._changed.notify_all()

    def wait(self) -> list[pb.PartDigest] | None:
        """All of them; None if one will not come."""
        with self._changed:
            while self._lacking and not self._broken:
                self._changed.wait()
            if self._lacking:
                return None
            return [pb.PartDigest(rank=rank, digest=digest) for rank, digest in sorted(self._found.items())]

    def of(self, rank: int) -> int:
        """A part's digest; 0 if it is not known."""
        return self._found.get(rank, 0)


class ShardedSending(Attempts[Outcome]):
    """The attempts of a push in parts. `header` is the whole model's, without segments."""

    def __init__(
        self,
        transport: ShardedTransport,
        header: pb.PushHeader,
        body: Body,
        commit: pb.PushCommit,
        layout: Layout,
    ) -> None:
        super().__init__()
        self._transport = transport
        self._header = header
        self._commit = commit
        self._layout = layout
        self._is_exchange = header.HasField("pull")
        self._parts: list[tuple[Part, pb.PushHeader, Body]] = []
        self._digests = Digests(())
        # a rank above 0 did not answer: before the next attempt rank 0 is asked whether it is still there
        self._is_map_in_doubt = False
        bodies = transport.cut(layout, body)
        for part, own in zip(transport.parts(layout), bodies, strict=True):
            if not part.rank or own.segments or (self._is_exchange and not header.skip):
                self._parts.append((part, self._header_of(part, own), own))

    def _header_of(self, part: Part, body: Body) -> pb.PushHeader:
        own = pb.PushHeader()
        own.CopyFrom(self._header)
        own.manifest_hash = part.layout.manifest_hash
        own.map_version = 0 if self._transport.shards is None else self._transport.shards.version
        own.segments.extend(body.segments)
        return own

    def _attempt(self) -> Outcome:
        if self._is_map_in_doubt:
            self._require_map()
        outcomes = self._sent()
        self._note_held(outcomes)
        first, others = outcomes[0], outcomes[1:]
        failed = failure_of(others)
        if isinstance(first, Exception):
            if failed is not None and isinstance(first, TransportFailure):
                self.in_doubt = True  # it may have decided before its call was given up
                self._is_map_in_doubt = True
                if isinstance(failed, PushstepError) and not isinstance(failed, Unavailable):
                    self._require_map()  # by an old map another rank is where the worker looks for this one
                raise failed
            raise first
        if not self._is_exchange:
            return Receipt.of(first.receipt), None
        here = {
            part.rank: pulled
            for (part, _, _), pulled in zip(self._parts[1:], others, strict=True)
            if not isinstance(pulled, Exception)
        }
        return Receipt.of(first.header.receipt), self._joined(first, here)

    def _require_map(self) -> None:
        """MapChanged if rank 0 has another map by now."""
        if not self._transport.check_map(self._header.model, self._header.identity):
            raise MapChanged(model=self._header.model)
        self._is_map_in_doubt = False

    def _sent(self) -> list[Any]:
        """Send every part; each rank's answer, or why there is none."""
        self._digests = Digests([part.rank for part, _, _ in self._parts[1:]])
        calls: list[Exchange | Step] = []

        try:
            # rank 0's last: its commit may have to wait for the others' digests
            for part, header, body in reversed(self._parts):
                calls.append(self._begun(part, header, body))
        except BaseException:
            self._digests.give_up()
            for call in calls:
                call.cancel()
            raise
        return self._transport.lanes.answers(
            list(reversed(calls)), self._transport.spans, self._digests.give_up
        )

    def _begun(self, part: Part, header: pb.PushHeader, body: Body) -> Exchange | Step:
        layout = part.layout if self._is_exchange else None
        sent = NOTHING if header.held_digest else body
        to = self._transport.of(part)
        if to is None:
            return self._transport.begin_part(header, sent, self._commit_of_first, layout)
        digests = self._digests

        def commit(digest: int) -> pb.PushCommit:
            digests.put(part.rank, header.held_digest or digest)
            return pb.PushCommit()

        call = to.begin_part(header, sent, commit, layout)
        call.when_over(digests.give_up)
        return call

    def _commit_of_first(self, _: int) -> pb.PushCommit:
        parts = self._digests.wait()
        if parts is None:
            raise TransportFailure("the part of another rank broke off")
        commit = pb.PushCommit()
        commit.CopyFrom(self._commit)
        commit.parts.extend(parts)
        return commit

    def _joined(self, first: Pulled, here: dict[int, Pulled]) -> Pulled:
        """The parameters that come back: of the version of rank 0's answer, or the newest if that is not to be had."""
        request = pb.PullRequest(
            model=self._header.model,
            options=self._header.pull,
            timeline=self._header.identity.timeline,
        )
        if not first.header.apart:
            try:
                return self._transport.join_parts(request, first, self._layout, here)
            except VersionGone:
                pass
        pulled = answered(lambda: self._transport.pull(request, self._layout))
        pulled.header.receipt.CopyFrom(first.header.receipt)
        if not pulled.header.groups:
            pulled.header.groups.extend(first.header.groups)
        return pulled

    def _note_held(self, outcomes: Sequence[Any]) -> None:
        """The parts that ranks hold go without a body in the next attempt; after NotHeld all go with theirs again."""
        for (part, header, _), outcome in zip(self._parts, outcomes, strict=True):
            if isinstance(outcome, PushPending):
                header.held_digest = int(outcome.fields["digest"])
            elif isinstance(outcomes[0], PushPending) and not header.held_digest:
                # rank 0 waits with the push: every rank has staged its part
                header.held_digest = self._digests.of(part.rank)
        if any(isinstance(outcome, NotHeld) for outcome in outcomes):
            for _, header, _ in self._parts:
                header.held_digest = 0

    def _note(self, failure: Exception) -> None:
        super()._note(failure)
        if isinstance(failure, PushPending):
            self.in_doubt = True
