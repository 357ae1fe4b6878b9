"""The server without asyncio: a judge, arenas, and what intake.py, executor.py and stepper.py do between them.

Decisions are carried out in order; steps and restores wait in one queue, rounds are added up after a while, and what
a worker waits for is answered when its step has been taken, or with `push_pending`. A crash loses everything but the
last snapshot.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pushstep.proto.errors import AlreadyJoined, NotHeld, OverBudget, PushPending, PushstepError
from pushstep.proto.training_pb2 import PushHeader
from pushstep.proto.types_pb2 import GroupValues, Identity, Receipt
from pushstep.server import policies, reduction
from pushstep.server.arena import Arenas, ArenasCopy
from pushstep.server.candidate import Candidate
from pushstep.server.decision import Combine, Decision, Note, Offer, Settle, Step
from pushstep.server.device import Device
from pushstep.server.groups import Group, ParamGroups
from pushstep.server.hooks.chain import HookChain
from pushstep.server.judge import Judge
from pushstep.server.ledger import Ledger
from pushstep.server.quality import read as read_quality
from pushstep.server.session import Sessions
from pushstep.server.staging import Budget

from .agenda import Agenda
from .intent import LAYOUT, Intent
from .network import Network
from .witness import Witness

LEASE_S = 10.0
HOLD_S = 1.0
# A lease has run out when its last moment is past.
MOMENT_S = 0.001
UID = b"uid"
BODY_BYTES = 200
STAGING_BYTES = 12 * BODY_BYTES
LR = 0.5
Key = tuple[int, str, int, int]
Reply = Callable[["Answer"], None]


@dataclass
class Answer:
    """What goes back to a worker: an error, or a receipt with the version that its exchange brings."""

    error: PushstepError | None = None
    receipt: Receipt | None = None
    version: int = 0


@dataclass
class Joined:
    """A membership."""

    identity: Identity
    version: int
    receipts: list[Receipt]
    groups: list[GroupValues]
    lead: bool


@dataclass(eq=False)
class Stream:
    """One attempt of one push, from its header to its answer."""

    header: PushHeader
    intent: Intent
    reply: Reply
    offered: bool = False
    reserved: bool = False
    over: bool = False


@dataclass
class Snapshot:
    """All that outlives the server."""

    facts: dict[str, Any]
    copy: ArenasCopy
    story: list[Any] = field(default_factory=list)


def key_of(identity: Identity) -> Key:
    return identity.timeline, identity.worker, identity.epoch, identity.sequence


class House:
    """One server process after the other, each with what the last one left."""

    def __init__(
        self,
        agenda: Agenda,
        network: Network,
        chance: random.Random,
        max_workers: int,
        quality: dict[str, Any],
    ) -> None:
        self.agenda = agenda
        self.network = network
        self.chance = chance
        self.max_workers = max_workers
        self.witness = Witness(agenda)
        self.timeline = 1
        self.life = 0
        self.quality = quality
        self._start({"policy": "async"})
        self.arenas.timeline = 1
        self.snapshot: Snapshot | None = None
        self.take_snapshot()

    # Processes.

    def _start(self, policy: dict[str, Any]) -> None:
        self.life += 1
        groups = ParamGroups(Group.make(group) for group in LAYOUT.manifest.groups)
        for group in groups.list:
            group.values["lr"] = LR
        self.ledger = Ledger("m", self.timeline, groups, HookChain())
        self.judge = Judge(UID, self.ledger, Sessions(LEASE_S, self.max_workers, "m"))
        self.judge.quality.settings = read_quality(self.quality, self.judge.quality.settings)
        self.arenas = Arenas(LAYOUT, [group.rule.name for group in groups.list], Device())
        self.budget = Budget(STAGING_BYTES)
        self.streams: list[Stream] = []
        self.waiting: list[Stream] = []
        self.answers: dict[Key, tuple[list[Stream], Candidate]] = {}
        self.held: set[Candidate] = set()
        self._jobs: list[Callable[[], None]] = []
        self._stepping = False
        self._clock: float | None = None
        self.judge.switch(policies.read(policy), self.agenda.now_s)
        self.witness.attend(self.judge)

    def facts(self) -> dict[str, Any]:
        """What a snapshot's manifest holds."""
        facts = {
            "version": self.ledger.version,
            "timeline": self.timeline,
            "policy": self.judge.policy.settings.model_dump(mode="json"),
            "gate": self.judge.quality.dump(),
            "groups": self.ledger.groups.dump(),
            "workers": self.judge.sessions.dump(),
        }
        read: dict[str, Any] = json.loads(json.dumps(facts))
        return read

    def take_snapshot(self) -> None:
        """Behind everything that has been decided."""
        facts, story = self.facts(), list(self.witness.story)

        def keep() -> None:
            self.snapshot = Snapshot(facts, self.arenas.copy(), story)

        self._submit(keep)

    def switch(self, settings: policies.Settings) -> None:
        """Another policy, or other settings of this one."""
        self.carry_out(self.judge.switch(settings, self.agenda.now_s))

    def restore(self) -> None:
        """Bring the last snapshot back on a new timeline while workers are at work."""
        kept = self.snapshot
        if kept is None:
            return
        self.timeline += 1
        self.ledger.groups.list[:] = ParamGroups.parse(kept.facts["groups"]).list
        self.judge.quality.parse(kept.facts["gate"])
        self.witness.goes_back(kept.story, self.timeline)
        settings = policies.read(kept.facts["policy"])
        decisions = self.judge.restored(kept.copy.version, self.timeline, settings, self.agenda.now_s)
        timeline = self.timeline
        self.carry_out(decisions)
        self._submit(lambda: self.arenas.load(kept.copy, timeline))

    def stop_and_start(self, *, orderly: bool) -> None:
        """Another process: with everything, or with what the last snapshot held, on a new timeline."""
        if orderly:
            self._run_jobs()
            story = list(self.witness.story)
            self.snapshot = Snapshot(self.facts(), self.arenas.copy(), story)
        kept = self.snapshot
        if kept is None:
            return
        self.timeline += not orderly
        self._start(kept.facts["policy"])
        self.ledger.groups.list[:] = ParamGroups.parse(kept.facts["groups"]).list
        self.ledger.version = kept.copy.version
        self.judge.sessions.parse(kept.facts["workers"], self.agenda.now_s)
        self.judge.quality.parse(kept.facts["gate"])
        if not orderly:
            self.judge.sessions.close_epochs()
        self.witness.goes_back(kept.story, self.timeline)
        self.arenas.load(kept.copy, self.timeline)

    # The doors.

    def join(
        self, name: str, takeover: bool, epoch: int | None, reply: Callable[[Joined | PushstepError], None]
    ) -> None:
        """As membership.py: who holds the name's epoch may join over itself."""
        known = self.judge.sessions.workers.get(name)
        itself = known is not None and known.epoch == epoch
        try:
            worker, decisions = self.judge.join(name, self.agenda.now_s, takeover or itself)
        except AlreadyJoined as error:
            reply(error)
            return
        self.witness.heard(name)
        self.witness.joined(worker)
        self.carry_out(decisions)
        identity = Identity(model_uid=UID, timeline=self.timeline, worker=name, epoch=worker.epoch)
        receipts = [copy.deepcopy(verdict.receipt) for verdict in worker.verdicts]
        lead = self.judge.sessions.leads(worker)
        reply(Joined(identity, self.ledger.version, receipts, self.ledger.groups.messages(), lead))

    def heartbeat(self, identity: Identity) -> None:
        """A sign of life."""
        self.witness.heard(identity.worker)
        with contextlib.suppress(PushstepError):  # the worker's next push finds out
            self.carry_out(self.judge.heard(identity, self.agenda.now_s))

    def leave(self, identity: Identity) -> None:
        """A worker goes."""
        if identity.timeline == self.timeline:
            self.carry_out(self.judge.left(identity, self.agenda.now_s))

    def push(self, header: PushHeader, intent: Intent, reply: Reply) -> Stream:
        """One attempt. The stream is what a broken connection ends."""
        stream = Stream(header, intent, reply)
        self.streams.append(stream)
        self.witness.heard(header.identity.worker)
        self.agenda.after(HOLD_S, lambda: self._pending(stream))
        if header.held_digest:
            try:
                self.judge.reattached(header, self.agenda.now_s)
            except PushstepError as error:
                self._end(stream, Answer(error))
            else:
                self._await(stream)
        else:
            self._offer(stream)
        return stream

    def _offer(self, stream: Stream) -> None:
        try:
            offer = self.judge.offered(stream.header, self.agenda.now_s)
        except PushstepError as error:
            self._end(stream, Answer(error))
            return
        self.witness.offered(stream.header, offer)
        if offer is Offer.WAIT:
            self.waiting.append(stream)
            return
        stream.offered = True
        try:
            self.budget.reserve(BODY_BYTES)
        except OverBudget as error:
            self._end(stream, Answer(error))
            return
        stream.reserved = True
        if self.chance.random() < self.network.weather.breaks:
            self.agenda.after(self.network.delay_s(), lambda: self._end(stream, None))
        else:
            self.agenda.after(self.network.delay_s(), lambda: self._complete(stream))

    def _complete(self, stream: Stream) -> None:
        if stream.over or stream not in self.streams:
            return
        self.witness.heard(stream.header.identity.worker)
        candidate = Candidate(stream.header, stream.intent.digest, push=stream.intent.staged())
        self.witness.intents[key_of(stream.header.identity)] = stream.intent
        try:
            decisions = self.judge.staged(candidate, self.agenda.now_s)
        except PushstepError as error:
            self._end(stream, Answer(error))
            return
        if candidate.taken:
            stream.reserved = False  # handed over
            self.held.add(candidate)
            self.answers[key_of(candidate.identity)] = [], candidate
        self.carry_out(decisions)
        self._await(stream)

    def _await(self, stream: Stream) -> None:
        identity = stream.header.identity
        found = self.answers.get(key_of(identity))
        if found is not None:
            found[0].append(stream)
            return  # until it is settled, or the time is up
        verdict = self.judge.verdict_of(identity)
        if verdict is None:
            self._end(stream, Answer(NotHeld(worker=identity.worker, sequence=identity.sequence)))
        elif verdict.error is not None:
            self._end(stream, Answer(copy.copy(verdict.error)))
        else:
            self._end(stream, Answer(None, verdict.receipt))

    def _pending(self, stream: Stream) -> None:
        found = self.answers.get(key_of(stream.header.identity))
        waits = stream in self.waiting or (found is not None and stream in found[0])
        if waits:  # a body that is under way is not broken off
            worker, policy = stream.header.identity.worker, self.judge.policy.name
            digest = 0 if found is None else found[1].digest
            error = PushPending(worker=worker, policy=policy, digest=digest, retry_after_s=0.0)
            self._end(stream, Answer(error))

    def broken(self, stream: Stream) -> None:
        """Its worker has gone, or does not wait any more."""
        if stream in self.streams:
            self._end(stream, None)

    def _end(self, stream: Stream, answer: Answer | None) -> None:
        if stream.over or stream not in self.streams:
            return
        stream.over = True
        self.streams.remove(stream)
        if stream in self.waiting:
            self.waiting.remove(stream)
        if stream.offered:
            self.judge.withdrawn(stream.header.identity)
        if stream.reserved:
            self.budget.release(BODY_BYTES)
        if answer is not None:
            answer.receipt = copy.deepcopy(answer.receipt)
            answer.version = self.arenas.version if self.arenas.timeline == self.timeline else 0
            stream.reply(answer)

    # What executor.py does.

    def carry_out(self, decisions: Sequence[Decision]) -> None:
        """In order; then whoever waits asks again, and the clock is set."""
        self.witness.decided(decisions)
        for decision in decisions:
            match decision:
                case Note():
                    pass
                case Settle():
                    self._settle(decision)
                case Combine():
                    self._combine(decision)
                case Step():
                    self._step(decision)
        life = self.life
        for stream in self.waiting:
            self.agenda.after(0.0, lambda stream=stream: self._offer_again(stream, life))
        self._set_clock()

    def _offer_again(self, stream: Stream, life: int) -> None:
        if life == self.life and stream in self.waiting and not stream.over:
            self.waiting.remove(stream)
            self._offer(stream)

    def _settle(self, settle: Settle) -> None:
        streams, _ = self.answers.pop(key_of(settle.candidate.identity), ([], None))
        if settle.candidate in self.held:
            self.held.remove(settle.candidate)
            self.budget.release(BODY_BYTES)
        for stream in list(streams):
            if settle.verdict is None:
                self._end(stream, Answer(copy.copy(settle.error)))
            elif settle.verdict.error is not None:
                self._end(stream, Answer(copy.copy(settle.verdict.error)))
            else:
                self._end(stream, Answer(None, settle.verdict.receipt))

    def _combine(self, combine: Combine) -> None:
        pushes = [candidate.push for candidate in combine.candidates if candidate.push is not None]
        life = self.life

        def finish() -> None:
            if life == self.life:
                result = reduction.add_up(pushes, combine.weights, combine.divisor)
                self.carry_out(self.judge.combined(combine, result, self.agenda.now_s))

        self.agenda.after(self.chance.choice((0.0, 0.01, 0.3)), finish)

    def _step(self, step: Step) -> None:
        def execute() -> None:
            self.arenas.step(step.ticket, step.push.parts)
            for settle in step.settles:
                self._settle(settle)

        self._submit(execute)

    def _submit(self, job: Callable[[], None]) -> None:
        self._jobs.append(job)
        if not self._stepping:
            self._stepping = True
            life = self.life
            self.agenda.after(self.chance.choice((0.0, 0.0, 0.005, 0.2)), lambda: self._work(life))

    def _work(self, life: int) -> None:
        if life == self.life:
            self._run_jobs()

    def _run_jobs(self) -> None:
        self._stepping = False
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job()

    def _set_clock(self) -> None:
        due_s = self.judge.next_s()
        if due_s is None or due_s == self._clock:
            return
        self._clock = due_s
        life = self.life
        self.agenda.after(due_s - self.agenda.now_s + MOMENT_S, lambda: self._tick(due_s, life))

    def _tick(self, due_s: float, life: int) -> None:
        if life == self.life and self._clock == due_s:
            self._clock = None
            self.carry_out(self.judge.tick(self.agenda.now_s))
