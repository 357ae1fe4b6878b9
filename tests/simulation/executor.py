"""What one server process does about what its judge decides, as server/executor.py and server/stepper.py do it.

Decisions are carried out in order; steps and restores wait in one queue, rounds are added up after a while, and what
a worker waits for is answered when its step has been taken.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pushstep.proto.types_pb2 import Identity
from pushstep.server.coordinator.decision import Decision, Event, Reduce, Resolve, Step
from pushstep.server.coordinator.push import PendingPush
from pushstep.server.staging import reduction

from .intake import BODY_BYTES, Answer, Stream
from .story import Key, key_of

if TYPE_CHECKING:
    from .house import House

# A lease has run out when its last moment is past.
MOMENT_S = 0.001


class Executor:
    """The hands of one server process."""

    def __init__(self, house: House) -> None:
        self._house = house
        # what the judge holds, and who waits for it; its bytes are set aside until it is settled
        self.answers: dict[Key, tuple[list[Stream], PendingPush]] = {}
        self.held: set[PendingPush] = set()
        self._jobs: list[Callable[[], None]] = []
        self._stepping = False
        self._clock: float | None = None
        self._closed = False

    def close(self) -> None:
        """The process ends: what it had still to do is not done."""
        self._closed = True

    def keep(self, pending: PendingPush) -> None:
        """The judge has taken it."""
        self.held.add(pending)
        self.answers[key_of(pending.identity)] = [], pending

    def waiters(self, identity: Identity) -> list[Stream] | None:
        """Who waits for a push that is held; None if it is not."""
        found = self.answers.get(key_of(identity))
        return None if found is None else found[0]

    def waited_for(self, stream: Stream) -> PendingPush | None:
        """What a stream waits for."""
        streams, pending = self.answers.get(key_of(stream.header.identity), ((), None))
        return pending if stream in streams else None

    def apply(self, decisions: Sequence[Decision]) -> None:
        """In order; then whoever waits asks again, and the clock is set."""
        house = self._house
        house.witness.decided(decisions)
        for decision in decisions:
            match decision:
                case Event():
                    pass
                case Resolve():
                    self._settle(decision)
                case Reduce():
                    self._combine(decision)
                case Step():
                    self._step(decision)
        for stream in house.intake.waiting:
            house.agenda.after(0.0, lambda stream=stream, intake=house.intake: intake.offer_again(stream))
        self._set_clock()

    def _settle(self, resolve: Resolve) -> None:
        house = self._house
        streams, _ = self.answers.pop(key_of(resolve.pending.identity), ([], None))
        if resolve.pending in self.held:
            self.held.remove(resolve.pending)
            house.budget.release(BODY_BYTES)
        for stream in list(streams):
            if resolve.decided is None:
                house.intake.end(stream, Answer(copy.copy(resolve.error)))
            else:
                house.intake.answer(stream, resolve.decided)

    def _combine(self, reduce: Reduce) -> None:
        house = self._house
        pushes = [pending.push for pending in reduce.pushes if pending.push is not None]

        def finish() -> None:
            if not self._closed:
                result = reduction.add_up(pushes, reduce.weights, reduce.divisor)
                self.apply(house.coordinator.reduced(reduce, result, house.agenda.now_s))

        house.work("adding up", finish)

    def _step(self, step: Step) -> None:
        def execute() -> None:
            self._house.arenas.step(step.ticket, step.push.parts)
            for resolve in step.resolves:
                self._settle(resolve)

        self.submit(execute)

    def submit(self, job: Callable[[], None]) -> None:
        """A job for the stepper, behind those that it has."""
        self._jobs.append(job)
        if not self._stepping:
            self._stepping = True
            self._house.work("stepping", lambda: None if self._closed else self.run_jobs())

    def run_jobs(self) -> None:
        """All that the stepper has."""
        self._stepping = False
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job()

    def _set_clock(self) -> None:
        house = self._house
        due_s = house.coordinator.next_s()
        if due_s is None or (self._clock is not None and self._clock <= due_s):
            return
        self._clock = due_s
        house.agenda.after(due_s - house.agenda.now_s + MOMENT_S, lambda: self._tick(due_s))

    def _tick(self, due_s: float) -> None:
        if not self._closed and self._clock == due_s:
            self._clock = None
            self.apply(self._house.coordinator.tick(self._house.agenda.now_s))
