"""Applies what the coordinator decides, in order, on the event loop: outcomes, steps, reductions, the timer.

The coordinator decides and never waits; everything that waits is here. The sender of a push waits for its outcome, which
comes when its step has been taken. A retry of the push waits for the same outcome. The bytes of a push stay reserved
until it is resolved, also when its sender has gone. When the coordinator asks for a later tick (`next_s`), the timer here
calls it.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from asyncio import FIRST_COMPLETED
from collections.abc import Awaitable, Callable, Coroutine, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from pushstep.proto.errors import NotHeld, PushPending, PushstepError
from pushstep.proto.errors.status import named
from pushstep.proto.types_pb2 import Identity, Receipt, ServerTimes

from ..arenas.arena import Arenas
from ..arenas.writer import ModelWriter
from ..coordinator.coordinator import Coordinator
from ..coordinator.decision import Decision, Event, Reduce, Resolve, Step
from ..coordinator.hooks.hook import Point
from ..coordinator.push import PendingPush
from ..coordinator.receipts import complete
from ..coordinator.worker import Decided
from ..devices.device import DeviceStream
from ..process.inline import INLINE_STEP_BYTES
from ..process.threads import PUSHES
from ..staging import reduction
from ..staging.budget import Budget
from ..staging.gradient import StagedPush

log = logging.getLogger("pushstep.executor")
# A wait for other workers ends with `push_pending` after at most this long, and the worker asks again.
HOLD_S: Final = 10.0
# Kinds of steps that are remembered. A model of many arenas can have more; then all are forgotten from time to time.
KINDS_KEPT: Final = 1000
# Added to each wake-up, because a lease has run out only after its last moment.
MOMENT_S: Final = 0.001

Key = tuple[int, str, int, int]


def _key(identity: Identity) -> Key:
    return identity.timeline, identity.worker, identity.epoch, identity.sequence


@dataclass(slots=True, eq=False)
class _Kept:
    """A push until it is resolved, and what it is resolved with."""

    pending: PendingPush
    resolved: asyncio.Future[Resolve]
    # gives back the bytes that the push holds
    release: Callable[[], None]
    # what its step writes into shared memory
    answer: Answer | None


class Owner(Protocol):
    """What an executor needs from its model."""

    last_receipt: Receipt | None

    def record(self, kind: str, by: str, **facts: Any) -> None:
        """Note an event."""

    def tell(self, point: Point, **facts: Any) -> None:
        """Queue an event for the observers at a point."""

    def require_whole(self) -> None:
        """Raise if nothing can be stepped any more."""

    def broke_off(self, problem: BaseException, version: int) -> PushstepError:
        """Note that a step failed. Returns the error for its pushes."""

    def note_nonfinite(self) -> None:
        """Note whether parameters have become NaN or infinite."""


class Answer(Protocol):
    """What a step writes for its worker into memory that they share."""

    nbytes: int
    # the dtype that is written; None: each parameter's own
    wire: torch.dtype | None

    def copy_out(self, arenas: Arenas) -> list[Tensor] | None:
        """For each arena, where the step's kernel may also write the new parameters; None for nowhere."""

    def after_step(self, arenas: Arenas, written: Set[int]) -> None:
        """Complete the answer. The values of the slots in `written` are there already."""


class Executor:
    """Applies the decisions of one model's coordinator. Call it on the event loop only."""

    def __init__(
        self,
        coordinator: Coordinator,
        arenas: Arenas,
        writer: ModelWriter,
        staging: Budget,
        adding: DeviceStream,
        model: Owner,
    ) -> None:
        """`adding`: the device stream on which the gradients of a round are added up."""
        self._coordinator = coordinator
        self._arenas = arenas
        self._writer = writer
        self._staging = staging
        self._adding = adding
        self._model = model
        # the last round's sum, and the bytes that the budget counts for it
        self._sum: StagedPush | None = None
        self._sum_bytes = 0
        self._kept: dict[Key, _Kept] = {}
        self._moved: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        # the time that the timer is set for
        self._due_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        # The kinds of steps taken before (`_kernels_of`). The first step of a kind may compile its kernels, for seconds,
        # so the event loop does not take it, however small it is.
        self._stepped: set[int] = set()
        self._let_go = self._closed = False

    def keep(self, pending: PendingPush, release: Callable[[], None], answer: Answer | None) -> None:
        """Hold a push that the coordinator has accepted until it is resolved, then call `release`."""
        resolved = asyncio.get_running_loop().create_future()
        self._kept[_key(pending.identity)] = _Kept(pending, resolved, release, answer)

    def apply(self, decisions: Sequence[Decision]) -> None:
        """Apply decisions in order, wake all that wait for a change, and set the timer."""
        if self._closed:
            return
        for decision in decisions:
            match decision:
                case Event(kind, by, facts):
                    self._model.record(kind, by, **facts)
                case Resolve():
                    self._resolve(decision)
                case Reduce():
                    self._start(self._reduce(decision))
                case Step():
                    self._step(decision)
        self._wake()
        self._set_clock()

    # Waiting.

    async def answer(self, identity: Identity, hold_s: float) -> Decided:
        """A push's outcome once its step is taken. PushPending if that takes longer than `hold_s`.

        NotHeld if the push is unknown; the error that it was resolved with, if it has no outcome.
        """
        kept = self._kept.get(_key(identity))
        if kept is None:
            decided = self._coordinator.decided_of(identity)
            if decided is None:
                raise NotHeld(worker=identity.worker, sequence=identity.sequence)
            return decided
        future = kept.resolved
        until_s = time.monotonic() + hold_s
        while not future.done() and (left_s := until_s - time.monotonic()) > 0:
            if self._let_go and self._coordinator.decided_of(identity) is None:
                break  # a step that is under way is still waited for
            waits: set[asyncio.Future[Any]] = {future, self._next_move()}
            await asyncio.wait(waits, timeout=left_s, return_when=FIRST_COMPLETED)
        if not future.done():
            self._model.require_whole()
            stepped = self._coordinator.decided_of(identity) is not None
            raise self.pending(identity.worker, kept.pending.digest, stepped=stepped)
        resolved = future.result()
        if resolved.decided is None:
            raise copy.copy(resolved.error or NotHeld(worker=identity.worker, sequence=identity.sequence))
        return resolved.decided

    async def change(self, until_s: float, worker: str) -> None:
        """Return after the next event. PushPending if `until_s` comes first, or if the server stops."""
        left_s = until_s - time.monotonic()
        if left_s > 0 and not self._let_go:
            await asyncio.wait({self._next_move()}, timeout=left_s)
        if self._let_go or time.monotonic() >= until_s:
            self._model.require_whole()
            raise self.pending(worker, 0)

    def pending(self, worker: str, digest: int, *, stepped: bool = False) -> PushPending:
        """The error for a push that waits for others. `digest`: of its body if that is held, else 0."""
        policy = self._coordinator.policy
        missing = policy.missing(self._coordinator.pending_pushes.view(time.monotonic()))
        why = "its step is being taken" if stepped else missing
        return PushPending(worker=worker, policy=policy.name, why=why, digest=digest, retry_after_s=0.0)

    def let_go(self) -> None:
        """End every wait: the server stops."""
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

    def _resolve(self, resolve: Resolve) -> None:
        kept = self._kept.pop(_key(resolve.pending.identity), None)
        if kept is not None:
            kept.resolved.set_result(resolve)
            kept.release()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # without a reference it may be collected while it runs
        task.add_done_callback(self._tasks.discard)

    async def _reduce(self, reduce: Reduce) -> None:
        pushes = [pending.push for pending in reduce.pushes if pending.push is not None]
        result: StagedPush | PushstepError
        self._forget_sum()
        small = all(push.is_of_few for push in pushes)
        try:
            self._sum_bytes = await PUSHES.run_unless(small, reduction.largest_sum, pushes)
            self._staging.count(self._sum_bytes)
            result = await PUSHES.run(self._add_up, pushes, reduce)
        except Exception as error:  # noqa: BLE001 - whatever it was, its pushes must not wait for ever
            result = named(error, log)
        del pushes
        self._sum = result if isinstance(result, StagedPush) else None
        self.apply(self._coordinator.reduced(reduce, result, time.monotonic()))

    def _add_up(self, pushes: Sequence[StagedPush], reduce: Reduce) -> StagedPush:
        with self._adding.over(pushes):
            # from the pool: fresh pages cost more than the sum itself (20 ms for 64 MB)
            return reduction.add_up(pushes, reduce.weights, reduce.divisor, self._staging.buffer)

    def _forget_sum(self) -> None:
        self._staging.release(self._sum_bytes)
        self._sum, self._sum_bytes = None, 0

    def _step(self, step: Step) -> None:
        """Queue a ticket with the model's writer, behind all earlier tickets."""
        model, arenas, times = self._model, self._arenas, ServerTimes()
        queued_s = time.monotonic()
        shared: list[Answer] = []
        for resolve in step.resolves:
            kept = self._kept.get(_key(resolve.pending.identity))
            if kept is not None and kept.answer is not None:
                shared.append(kept.answer)

        def execute() -> dict[int, float]:
            begun_s = time.monotonic()
            times.queue_s = begun_s - queued_s
            model.require_whole()
            copy_out = shared[0].copy_out(arenas) if shared else None
            with arenas.device_stream.over([step.push]):
                written = arenas.step(step.ticket, step.push.parts, copy_out)
            times.step_s = time.monotonic() - begun_s
            for answer in shared:
                answer.after_step(arenas, written if answer is shared[0] else frozenset())
            return arenas.applied_lrs(step.ticket)

        for point in (Point.STEP_PRE, Point.STEP_POST):
            model.tell(point, **step.facts)
        # the step is taken even if its callers go away: their retries will ask for the receipts
        nbytes = step.push.bytes() + sum([answer.nbytes for answer in shared])
        kernels = self._kernels_of(step, shared)
        small = nbytes <= INLINE_STEP_BYTES and kernels in self._stepped and step.push.is_of_few
        job = self._writer.submit(execute, small=small)
        if len(self._stepped) >= KINDS_KEPT:
            self._stepped.clear()
        self._stepped.add(kernels)  # later steps run after this one, which has compiled the kernels by then
        if job.done():
            self._finish(job, step, times)
        else:
            job.add_done_callback(lambda done: self._finish(done, step, times))

    def _kernels_of(self, step: Step, shared: Sequence[Answer]) -> int:
        """A hash of what selects the kernels of a step: dtypes, and which hyperparameters are off."""
        groups, kind = self._coordinator.commits.groups.list, step.push.kind
        switches = [(group, *map(bool, groups[group].values.values())) for group, *_ in kind]
        copied = shared[0].wire if shared else False
        return hash((kind, frozenset(switches), copied, step.ticket.factor == 1))

    def _finish(self, job: asyncio.Future[dict[int, float]], step: Step, times: ServerTimes) -> None:
        model = self._model
        model.note_nonfinite()
        if step.push is self._sum:
            self._forget_sum()
        failure: PushstepError | None = None
        # not raised: the traceback would be kept, and with it this frame, which holds the push
        broken = job.exception()
        lrs = job.result() if broken is None else {}
        if broken is not None:
            failure = model.broke_off(broken, step.ticket.version)
        for resolve in step.resolves:
            if resolve.decided is not None:
                complete(resolve.decided, lrs, times, failure)
                model.last_receipt = resolve.decided.receipt if failure is None else model.last_receipt
            self._resolve(resolve)

    def write(self, job: Callable[[], None], decided: Decided) -> Awaitable[None]:
        """Queue a write whose outcome is stored already.

        If it fails, that outcome becomes a rejection; the error is raised.
        """
        return self._written(self._writer.write(job), decided)

    async def _written(self, job: asyncio.Future[None], decided: Decided) -> None:
        try:
            await job
            self._model.note_nonfinite()
        except Exception as error:  # noqa: BLE001 - whatever it was, its sender is told and the model goes on
            failure = self._model.broke_off(error, decided.receipt.version)
            complete(decided, {}, ServerTimes(), failure)
            raise failure from None

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
        delay_s = max(0.0, next_s - time.monotonic()) + MOMENT_S
        self._timer = loop.call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.apply(self._coordinator.tick(time.monotonic()))

    def close(self) -> None:
        """Stop the timer and end every wait. No decision is applied any more."""
        self._closed = True
        self.let_go()
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
        while self._kept:
            self._kept.popitem()[1].release()
        self._forget_sum()
