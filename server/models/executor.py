"""Applies what the coordinator decides, in order, on the event loop: outcomes, steps, reductions, the timer.

The coordinator decides and never waits. A step is queued with the model's writer, which appends its record to the journal
first, if there is one. Its pushes are resolved when it has been taken, and the record is as safe as the model's level says.
When the coordinator asks for a later tick (`next_s`), the timer here calls it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final, Protocol

from pushstep.proto.errors import PushstepError
from pushstep.proto.errors.status import named
from pushstep.proto.types_pb2 import Receipt, ServerTimes

from ..arenas.arena import Arenas
from ..arenas.gradients import bytes_of_change
from ..arenas.writer import ModelWriter, SmallSteps
from ..coordinator.coordinator import Coordinator
from ..coordinator.decision import Decision, Event, Reduce, Resolve, Step
from ..coordinator.hooks.hook import Point
from ..coordinator.receipts import complete
from ..coordinator.worker import Decided, count_failed
from ..counters.model_counts import ModelCounts
from ..devices.device import DeviceStream
from ..journal.entry import Entry
from ..journal.journal import Level
from ..journal.recorder import Recorder
from ..parts.shard import Leader, ModelShard
from ..process.logs import in_short
from ..process.threads import PUSHES
from ..staging import reduction
from ..staging.budget import Budget
from ..staging.gradient import StagedPush
from .held_pushes import Answer, HeldPushes

log = logging.getLogger("pushstep.executor")
# Added to each wake-up, because a lease has run out only after its last moment.
MOMENT_S: Final = 0.001
# Of a step that was taken: each group's learning rate, and what clipping multiplied the gradients by.
Taken = tuple[dict[int, float], float]


class Owner(Protocol):
    """What an executor needs from its model."""

    last_receipt: Receipt | None
    counts: ModelCounts
    # of a model that lies in several ranks
    shard: ModelShard | None

    def record(self, kind: str, by: str, **facts: Any) -> None:
        """Note an event."""

    def tell(self, point: Point, **facts: Any) -> None:
        """Queue an event for the observers at a point."""

    def require_steppable(self) -> None:
        """Raise if not even what was decided can be stepped any more."""

    def broke_off(self, problem: BaseException, version: int) -> PushstepError:
        """Note that a step failed. Returns the error for its pushes."""

    def note_nonfinite(self) -> None:
        """Note whether parameters have become NaN or infinite."""


class Executor:
    """Applies the decisions of one model's coordinator. Call it on the event loop only."""

    def __init__(
        self,
        coordinator: Coordinator,
        arenas: Arenas,
        writer: ModelWriter,
        staging: Budget,
        adding: DeviceStream,
        recorder: Recorder,
        held: HeldPushes,
        model: Owner,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`adding`: the device stream on which the gradients of a round are added up. `clock`: that of the event loop."""
        self._recorder = recorder
        self._held = held
        self._coordinator = coordinator
        self._arenas = arenas
        self._writer = writer
        self._staging = staging
        self._adding = adding
        self._model = model
        self._clock = clock
        # the sums of rounds that are being stepped, by id: the bytes that the budget counts for each
        self._sums: dict[int, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        # the time that the timer is set for
        self._due_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        # the outcomes of writes that are queued
        self._writes: dict[int, Decided] = {}
        self._small = SmallSteps(lambda group: coordinator.commits.groups.list[group].values)
        self._closed = False

    def apply(self, decisions: Sequence[Decision]) -> None:
        """Apply decisions in order, wake all that wait for a change, and set the timer."""
        if self._closed:
            return
        for decision in decisions:
            match decision:
                case Event(kind, by, facts):
                    self._model.record(kind, by, **facts)
                case Resolve():
                    if self.leader is not None:
                        self.leader.resolved(decision)
                    self.record(self._recorder.outcome(decision), decision)
                case Reduce():
                    self._start(self._reduce(decision))
                case Step():
                    self._step(decision)
        self.record_changes()
        self._held.wake()
        self._set_clock()

    @property
    def leader(self) -> Leader | None:
        """Who tells the other ranks, if this is rank 0 of several."""
        shard = self._model.shard
        return None if shard is None else shard.leader

    # Recording.

    def record_changes(self) -> None:
        """Record what else has changed, if there is a journal: joins, leaves, edits."""
        entry = self._recorder.change()
        if entry is not None:
            self.record(entry)

    def record(self, entry: Entry | None, *resolves: Resolve) -> None:
        """Have a record appended, then resolve pushes; at once if there is none."""
        if entry is None:
            for resolve in resolves:
                self._resolve(resolve)
            return
        job = self._writer.submit(partial(entry.append_at_last, self._recorder.gives_up), reads=False)
        job.add_done_callback(lambda done: self._recorded(done, entry, resolves))

    def _recorded(self, job: asyncio.Future[None], entry: Entry, resolves: Sequence[Resolve]) -> None:
        problem = job.exception()
        if problem is not None:
            # the server stops: nobody is told of what could not be kept
            log.error("the journal has not taken a record: %s", in_short(problem))
            return
        self._resolve_when_safe(entry, resolves)

    def _resolve_when_safe(self, entry: Entry | None, resolves: Sequence[Resolve], version: int = 0) -> None:
        """`version`: that of the step, which the other ranks have taken, too, when its pushes are resolved."""

        def resolve_all() -> None:
            for resolve in resolves:
                self._resolve(resolve)

        if version and self.leader is not None:
            safe = entry is not None and entry.level is Level.DURABLE
            resolve = partial(self._resolve_when_safe, entry, resolves)
            self.leader.when_all(version, safe=safe, then=resolve)
            return
        if entry is None:
            resolve_all()
        else:
            self._recorder.when_safe(entry.number, entry.level, resolve_all)

    def _resolve(self, resolve: Resolve) -> None:
        if resolve.decided is not None:
            resolve.decided.receipt.durable_version = self._recorder.durable_version
            self._model.counts.decided(resolve.decided.receipt)
        self._held.resolve(resolve)

    # Doing.

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # without a reference it may be collected while it runs
        task.add_done_callback(self._tasks.discard)

    async def _reduce(self, reduce: Reduce) -> None:
        pushes = [pending.push.own for pending in reduce.pushes if pending.push is not None]
        result: StagedPush | PushstepError
        sum_bytes = 0
        small = all(push.is_of_few for push in pushes)
        try:
            sum_bytes = await PUSHES.run_unless(small, reduction.largest_sum, pushes)
            self._staging.count(sum_bytes)
            result = await PUSHES.run(self._add_up, pushes, reduce)
            if self.leader is not None:
                result = await self.leader.reduce(reduce, result)
        except Exception as error:  # noqa: BLE001 - whatever it was, its pushes must not wait for ever
            result = named(error, log)
        del pushes
        decisions = self._coordinator.reduced(reduce, result, self._clock())
        if any(isinstance(decision, Step) and decision.push is result for decision in decisions):
            self._sums[id(result)] = sum_bytes
        else:  # it failed, or is not finite, or the round has ended meanwhile
            self._staging.release(sum_bytes)
        del result
        self.apply(decisions)

    def _add_up(self, pushes: Sequence[StagedPush], reduce: Reduce) -> StagedPush:
        with self._adding.over(pushes):
            # from the pool: fresh pages cost more than the sum itself (20 ms for 64 MB)
            return reduction.add_up(pushes, reduce.weights, reduce.divisor, self._staging.buffer)

    def _step(self, step: Step) -> None:
        """Queue a ticket with the model's writer, behind all earlier tickets."""
        model, arenas, times = self._model, self._arenas, ServerTimes()
        queued_s = self._clock()
        shared: list[Answer] = []
        for resolve in step.resolves:
            answer = self._held.answers_of(resolve.pending)
            if answer is not None:
                shared.append(answer)

        entry, push = self._recorder.step(step), step.push.own
        if self.leader is not None:
            self.leader.ticket(step)
        # of gradients that hooks change: beside those that came, until the step is taken
        changed_bytes = bytes_of_change(step.ticket, push.parts)
        if changed_bytes:
            self._staging.count(changed_bytes)

        def execute() -> Taken:
            begun_s = self._clock()
            times.queue_s = begun_s - queued_s
            model.require_steppable()
            if entry is not None:
                entry.append()
                begun_s = self._clock()
            copy_out = shared[0].copy_out(arenas) if shared else None
            with arenas.device_stream.over([push]):
                written, clip_factor = arenas.step(step.ticket, push.parts, copy_out, self._staging.buffer)
            times.step_s = self._clock() - begun_s
            for answer in shared:
                answer.after_step(arenas, written if answer is shared[0] else None)
            return arenas.applied_lrs(step.ticket), clip_factor

        if step.hooks:
            model.tell(Point.STEP_PRE, **step.facts)
        # the step is taken even if its callers go away: their retries will ask for the receipts
        answer_bytes = sum([answer.nbytes for answer in shared])
        small = self._small.has(step.ticket, push, answer_bytes, shared[0].wire if shared else False)
        # the event loop does not wait for the disk
        job = self._writer.submit(execute, small=small and entry is None)
        if job.done():
            self._finish(job, step, times, entry, changed_bytes)
        else:
            job.add_done_callback(lambda done: self._finish(done, step, times, entry, changed_bytes))

    def _finish(
        self,
        job: asyncio.Future[Taken],
        step: Step,
        times: ServerTimes,
        entry: Entry | None,
        changed_bytes: int,
    ) -> None:
        model = self._model
        if changed_bytes:
            self._staging.release(changed_bytes)
        model.note_nonfinite()
        if self._sums:
            self._staging.release(self._sums.pop(id(step.push), 0))
        failure: PushstepError | None = None
        # not raised: the traceback would be kept, and with it this frame, which holds the push
        broken = job.exception()
        lrs, clip_factor = job.result() if broken is None else ({}, None)
        lrs = lrs if self.leader is None else self.leader.lrs(int(step.ticket.version), lrs)
        if step.hooks and broken is None:
            seen = {"clip_factor": clip_factor, "lrs": lrs, "step_s": times.step_s, "queue_s": times.queue_s}
            model.tell(Point.STEP_POST, **step.facts, **seen)
        if broken is not None:
            failure = model.broke_off(broken, step.ticket.version)
        for resolve in step.resolves:
            if resolve.decided is not None:
                complete(resolve.decided, lrs, times, failure, clip_factor)
                if failure is not None:
                    count_failed(self._coordinator.sessions.workers, resolve.decided)
                model.last_receipt = resolve.decided.receipt if failure is None else model.last_receipt
        if failure is not None and self.leader is not None:
            self.leader.failed(failure)
        elif failure is None or entry is None:
            self._resolve_when_safe(entry, step.resolves, int(step.ticket.version))
        elif entry.number:
            self.record(self._recorder.failure(int(step.ticket.version), failure), *step.resolves)
        else:
            self._recorder.not_written(entry)
            self._resolve_when_safe(None, step.resolves)

    def write(self, job: Callable[[], None], decided: Decided, entry: Entry | None) -> Awaitable[None]:
        """Queue a write whose outcome is stored already, with its record.

        If it fails, that outcome becomes a rejection; the error is raised.
        """

        def execute() -> None:
            if entry is not None:
                entry.append()
            job()

        self._writes[id(decided)] = decided
        # a task of its own: what comes of the write is noted even if its caller is cancelled
        writing = asyncio.ensure_future(self._written(self._writer.submit(execute), decided, entry))
        self._tasks.add(writing)
        writing.add_done_callback(self._tasks.discard)
        return asyncio.shield(writing)

    async def _written(self, job: asyncio.Future[None], decided: Decided, entry: Entry | None) -> None:
        try:
            await job
            self._model.note_nonfinite()
            await self._recorder.until_safe()
            self._model.counts.uploaded(decided.receipt.outcome)
        except Exception as error:  # noqa: BLE001 - whatever it was, its sender is told and the model goes on
            failure = self._model.broke_off(error, decided.receipt.version)
            complete(decided, {}, ServerTimes(), failure)
            count_failed(self._coordinator.sessions.workers, decided)
            self._model.counts.uploaded(decided.receipt.outcome)
            if entry is not None and entry.number:
                self.record(self._recorder.failure(int(decided.receipt.version), failure))
            elif entry is not None:
                self._recorder.not_written(entry)
            raise failure from None
        finally:
            del self._writes[id(decided)]

    def under_way(self) -> list[Decided]:
        """The stored outcomes whose steps or writes are queued: what comes of them is not known yet."""
        stored = [self._coordinator.decided_of(identity) for identity in self._held.identities()]
        return [*self._writes.values(), *(decided for decided in stored if decided is not None)]

    # The timer.

    def _set_clock(self) -> None:
        if self._timer is not None and self._due_s <= self._coordinator.not_due_before_s():
            return  # the usual case, after every push
        next_s = self._coordinator.next_s()
        if next_s is None or (self._timer is not None and self._due_s <= next_s):
            return  # an early wake-up sets it again: that costs less than a timer for each push
        if self._timer is not None:
            self._timer.cancel()
        self._due_s = next_s
        loop = asyncio.get_running_loop()
        delay_s = max(0.0, next_s - self._clock()) + MOMENT_S
        self._timer = loop.call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.apply(self._coordinator.tick(self._clock()))

    def close(self) -> None:
        """Stop the timer and end every wait. No decision is applied any more."""
        self._closed = True
        self._held.let_go()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def give_back(self) -> None:
        """Release the pushes that were never resolved.

        Call it after the writer has ended, because steps read them. Reductions that are under way read them too, and
        are waited for.
        """
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._held.give_back()
        self._staging.release(sum(self._sums.values()))
        self._sums.clear()
