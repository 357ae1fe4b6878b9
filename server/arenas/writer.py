"""The one writer of a model: a thread that runs, one after the other, all jobs that touch its arenas.

Decisions are made on the event loop, in the order in which they are submitted here; that order is the model's
history. The thread runs kernels and copies, which release the GIL, so the loop never waits for a large one. A write that
fails half way leaves the arenas torn: no later job reads or steps them until they are loaded again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Literal, TypeVar

import torch

from pushstep.proto.errors import ModelFailed
from pushstep.proto.types_pb2 import Ticket

from ..process.inline import INLINE_STEP_BYTES
from ..process.threads import DISK
from ..staging.gradient import StagedPush
from .arena import Arenas

T = TypeVar("T")
# Kinds of steps that are remembered. Beyond that all are forgotten, which a model of many arenas may come to.
KINDS_KEPT: Final = 1000


class ModelWriter:
    """Runs the jobs of one model: first in, first out, one at a time."""

    def __init__(self, model: str, arenas: Arenas) -> None:
        self._model = model
        self._arenas = arenas
        self._thread = ThreadPoolExecutor(1, f"stepper-{model}", arenas.device_stream.adopt)
        self._takes_small = arenas.device_stream.takes_small
        self._unfinished = 0

    @property
    def is_idle(self) -> bool:
        """True if the event loop may run a small job itself now: no job is queued, and the arenas are not torn."""
        return self._takes_small and not self._unfinished and not self._arenas.torn

    def submit(
        self, job: Callable[[], T], *, small: bool = False, mends: bool = False, reads: bool = True
    ) -> asyncio.Future[T]:
        """Queue a job behind all earlier ones. The future has its result, or what it raised.

        A small job with no job before it runs at once in the calling thread. Only the event loop submits jobs, so the
        writer thread stays idle meanwhile, and the way there and back costs 0.15 ms, more than a small step. ModelFailed
        if the arenas are torn when the job's turn comes, unless it `mends` them, or does not touch them (`reads` False).
        """
        loop = asyncio.get_running_loop()
        if small and self._takes_small and not self._unfinished:
            done: asyncio.Future[T] = loop.create_future()
            try:
                done.set_result(self._done(job, mends or not reads))
            except Exception as error:  # noqa: BLE001 - it belongs to whoever awaits the future
                done.set_exception(error)
            return done
        self._unfinished += 1
        queued = loop.run_in_executor(self._thread, self._done, job, mends or not reads)
        queued.add_done_callback(self._finished)
        return queued

    def write(self, job: Callable[[], T], *, mends: bool = False) -> asyncio.Future[T]:
        """Like `submit`, for a job that changes the model: it runs even if its caller is cancelled."""
        return asyncio.shield(self.submit(job, mends=mends))

    def _done(self, job: Callable[[], T], mends: bool) -> T:
        arenas = self._arenas
        if arenas.torn and not mends:
            raise ModelFailed(
                model=self._model, version=arenas.version, problem="a write before this one broke off"
            )
        return job()

    def _finished(self, _: asyncio.Future[T]) -> None:
        self._unfinished -= 1

    async def close(self) -> None:
        """Let the queue run empty and end the thread."""
        await DISK.run(self._thread.shutdown)


class SmallSteps:
    """Which steps of one model are small enough for the event loop.

    The first step of a kind may compile its kernels, for seconds, so it never counts as small.
    """

    def __init__(self, values: Callable[[int], Mapping[str, float | bool]]) -> None:
        """`values`: a group's hyperparameters."""
        self._values = values
        self._kinds: set[int] = set()

    def has(
        self,
        ticket: Ticket,
        push: StagedPush,
        answer_bytes: int,
        copied: torch.dtype | Literal[False] | None = False,
    ) -> bool:
        """Whether a step is small; also notes its kind. Call it once for each step, in order.

        `copied`: the dtype in which the step's kernel copies parameters out; None: each parameter's own; False: it copies none.
        """
        kind = self._kind(ticket, push, copied)
        is_known = kind in self._kinds
        if len(self._kinds) >= KINDS_KEPT:
            self._kinds.clear()
        self._kinds.add(kind)  # later steps run after this one, which has compiled the kernels by then
        if not is_known or not push.is_of_few or push.bytes() + answer_bytes > INLINE_STEP_BYTES:
            return False
        return not ticket.operations and not ticket.averages  # both read whole parameters

    def _kind(self, ticket: Ticket, push: StagedPush, copied: torch.dtype | Literal[False] | None) -> int:
        """A hash of what selects the kernels: dtypes, and which hyperparameters are off."""
        switches = [(group, *map(bool, self._values(group).values())) for group, *_ in push.kind]
        return hash((push.kind, frozenset(switches), copied, ticket.factor == 1))
