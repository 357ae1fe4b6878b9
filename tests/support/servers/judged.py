"""A judge to drive by hand: workers, headers and bodies without a wire, and a clock of the test's own."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from pushstep.proto.training_pb2 import PushHeader
from pushstep.proto.types_pb2 import DType, Identity, Manifest, Parameter, ParamGroup, Receipt, Ticket
from pushstep.proto.wire.layout import Layout
from pushstep.server.coordinator.commits import Commits
from pushstep.server.coordinator.coordinator import Coordinator
from pushstep.server.coordinator.decision import Decision, Event, Offer, Reduce, Resolve, Step
from pushstep.server.coordinator.groups import Group, ParamGroups
from pushstep.server.coordinator.hooks.chain import HookChain
from pushstep.server.coordinator.policies import catalogue as policies
from pushstep.server.coordinator.push import PendingPush
from pushstep.server.coordinator.sessions import Sessions
from pushstep.server.staging import reduction
from pushstep.server.staging.gradient import DensePart, StagedPush
from pushstep.server.staging.inspect import measured

LEASE_S = 30.0
UID = b"uid"
LAYOUT = Layout(
    Manifest(
        parameters=[
            Parameter(name="a", shape=[2], dtype=DType.DTYPE_FLOAT32, group=0),
            Parameter(name="b", shape=[1], dtype=DType.DTYPE_FLOAT32, group=1),
        ],
        groups=[ParamGroup(rule="adagrad"), ParamGroup(rule="adagrad")],
    )
)


class Court:
    """A judge, its time, and what became of each push."""

    def __init__(self, **policy: Any) -> None:
        groups = ParamGroups(Group.make(group) for group in LAYOUT.manifest.groups)
        self.commits = Commits("m", 1, groups, HookChain())
        self.coordinator = Coordinator(UID, self.commits, Sessions(LEASE_S, 100, "m"))
        self.now_s = 0.0
        # rounds are added up when the test says so
        self.holds_back = False
        self.combines: list[Reduce] = []
        self.tickets: list[Ticket] = []
        self.stepped: list[StagedPush] = []
        self.notes: list[Event] = []
        self.settled: dict[tuple[str, int, int], Resolve] = {}
        if policy:
            self.do(self.coordinator.switch(policies.read(policy), self.now_s))

    def do(self, decisions: Sequence[Decision]) -> None:
        """Carry decisions out."""
        for decision in decisions:
            match decision:
                case Event():
                    self.notes.append(decision)
                case Resolve():
                    self._settle(decision)
                case Step(ticket, push, resolves, _):
                    assert ticket.version == len(self.tickets) + 1
                    self.tickets.append(ticket)
                    self.stepped.append(push)
                    for resolve in resolves:
                        self._settle(resolve)
                case Reduce():
                    self.combines.append(decision)
        if not self.holds_back:
            self.add_up()

    def add_up(self) -> None:
        """Finish the rounds that are being added up."""
        while self.combines:
            reduce = self.combines.pop(0)
            pushes = [pending.push for pending in reduce.pushes if pending.push is not None]
            push = reduction.add_up(pushes, reduce.weights, reduce.divisor)
            self.do(self.coordinator.reduced(reduce, push, self.now_s))

    def _settle(self, resolve: Resolve) -> None:
        identity = resolve.pending.identity
        key = (identity.worker, identity.epoch, identity.sequence)
        assert key not in self.settled
        self.settled[key] = resolve

    def join(self, *names: str, takeover: bool = False, attempt: int = 0) -> None:
        for name in names:
            _, decisions = self.coordinator.join(name, self.now_s, takeover, attempt)
            self.do(decisions)

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.do(self.coordinator.tick(self.now_s))

    def identity(self, worker: str, sequence: int | None = None, epoch: int | None = None) -> Identity:
        known = self.coordinator.sessions.workers[worker]
        return Identity(
            model_uid=UID,
            timeline=self.commits.timeline,
            worker=worker,
            epoch=known.epoch if epoch is None else epoch,
            sequence=known.sequence + 1 + len(known.undecided) if sequence is None else sequence,
        )

    def header(self, worker: str, base: int | None = None, **fields: Any) -> PushHeader:
        identity = self.identity(worker, fields.pop("sequence", None), fields.pop("epoch", None))
        return PushHeader(
            identity=identity, base_version=self.commits.version if base is None else base, **fields
        )

    def offer(self, header: PushHeader) -> Offer:
        return self.coordinator.on_header(header, self.now_s)

    def push(
        self, worker: str, value: float = 1.0, base: int | None = None, groups: str = "a", **fields: Any
    ) -> PendingPush:
        """Offer a push, which must be read, and hand its body in."""
        header = self.header(worker, base, **fields)
        assert self.offer(header) is Offer.READ
        pending = PendingPush(
            header,
            digest=zlib.crc32(f"{value} {groups}".encode()),
            push=None if header.skip else dense(value, groups),
        )
        try:
            self.do(self.coordinator.on_body(pending, self.now_s))
        finally:
            self.coordinator.on_stream_end(header.identity)
        return pending

    def outcome(self, pending: PendingPush) -> str:
        """What became of a push: an outcome, an error's code, or pending."""
        identity = pending.identity
        resolve = self.settled.get((identity.worker, identity.epoch, identity.sequence))
        if resolve is None:
            return "pending"
        if resolve.decided is None:
            assert resolve.error is not None
            return resolve.error.code
        return OUTCOMES[resolve.decided.receipt.outcome]

    def receipt(self, pending: PendingPush) -> Receipt:
        identity = pending.identity
        resolve = self.settled[identity.worker, identity.epoch, identity.sequence]
        assert resolve.decided is not None
        return resolve.decided.receipt


OUTCOMES = {1: "applied", 2: "skipped", 3: "dropped_late", 4: "too_stale", 5: "rejected"}


def dense(value: float, names: str = "a") -> StagedPush:
    """A gradient that holds one number everywhere."""
    parts = []
    for name in names:
        slot = LAYOUT.slot(name, "m")
        gradient = torch.full((slot.stop - slot.start,), value)
        parts.append(DensePart(slot.arena, slot.start, (slot,), gradient))
    return measured(parts)
