"""A judge to drive by hand: workers, headers and bodies without a wire, and a clock of the test's own."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from pushstep.proto.layout import Layout
from pushstep.proto.training_pb2 import PushHeader
from pushstep.proto.types_pb2 import DType, Identity, Manifest, Parameter, ParamGroup, Receipt, Staged, Ticket
from pushstep.server import gate, policies, reduction
from pushstep.server.candidate import Candidate
from pushstep.server.decision import Combine, Decision, Note, Offer, Settle, Step
from pushstep.server.groups import Group, ParamGroups
from pushstep.server.hooks.chain import HookChain
from pushstep.server.judge import Judge
from pushstep.server.ledger import Ledger
from pushstep.server.session import Sessions
from pushstep.server.staging import DensePart, StagedPush

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
        self.ledger = Ledger("m", 1, groups, HookChain())
        self.judge = Judge(UID, self.ledger, Sessions(LEASE_S, 100, "m"))
        self.now_s = 0.0
        # rounds are added up when the test says so
        self.holds_back = False
        self.combines: list[Combine] = []
        self.tickets: list[Ticket] = []
        self.stepped: list[StagedPush] = []
        self.notes: list[Note] = []
        self.settled: dict[tuple[str, int, int], Settle] = {}
        if policy:
            self.do(self.judge.switch(policies.read(policy), self.now_s))

    def do(self, decisions: Sequence[Decision]) -> None:
        """Carry decisions out."""
        for decision in decisions:
            match decision:
                case Note():
                    self.notes.append(decision)
                case Settle():
                    self._settle(decision)
                case Step(ticket, push, settles, _):
                    assert ticket.version == len(self.tickets) + 1
                    self.tickets.append(ticket)
                    self.stepped.append(push)
                    for settle in settles:
                        self._settle(settle)
                case Combine():
                    self.combines.append(decision)
        if not self.holds_back:
            self.add_up()

    def add_up(self) -> None:
        """Finish the rounds that are being added up."""
        while self.combines:
            combine = self.combines.pop(0)
            pushes = [candidate.push for candidate in combine.candidates if candidate.push is not None]
            push = reduction.add_up(pushes, combine.weights, combine.divisor)
            self.do(self.judge.combined(combine, push, self.now_s))

    def _settle(self, settle: Settle) -> None:
        identity = settle.candidate.identity
        key = (identity.worker, identity.epoch, identity.sequence)
        assert key not in self.settled
        self.settled[key] = settle

    def join(self, *names: str, takeover: bool = False, attempt: int = 0) -> None:
        for name in names:
            _, decisions = self.judge.join(name, self.now_s, takeover, attempt)
            self.do(decisions)

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.do(self.judge.tick(self.now_s))

    def identity(self, worker: str, sequence: int | None = None, epoch: int | None = None) -> Identity:
        known = self.judge.sessions.workers[worker]
        return Identity(
            model_uid=UID,
            timeline=self.ledger.timeline,
            worker=worker,
            epoch=known.epoch if epoch is None else epoch,
            sequence=known.sequence + 1 + len(known.held) if sequence is None else sequence,
        )

    def header(self, worker: str, base: int | None = None, **fields: Any) -> PushHeader:
        identity = self.identity(worker, fields.pop("sequence", None), fields.pop("epoch", None))
        return PushHeader(
            identity=identity, base_version=self.ledger.version if base is None else base, **fields
        )

    def offer(self, header: PushHeader) -> Offer:
        return self.judge.offered(header, self.now_s)

    def push(
        self, worker: str, value: float = 1.0, base: int | None = None, groups: str = "a", **fields: Any
    ) -> Candidate:
        """Offer a push, which must be read, and hand its body in."""
        header = self.header(worker, base, **fields)
        assert self.offer(header) is Offer.READ
        candidate = Candidate(
            header,
            digest=zlib.crc32(f"{value} {groups}".encode()),
            push=None if header.skip else dense(value, groups),
        )
        try:
            self.do(self.judge.staged(candidate, self.now_s))
        finally:
            self.judge.withdrawn(header.identity)
        return candidate

    def outcome(self, candidate: Candidate) -> str:
        """What became of a push: an outcome, an error's code, or pending."""
        identity = candidate.identity
        settle = self.settled.get((identity.worker, identity.epoch, identity.sequence))
        if settle is None:
            return "pending"
        if settle.verdict is None:
            assert settle.error is not None
            return settle.error.code
        return OUTCOMES[settle.verdict.receipt.outcome]

    def receipt(self, candidate: Candidate) -> Receipt:
        identity = candidate.identity
        settle = self.settled[identity.worker, identity.epoch, identity.sequence]
        assert settle.verdict is not None
        return settle.verdict.receipt


OUTCOMES = {1: "applied", 2: "skipped", 3: "dropped_late", 4: "too_stale", 5: "rejected"}


def dense(value: float, names: str = "a") -> StagedPush:
    """A gradient that holds one number everywhere."""
    parts = []
    for name in names:
        slot = LAYOUT.slot(name, "m")
        gradient = torch.full((slot.stop - slot.start,), value)
        parts.append(DensePart(slot.arena, slot.start, (slot,), gradient))
    return gate.measured(Staged(), parts)
