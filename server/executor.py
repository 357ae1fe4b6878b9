"""Carries out what the judge decides, in order, on the event loop: settles, steps, additions, and the clock.

The judge says what is to be done and never waits; everything that waits is here. Whoever sent a push waits for its
answer, which comes when its step has been taken; a retry of a push waits for the same answer. The bytes of a push stay
set aside until it is settled, also when its sender has gone. When the judge wants to look again at some time, this is
what wakes it.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from asyncio import FIRST_COMPLETED
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from pushstep.proto.errors import NotHeld, PushPending, PushstepError
from pushstep.proto.status import named
from pushstep.proto.types_pb2 import Identity, Outcome, ServerTimes

from . import reduction
from .candidate import Candidate
from .decision import Combine, Decision, Note, Settle, Step
from .docket import refuse_consumed
from .hooks.hook import Point
from .staging import INLINE_STEP_BYTES, StagedPush
from .threads import PUSHES
from .worker import Verdict

if TYPE_CHECKING:
    from .model import Model
    from .shared_answer import SharedAnswer

log = logging.getLogger("pushstep.executor")
# A wait for other workers is answered with `push_pending` after this long at the latest, and asked for again.
HOLD_S: Final = 10.0
# A model of many arenas can be pushed in more ways than this, each of which is then new again at times.
KINDS_KEPT: Final = 1000
# A lease has run out when its last moment is past.
MOMENT_S: Final = 0.001

Key = tuple[int, str, int, int]


def _key(identity: Identity) -> Key:
    return identity.timeline, identity.worker, identity.epoch, identity.sequence


class Executor:
    """The hands of one model's judge. On the event loop only."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._adding = model.device.lane()
        # the last round's sum, and what it was counted for
        self._sum: StagedPush | None = None
        self._sum_bytes = 0
        self._answers: dict[Key, tuple[asyncio.Future[Settle], Candidate]] = {}
        self._releases: dict[Candidate, Callable[[], None]] = {}
        self._moved: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        # for when the timer is set
        self._due_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        # by what their kernels are chosen by, the steps that were taken before: the first of a kind may have to compile
        # them, for seconds, which the event loop does not do however small it is
        self._stepped: set[int] = set()
        self._let_go = self._closed = False

    def keep(self, candidate: Candidate, release: Callable[[], None]) -> None:
        """Hold a candidate that the judge has taken until it is settled, then call `release`."""
        future = asyncio.get_running_loop().create_future()
        self._answers[_key(candidate.identity)] = future, candidate
        self._releases[candidate] = release

    def carry_out(self, decisions: Sequence[Decision]) -> None:
        """Do what was decided, wake whoever waits for a change, and set the clock."""
        if self._closed:
            return
        for decision in decisions:
            match decision:
                case Note(kind, by, facts):
                    self._model.record(kind, by, **facts)
                case Settle():
                    self._settle(decision)
                case Combine():
                    self._start(self._combine(decision))
                case Step():
                    self._step(decision)
        self._wake()
        self._set_clock()

    # Waiting.

    async def answer(self, identity: Identity, hold_s: float) -> Verdict:
        """A push's verdict once its step is taken; PushPending if that takes longer than `hold_s`."""
        found = self._answers.get(_key(identity))
        if found is None:
            verdict = self._model.judge.verdict_of(identity)
            if verdict is None:
                raise NotHeld(worker=identity.worker, sequence=identity.sequence)
            return verdict
        future, candidate = found
        until_s = time.monotonic() + hold_s
        while not future.done() and (left_s := until_s - time.monotonic()) > 0:
            if self._let_go and self._model.judge.verdict_of(identity) is None:
                break  # a step that is under way is waited for all the same
            waits: set[asyncio.Future[Any]] = {future, self._next_move()}
            await asyncio.wait(waits, timeout=left_s, return_when=FIRST_COMPLETED)
        if not future.done():
            self._model.require_whole()
            stepped = self._model.judge.verdict_of(identity) is not None
            raise self.pending(identity.worker, candidate.digest, stepped=stepped)
        settled = future.result()
        if settled.verdict is None:
            raise copy.copy(settled.error or NotHeld(worker=identity.worker, sequence=identity.sequence))
        return settled.verdict

    async def change(self, until_s: float, worker: str) -> None:
        """Return after the next event; PushPending if that takes too long."""
        left_s = until_s - time.monotonic()
        if left_s > 0 and not self._let_go:
            await asyncio.wait({self._next_move()}, timeout=left_s)
        if self._let_go or time.monotonic() >= until_s:
            self._model.require_whole()
            raise self.pending(worker, 0)

    def pending(self, worker: str, digest: int, *, stepped: bool = False) -> PushPending:
        """What a push is told that waits for others; with its digest once its body is held here."""
        policy = self._model.judge.policy
        missing = policy.missing(self._model.judge.docket.view(time.monotonic()))
        why = "its step is being taken" if stepped else missing
        return PushPending(worker=worker, policy=policy.name, why=why, digest=digest, retry_after_s=0.0)

    def let_go(self) -> None:
        """Have nobody wait any more: the server stops."""
        self._let_go = True
        self._wake()

    def _next_move(self) -> asyncio.Future[None]:
        if self._moved is None or self._moved.done():
            self._moved = asyncio.get_running_loop().create_future()
        return self._moved

    def _wake(self) -> None:
        if self._moved is not None and not self._moved.done():
            self._moved.set_result(None)

    # Doing.

    def _settle(self, settle: Settle) -> None:
        future, _ = self._answers.pop(_key(settle.candidate.identity), (None, None))
        if future is not None:
            future.set_result(settle)
        release = self._releases.pop(settle.candidate, None)
        if release is not None:
            release()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # or it may be collected while it runs
        task.add_done_callback(self._tasks.discard)

    async def _combine(self, combine: Combine) -> None:
        pushes = [candidate.push for candidate in combine.candidates if candidate.push is not None]
        result: StagedPush | PushstepError
        self._forget_sum()
        small = all(push.is_of_few for push in pushes)
        try:
            self._sum_bytes = await PUSHES.run_unless(small, reduction.largest_sum, pushes)
            self._model.staging.count(self._sum_bytes)
            result = await PUSHES.run(self._add_up, pushes, combine)
        except Exception as error:  # noqa: BLE001 - whatever it was, its pushes must not wait for ever
            result = named(error, log)
        del pushes
        self._sum = result if isinstance(result, StagedPush) else None
        self.carry_out(self._model.judge.combined(combine, result, time.monotonic()))

    def _add_up(self, pushes: Sequence[StagedPush], combine: Combine) -> StagedPush:
        with self._adding.over(pushes):
            # a sum in fresh pages would cost more than adding it up: 64 MB of them 20 ms and more
            return reduction.add_up(pushes, combine.weights, combine.divisor, self._model.staging.buffer)

    def _forget_sum(self) -> None:
        self._model.staging.release(self._sum_bytes)
        self._sum, self._sum_bytes = None, 0

    def _step(self, step: Step) -> None:
        """Queue a ticket with the model's stepper, behind all that were written before it."""
        model, times = self._model, ServerTimes()
        queued_s = time.monotonic()
        answers = [settle.candidate.answer for settle in step.settles]
        shared = [answer for answer in answers if answer is not None]

        def execute() -> dict[int, float]:
            begun_s = time.monotonic()
            times.queue_s = begun_s - queued_s
            model.require_whole()
            copy_out = shared[0].copy_out(model.arenas) if shared else None
            with model.arenas.lane.over([step.push]):
                written = model.arenas.step(step.ticket, step.push.parts, copy_out)
            times.step_s = time.monotonic() - begun_s
            for answer in shared:
                answer.after_step(model.arenas, written if answer is shared[0] else frozenset())
            return model.arenas.applied_lrs(step.ticket)

        for point in (Point.STEP_PRE, Point.STEP_POST):
            model.tell(point, **step.facts)
        # taken even if the callers go away meanwhile: their retries will ask for the receipts
        nbytes = step.push.bytes() + sum(answer.nbytes for answer in shared)
        kernels = self._kernels_of(step, shared)
        small = nbytes <= INLINE_STEP_BYTES and kernels in self._stepped and step.push.is_of_few
        job = model.stepper.submit(execute, small=small)
        if len(self._stepped) >= KINDS_KEPT:
            self._stepped.clear()
        self._stepped.add(kernels)  # whatever is handed in from now on comes behind it
        if job.done():
            self._finish(job, step, times)
        else:
            job.add_done_callback(lambda done: self._finish(done, step, times))

    def _kernels_of(self, step: Step, shared: Sequence[SharedAnswer]) -> int:
        """A hash of what the kernels of a step are chosen by: dtypes, and which hyperparameters are off."""
        groups = self._model.groups.list
        switches = {group: tuple(map(bool, groups[group].values.values())) for group in step.push.groups}
        copied = shared[0].region.answer.wire if shared else False
        return hash((step.push.kind, tuple(switches.items()), copied, step.ticket.factor == 1))

    def _finish(self, job: asyncio.Future[dict[int, float]], step: Step, times: ServerTimes) -> None:
        model = self._model
        model.note_nonfinite()
        if step.push is self._sum:
            self._forget_sum()
        failure: PushstepError | None = None
        # not raised: this frame holds the push, and must not be in a traceback that is kept with it
        broken = job.exception()
        lrs = job.result() if broken is None else {}
        if broken is not None:
            failure = model.broke_off(broken, step.ticket.version)
        for settle in step.settles:
            if settle.verdict is not None:
                _complete(settle.verdict, lrs, times, failure)
                model.last_receipt = settle.verdict.receipt if failure is None else model.last_receipt
            self._settle(settle)

    def write(self, job: Callable[[], None], verdict: Verdict) -> Awaitable[None]:
        """Queue a write that has its verdict already, which it loses if it fails."""
        return self._written(self._model.stepper.write(job), verdict)

    async def _written(self, job: asyncio.Future[None], verdict: Verdict) -> None:
        try:
            await job
            self._model.note_nonfinite()
        except Exception as error:  # noqa: BLE001 - whatever it was, its sender is told and the model goes on
            failure = self._model.broke_off(error, verdict.receipt.version)
            _complete(verdict, {}, ServerTimes(), failure)
            raise failure from None

    # The clock.

    def _set_clock(self) -> None:
        next_s = self._model.judge.next_s()
        if next_s is None or (self._timer is not None and self._due_s <= next_s):
            return  # woken too early, it is set anew: that costs less than a timer for each push
        if self._timer is not None:
            self._timer.cancel()
        self._due_s = next_s
        loop = asyncio.get_running_loop()
        delay_s = max(0.0, next_s - time.monotonic()) + MOMENT_S
        self._timer = loop.call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.carry_out(self._model.judge.tick(time.monotonic()))

    def close(self) -> None:
        """Stop the clock and let everybody go: the model does no more."""
        self._closed = True
        self.let_go()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def give_back(self) -> None:
        """Let go of what was never settled, once nothing reads it: sums under way do, and steps, which have ended."""
        if self._tasks:
            await asyncio.wait(self._tasks)
        while self._releases:
            self._releases.popitem()[1]()
        self._forget_sum()


def _complete(
    verdict: Verdict, lrs: Mapping[int, float], times: ServerTimes, failure: PushstepError | None
) -> None:
    """Write what only the step itself could tell into a stored verdict."""
    receipt = verdict.receipt
    receipt.times.queue_s, receipt.times.step_s = times.queue_s, times.step_s
    for group in receipt.groups:
        group.effective_lr = lrs.get(group.group, group.effective_lr)
    if failure is not None:
        verdict.error = refuse_consumed(copy.copy(failure))
        receipt.outcome, receipt.reason = Outcome.OUTCOME_REJECTED, failure.code
