"""Mistakes in what is done about decisions: the executor, the writer, the pushes that are held, the publisher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pushstep.server.arenas.arena import Arenas
from pushstep.server.arenas.publisher import Published, Publisher
from pushstep.server.arenas.writer import ModelWriter
from pushstep.server.coordinator.decision import Resolve, Step
from pushstep.server.models import executor as executor_module
from pushstep.server.models.executor import Executor
from pushstep.server.models.held_pushes import HeldPushes
from pushstep.server.models.model import Model

Patch = pytest.MonkeyPatch


def receipts_come_before_the_step(patch: Patch) -> None:
    """A push is answered when its step is queued."""
    step = Executor._step

    def hasty(self: Executor, one: Step) -> None:
        step(self, one)
        for resolve in one.resolves:
            self._held.resolve(resolve)

    patch.setattr(Executor, "_step", hasty)


def waiters_sleep_on(patch: Patch) -> None:
    """Whoever waits for a change is not woken by one."""
    patch.setattr(HeldPushes, "wake", lambda self: None)


def the_timer_is_not_set(patch: Patch) -> None:
    """Nobody looks at the coordinator when it has asked for that."""
    patch.setattr(Executor, "_set_clock", lambda self: None)


def jobs_are_done_twice(patch: Patch) -> None:
    """The writer takes each step once more."""
    done = ModelWriter._done

    def again(self: ModelWriter, job: Callable[[], Any], mends: bool) -> Any:
        if "Executor._step" in getattr(job, "__qualname__", ""):
            done(self, job, mends)
        return done(self, job, mends)

    patch.setattr(ModelWriter, "_done", again)


def small_steps_overtake(patch: Patch) -> None:
    """A small job does not wait for the jobs before it."""
    submit = ModelWriter.submit

    def at_once(self: ModelWriter, job: Callable[[], Any], **options: Any) -> Any:
        unfinished, self._unfinished = self._unfinished, 0
        try:
            return submit(self, job, **options)
        finally:
            self._unfinished += unfinished

    patch.setattr(ModelWriter, "submit", at_once)


def answers_are_out_of_date(patch: Patch) -> None:
    """A reader gets what the last one got, whatever has been stepped since."""
    newest, last = Publisher.newest, dict[Publisher, Published]()

    async def stale(self: Publisher, *asked: Any, **how: Any) -> Published:
        if self not in last:
            last[self] = await newest(self, *asked, **how)
        return last[self]

    patch.setattr(Publisher, "newest", stale)


def failed_steps_leave_their_version(patch: Patch) -> None:
    """The version of a step that failed is the next one's, too, as far as the arenas know."""
    step = Arenas.step

    def undone(self: Arenas, *ticket: Any) -> set[int]:
        version = self.version
        try:
            return step(self, *ticket)
        except MemoryError:
            self.version = version
            raise

    patch.setattr(Arenas, "step", undone)


def failed_steps_are_told_as_applied(patch: Patch) -> None:
    """What came of a step is not added to the outcome that was stored before."""
    complete = executor_module.complete
    patch.setattr(
        executor_module,
        "complete",
        lambda decided, lrs, times, failure, *more: complete(decided, lrs, times, None, *more),
    )


def bytes_are_kept(patch: Patch) -> None:
    """A push that is resolved does not give its bytes back."""

    def resolve(self: HeldPushes, resolve: Resolve) -> None:
        kept = self._kept.pop(resolve.pending.key, None)
        if kept is not None:
            kept.resolved.set_result(resolve)

    patch.setattr(HeldPushes, "resolve", resolve)


def sums_are_kept(patch: Patch) -> None:
    """The sum of a round counts on when its step is done."""
    finish = Executor._finish

    def forgetful(self: Executor, *done: Any) -> None:
        sums, self._sums = self._sums, {}
        finish(self, *done)
        self._sums = sums

    patch.setattr(Executor, "_finish", forgetful)


def queued_steps_are_refused_at_the_end(patch: Patch) -> None:
    """What was decided before the last snapshot, and is in it, is not stepped any more."""
    patch.setattr(Model, "require_steppable", lambda self: self.require_here())
