"""Where a push's bytes wait, complete and checked, before the model sees them; and how many may wait at once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pushstep.proto.errors import MemoryShort, OverBudget, OverCapacity
from pushstep.proto.frames import CHUNK_BYTES
from pushstep.proto.layout import Slot
from pushstep.proto.memory import BufferPool
from pushstep.proto.types_pb2 import Staged

from . import garbage
from .threads import INLINE_PARTS

# Asked of who is turned away, for each that waits: the longer the queue, the later.
RETRY_AFTER_S: Final = 0.1
LONGEST_RETRY_AFTER_S: Final = 10.0
# Streams that wait hold their gRPC windows, which nothing takes back but ending them: so many may wait, and with so
# much of the budget.
MAX_WAITING: Final = 256
WAITING_SHARE: Final = 0.5
OWNERS_REMEMBERED: Final = 10_000
# What manifests and headers that come in parts may hold of it: the rest is for pushes, whatever anybody sends.
PARTS_SHARE: Final = 0.25
# gRPC receives this much of a stream before anyone reads it (service.py sets it).
WINDOW_BYTES: Final = 512 << 10
# A stream being read: one chunk being copied, one received, one coming in.
READING_BYTES: Final = 3 * CHUNK_BYTES
# Memory of finished pushes that is kept for the next ones, within the budget.
KEPT_BYTES: Final = 1 << 30
# Up to here bytes are copied, and whole pushes inspected and stepped, on the event loop: a hop to a thread and back
# costs more (about 0.15 ms here).
INLINE_BYTES: Final = 64 << 10
# The same for a step, which counts the gradients it reads and the parameters it writes for a worker on this host. An
# exchange of 10,000 float32, 40 KB of each, takes 1.12 ms at least with the hop and 1.00 without.
INLINE_STEP_BYTES: Final = 128 << 10


@dataclass(frozen=True, slots=True)
class DensePart:
    """The gradient of neighbouring parameters: elements [start, stop) of an arena, flat."""

    arena: int
    start: int
    slots: tuple[Slot, ...]
    gradient: Tensor


@dataclass(frozen=True, slots=True)
class RowsPart:
    """The gradient of some rows of one parameter. ids: (n,) int64, ascending and unique; rows: (n, *row shape)."""

    slot: Slot
    ids: Tensor
    rows: Tensor


@dataclass(frozen=True, slots=True)
class StagedPush:
    """A complete push: its gradient and what the gate's one pass found out about it."""

    staged: Staged
    parts: Sequence[DensePart | RowsPart]
    nonfinite_parameter: str | None
    # L2 over all parameters, their sums of squares added in manifest order
    norm: float
    # what a device has to wait for before it reads them; of its own kind
    arrival: object = None

    @property
    def kind(self) -> frozenset[tuple[int, bool, torch.dtype]]:
        """What the kernels that step it are chosen by. What is of no elements takes none."""
        return frozenset(
            (part.slot.arena, True, part.rows.dtype)
            if isinstance(part, RowsPart)
            else (part.arena, False, part.gradient.dtype)
            for part in self.parts
            if (part.rows if isinstance(part, RowsPart) else part.gradient).numel()
        )

    @property
    def groups(self) -> list[int]:
        """The param groups that it touches. An arena is one group's, so any slot of a part tells."""
        return sorted({(p.slot if isinstance(p, RowsPart) else p.slots[0]).group for p in self.parts})

    @property
    def is_of_few(self) -> bool:
        """Whether it is of so few parameters that the event loop may look at each."""
        return len(self.staged.norms) <= INLINE_PARTS

    def bytes(self) -> int:
        """What its gradients take."""
        tensors = [part.rows if isinstance(part, RowsPart) else part.gradient for part in self.parts]
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def window(body_bytes: int) -> int:
    """What gRPC may hold of a body that nobody reads yet. One of up to INLINE_BYTES comes with its header."""
    return min(body_bytes, WINDOW_BYTES) if body_bytes > INLINE_BYTES else 0


def charge(body_bytes: int) -> int:
    """What a body takes of the budget: itself, and what is on its way to its place while it is read."""
    return body_bytes + (min(body_bytes, READING_BYTES) if body_bytes > INLINE_BYTES else 0)


@dataclass(eq=False, slots=True)
class _Claim:
    owner: str
    body_bytes: int
    granted: asyncio.Future[None]


class Budget:
    """The bytes that all pushes in flight may hold together, handed out in turn.

    A push's whole declared size is taken before its body is read, so a server never finds out half way that it has
    no room. Claims that have to wait are granted by whose owner's last grant is longest ago: a worker gets its turn
    before any other's second push, and a large push is not overtaken for ever by small ones. By the same order they
    are turned away when too many wait: the windows of unread streams count from the moment they are there.
    """

    def __init__(
        self,
        total_bytes: int,
        wait_s: float = 5.0,
        make: Callable[[int], NDArray[np.uint8]] | None = None,
    ) -> None:
        """`make` gives the memory that is handed out."""
        self.total_bytes = total_bytes
        self.used_bytes = 0
        self._wait_s = wait_s
        self._windows_bytes = 0  # of the claims that wait; in used_bytes too
        self._parts_bytes = 0
        self._waiting: list[_Claim] = []
        self._grants = itertools.count(1)
        self._last_grant: dict[str, int] = {}
        self._pool = BufferPool(min(total_bytes, KEPT_BYTES), make)

    def reserve(self, need_bytes: int) -> None:
        """Take `need_bytes` at once, or raise OverBudget with the time after which to ask again.

        OverCapacity for what would not fit if nothing else were in flight: asking again would not help.
        """
        self._require_possible(need_bytes)
        if self._waiting or need_bytes > self.total_bytes - self.used_bytes:
            raise self.over(need_bytes)
        self.used_bytes += need_bytes

    async def claim(self, owner: str, body_bytes: int) -> int:
        """Take what a body needs once it is `owner`'s turn; the bytes taken, for `release`.

        OverBudget when it does not come in time, or when others who have waited longer fill the queue.
        """
        self._require_possible(charge(body_bytes))
        claim = _Claim(owner, body_bytes, asyncio.get_running_loop().create_future())
        self._enter(claim)
        self._grant()
        try:
            async with asyncio.timeout(self._wait_s):
                await claim.granted
        except BaseException as error:
            if claim in self._waiting:
                self._leave(claim)
                self._grant()  # it may have been what the others waited behind
            elif claim.granted.done() and not claim.granted.cancelled() and claim.granted.exception() is None:
                self.release(charge(body_bytes))  # granted in the moment in which its caller went away
            if isinstance(error, TimeoutError):
                raise self.over(charge(body_bytes)) from error
            raise
        return charge(body_bytes)

    def reserve_for_parts(self, need_bytes: int) -> None:
        """The same for a header that comes in parts: who sends one may be nobody yet, so all have a share and no more."""
        if self._parts_bytes + need_bytes > PARTS_SHARE * self.total_bytes:
            raise self.over(need_bytes)
        self.reserve(need_bytes)
        self._parts_bytes += need_bytes

    def release_of_parts(self, bytes_taken: int) -> None:
        """Give back what was taken for one."""
        self._parts_bytes -= bytes_taken
        self.release(bytes_taken)

    def count(self, need_bytes: int) -> None:
        """Take `need_bytes` although there may be no room: what waits for them holds the room, and would for ever."""
        self.used_bytes += need_bytes

    def release(self, bytes_taken: int) -> None:
        """Give back what was taken."""
        self.used_bytes -= bytes_taken
        self._grant()

    def buffer(self, size_bytes: int) -> Tensor:
        """Memory for bytes that were taken; MemoryShort if the machine has none."""
        try:
            taken = self._pool.take(size_bytes)
        except (MemoryError, RuntimeError):  # torch's word for no memory
            taken = self._taken_at_last(size_bytes)
        # what is kept for later counts too
        self._pool.keep_at_most(self.total_bytes - self.used_bytes)
        return taken

    def _taken_at_last(self, size_bytes: int) -> Tensor:
        """The same once nothing is kept for later, by the pool or by cycles of what was refused."""
        self._pool.keep_at_most(0)
        garbage.collect()
        try:
            return self._pool.take(size_bytes)
        except (MemoryError, RuntimeError) as error:
            raise self.short(size_bytes) from error

    def _enter(self, claim: _Claim) -> None:
        self._waiting.append(claim)
        self._windows_bytes += window(claim.body_bytes)
        self.used_bytes += window(claim.body_bytes)

    def _leave(self, claim: _Claim) -> None:
        self._waiting.remove(claim)
        self._windows_bytes -= window(claim.body_bytes)
        self.used_bytes -= window(claim.body_bytes)

    def _grant(self) -> None:
        """Grant what fits, in turn; then turn away those whose turn is last, until the rest may wait."""
        while self._waiting:
            claim = min(self._waiting, key=self._turn)
            others_windows = self._windows_bytes - window(claim.body_bytes)
            held = self.used_bytes - self._windows_bytes
            if claim.granted.done():  # cancelled, and its caller has yet to notice
                self._leave(claim)
            elif held + others_windows + charge(claim.body_bytes) <= self.total_bytes:
                self._leave(claim)
                self.used_bytes += charge(claim.body_bytes)
                self._last_grant.pop(claim.owner, None)  # so that the dict is in the order of grants
                self._last_grant[claim.owner] = next(self._grants)
                if len(self._last_grant) > OWNERS_REMEMBERED:
                    del self._last_grant[next(iter(self._last_grant))]
                claim.granted.set_result(None)
            elif self._crowded(held, others_windows):
                last = max(reversed(self._waiting), key=self._turn)
                self._leave(last)
                if not last.granted.done():
                    last.granted.set_exception(self.over(charge(last.body_bytes)))
            else:
                return

    def _crowded(self, held_bytes: int, others_windows_bytes: int) -> bool:
        """Whether some must be turned away: too many wait, or there is no room for anything but their windows."""
        share = others_windows_bytes > WAITING_SHARE * self.total_bytes
        return len(self._waiting) > MAX_WAITING or share or held_bytes == 0

    def _turn(self, claim: _Claim) -> int:
        return self._last_grant.get(claim.owner, 0)

    def _require_possible(self, need_bytes: int) -> None:
        if need_bytes > self.total_bytes:
            raise OverCapacity(
                problem=f"{need_bytes} bytes at once are more than the {self.total_bytes} set aside for staging",
                setting="staging-bytes",
            )

    def short(self, need_bytes: int) -> MemoryShort:
        """What a caller is told for whom there is room, and no memory."""
        return MemoryShort(need=need_bytes, retry_after_s=RETRY_AFTER_S)

    def over(self, need_bytes: int) -> OverBudget:
        """What a caller is told for whom there is no room now."""
        return OverBudget(
            need=need_bytes,
            free=max(0, self.total_bytes - self.used_bytes),
            budget=self.total_bytes,
            setting="staging-bytes",
            retry_after_s=min(RETRY_AFTER_S * (1 + len(self._waiting)), LONGEST_RETRY_AFTER_S),
        )
