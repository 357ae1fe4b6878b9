"""The bytes that pushes in flight may hold together, and the memory for them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pushstep.proto.errors import MemoryShort, OverBudget, OverCapacity
from pushstep.proto.wire.buffers import BufferPool
from pushstep.proto.wire.frames import CHUNK_BYTES

from ..process import garbage

# Retry-After per queued claim, so a longer queue spreads retries.
RETRY_AFTER_S: Final = 0.1
LONGEST_RETRY_AFTER_S: Final = 10.0
# A stream that waits holds its gRPC window until it ends. These bound how many may wait, and their share of the budget.
MAX_WAITING: Final = 256
WAITING_SHARE: Final = 0.5
OWNERS_REMEMBERED: Final = 10_000
# The share of the budget for manifests and headers that come in parts. The rest is always left for pushes.
PARTS_SHARE: Final = 0.25
# A body of up to this size comes with its header.
HEADED_BYTES: Final = 64 << 10
# gRPC receives this much of a stream before anyone reads it (server/service.py sets it).
WINDOW_BYTES: Final = 512 << 10
# A stream being read: one chunk being copied, one received, one coming in.
READING_BYTES: Final = 3 * CHUNK_BYTES
# Memory of finished pushes that is kept for the next ones, within the budget.
KEPT_BYTES: Final = 1 << 30


def window(body_bytes: int) -> int:
    """Bytes that gRPC may hold of an unread body; 0 up to HEADED_BYTES."""
    return min(body_bytes, WINDOW_BYTES) if body_bytes > HEADED_BYTES else 0


def charge(body_bytes: int) -> int:
    """Bytes that a body takes of the budget: itself, and what is on its way to its place while it is read."""
    return body_bytes + (min(body_bytes, READING_BYTES) if body_bytes > HEADED_BYTES else 0)


@dataclass(eq=False, slots=True)
class _Claim:
    owner: str
    body_bytes: int
    granted: asyncio.Future[None]


class Budget:
    """The bytes that all pushes in flight may hold together, granted in turn.

    A push's whole declared size is taken before its body is read, so a server never finds half way that it has no room.
    Of the claims that wait, the one whose owner's last grant is the longest ago comes first. So a worker gets its turn
    before any other's second push, and small pushes do not overtake a large one for ever. When too many wait, the claims
    that come last are turned away: the windows of unread streams count as soon as they exist.
    """

    def __init__(
        self,
        total_bytes: int,
        wait_s: float = 5.0,
        make: Callable[[int], NDArray[np.uint8]] | None = None,
    ) -> None:
        """`make` allocates the memory that is handed out. `wait_s`: how long a claim waits for its turn."""
        self.total_bytes = total_bytes
        self.used_bytes = 0
        self._wait_s = wait_s
        self._windows_bytes = 0  # of the claims that wait; part of used_bytes
        self._parts_bytes = 0
        self._waiting: list[_Claim] = []
        self._grants = itertools.count(1)
        self._last_grant: dict[str, int] = {}
        self._pool = BufferPool(min(total_bytes, KEPT_BYTES), make)

    def reserve(self, need_bytes: int) -> None:
        """Take `need_bytes` at once, or raise OverBudget with the time after which to retry.

        OverCapacity if they would not fit even with nothing else in flight: a retry would not help.
        """
        self._require_possible(need_bytes)
        if self._waiting or need_bytes > self.total_bytes - self.used_bytes:
            raise self.over(need_bytes)
        self.used_bytes += need_bytes

    async def claim(self, owner: str, body_bytes: int) -> int:
        """Take what a body needs when it is `owner`'s turn. Returns the bytes taken, for `release`.

        OverBudget if its turn does not come in time, or if claims that come before it fill the queue. OverCapacity if it
        can never fit.
        """
        need_bytes = charge(body_bytes)
        self._require_possible(need_bytes)
        if not self._waiting and need_bytes <= self.total_bytes - self.used_bytes:
            self._take(owner, need_bytes)
            return need_bytes
        claim = _Claim(owner, body_bytes, asyncio.get_running_loop().create_future())
        self._enter(claim)
        self._grant()
        try:
            async with asyncio.timeout(self._wait_s):
                await claim.granted
        except BaseException as error:
            if claim in self._waiting:
                self._leave(claim)
                self._grant()  # others may have waited behind it
            elif claim.granted.done() and not claim.granted.cancelled() and claim.granted.exception() is None:
                self.release(need_bytes)  # granted just as its caller went away
            if isinstance(error, TimeoutError):
                raise self.over(need_bytes) from error
            raise
        return need_bytes

    def reserve_for_parts(self, need_bytes: int) -> None:
        """Like `reserve`, for a header that comes in parts.

        Its sender may be unknown, so all share only PARTS_SHARE.
        """
        if self._parts_bytes + need_bytes > PARTS_SHARE * self.total_bytes:
            raise self.over(need_bytes)
        self.reserve(need_bytes)
        self._parts_bytes += need_bytes

    def release_of_parts(self, bytes_taken: int) -> None:
        """Give back what `reserve_for_parts` took."""
        self._parts_bytes -= bytes_taken
        self.release(bytes_taken)

    def count(self, need_bytes: int) -> None:
        """Take `need_bytes` even without room: the pushes that hold the room wait for these bytes."""
        self.used_bytes += need_bytes

    def release(self, bytes_taken: int) -> None:
        """Give back what was taken."""
        self.used_bytes -= bytes_taken
        self._grant()

    def rest(self) -> bool:
        """Free what is kept for the next pushes if none has come since the last call. True if some was freed."""
        return self._pool.rest()

    def buffer(self, size_bytes: int) -> Tensor:
        """Memory for bytes that were taken. MemoryShort if the machine has none."""
        try:
            taken = self._pool.take(size_bytes)
        except (MemoryError, RuntimeError):  # torch raises RuntimeError if there is no memory
            taken = self._taken_at_last(size_bytes)
        # memory that is kept for later pushes must fit in the budget too
        self._pool.keep_at_most(self.total_bytes - self.used_bytes)
        return taken

    def _taken_at_last(self, size_bytes: int) -> Tensor:
        """The same, after the pool has freed what it keeps and refused pushes in cycles are collected."""
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
        """Grant what fits, in turn. Then turn away the claims whose turn is last, until the rest may wait."""
        while self._waiting:
            claim = min(self._waiting, key=self._turn)
            others_windows = self._windows_bytes - window(claim.body_bytes)
            held = self.used_bytes - self._windows_bytes
            if claim.granted.done():  # cancelled, and its caller has not run yet
                self._leave(claim)
            elif held + others_windows + charge(claim.body_bytes) <= self.total_bytes:
                self._leave(claim)
                self._take(claim.owner, charge(claim.body_bytes))
                claim.granted.set_result(None)
            elif self._crowded(held, others_windows):
                last = max(reversed(self._waiting), key=self._turn)
                self._leave(last)
                if not last.granted.done():
                    last.granted.set_exception(self.over(charge(last.body_bytes)))
            else:
                return

    def _take(self, owner: str, need_bytes: int) -> None:
        self.used_bytes += need_bytes
        self._last_grant.pop(owner, None)  # or the dict would not be in the order of grants
        self._last_grant[owner] = next(self._grants)
        if len(self._last_grant) > OWNERS_REMEMBERED:
            del self._last_grant[next(iter(self._last_grant))]

    def _crowded(self, held_bytes: int, others_windows_bytes: int) -> bool:
        """True if claims must be turned away: too many wait, or their windows take too much of the budget."""
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
        """The error for a caller who has room in the budget while the machine has no memory."""
        return MemoryShort(need=need_bytes, retry_after_s=RETRY_AFTER_S)

    def over(self, need_bytes: int) -> OverBudget:
        """The error for a caller for whom there is no room now."""
        return OverBudget(
            need=need_bytes,
            free=max(0, self.total_bytes - self.used_bytes),
            budget=self.total_bytes,
            setting="staging-bytes",
            retry_after_s=min(RETRY_AFTER_S * (1 + len(self._waiting)), LONGEST_RETRY_AFTER_S),
        )
