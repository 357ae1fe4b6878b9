"""The bytes that are held for readers: counted before they are made, apart from those of pushes.

A reader takes its answer when it likes, so what waits for it must not take room that a push needs. This budget counts
answers made for one reader (rows), messages on their way, versions of parameters that slow readers hold, and the answers
of REST. A reader that gets no room in time is told when to retry.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from dataclasses import dataclass
from typing import Final

from pushstep.proto.errors import OverBudget, OverCapacity

SETTING: Final = "read-bytes"
# Retry-After per queued claim, so a longer queue spreads retries.
RETRY_AFTER_S: Final = 0.1
LONGEST_RETRY_AFTER_S: Final = 10.0
MAX_WAITING: Final = 1024


@dataclass(eq=False, slots=True)
class _Claim:
    need_bytes: int
    granted: asyncio.Future[None]


class ReadBudget:
    """The readers' budget. Claims are granted in the order in which they come.

    `take` and `give_back`: in any thread.
    """

    def __init__(self, total_bytes: int, wait_s: float = 2.5) -> None:
        self.total_bytes = total_bytes
        self.used_bytes = 0
        self.wait_s = wait_s
        # reentrant: a finalizer calls `give_back`, in any thread, at any allocation, also in a thread that holds the lock
        self._lock = threading.RLock()
        self._waiting: deque[_Claim] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    def take(self, need_bytes: int) -> bool:
        """Take so many bytes at once. False if they are not free."""
        with self._lock:
            if need_bytes > self.total_bytes - self.used_bytes:
                return False
            self.used_bytes += need_bytes
            return True

    def give_back(self, taken_bytes: int) -> None:
        """Give back what was taken."""
        with self._lock:
            self.used_bytes -= taken_bytes
        if self._waiting and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it those that waited
                self._loop.call_soon_threadsafe(self._grant)

    async def claim(self, need_bytes: int) -> None:
        """Take so many bytes when they are free.

        OverBudget if that is not soon, OverCapacity if it can never be.
        """
        if need_bytes > self.total_bytes:
            raise self.too_large(need_bytes)
        if not self._waiting and self.take(need_bytes):
            return
        if len(self._waiting) >= MAX_WAITING:
            raise self.over(need_bytes)
        self._loop = asyncio.get_running_loop()
        claim = _Claim(need_bytes, self._loop.create_future())
        self._waiting.append(claim)
        self._grant()
        try:
            async with asyncio.timeout(self.wait_s):
                await claim.granted
        except BaseException as error:
            if claim in self._waiting:
                self._waiting.remove(claim)
                self._grant()  # others may have waited behind it
            elif claim.granted.done() and not claim.granted.cancelled():
                self.give_back(need_bytes)  # granted just as its caller went away
            if isinstance(error, TimeoutError):
                raise self.over(need_bytes) from error
            raise

    def too_large(self, need_bytes: int) -> OverCapacity:
        """The error for a reader whose answer can never fit."""
        return OverCapacity(
            problem=f"{need_bytes} bytes for one reader are more than the {self.total_bytes} for all",
            setting=SETTING,
        )

    def over(self, need_bytes: int) -> OverBudget:
        """The error for a reader for whom there is no room now."""
        return OverBudget(
            need=need_bytes,
            free=max(0, self.total_bytes - self.used_bytes),
            budget=self.total_bytes,
            setting=SETTING,
            retry_after_s=min(RETRY_AFTER_S * (1 + len(self._waiting)), LONGEST_RETRY_AFTER_S),
        )

    def _grant(self) -> None:
        while self._waiting:
            claim = self._waiting[0]
            if not claim.granted.done():  # else cancelled, and its caller has not run yet
                if not self.take(claim.need_bytes):
                    return
                claim.granted.set_result(None)
            self._waiting.popleft()
