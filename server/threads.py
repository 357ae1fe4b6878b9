"""Threads for what the event loop must not do itself, apart by what they are for.

Each kind of work has threads of its own, so however much there is of one kind, the others find theirs free: who reads
snapshots over REST does not keep pushes waiting, and who sends huge manifests delays only manifests. Nothing uses
asyncio's own threads, which all kinds would share.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, ParamSpec, TypeVar

from pushstep.proto.errors import Busy

P = ParamSpec("P")
T = TypeVar("T")

RETRY_AFTER_S: Final = 1.0
_CORES: Final = os.cpu_count() or 1


class Threads:
    """So many threads, and at most so many calls that wait for one of them."""

    def __init__(self, name: str, count: int, most_waiting: int | None = None) -> None:
        """`most_waiting` None: whoever calls is counted elsewhere."""
        self.name = name
        self._pool = ThreadPoolExecutor(count, name)
        self._most = None if most_waiting is None else count + most_waiting
        self._unfinished = 0

    def start(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Have a thread do the work. Busy if too many wait already; nothing is kept of the call then."""
        if self._most is not None and self._unfinished >= self._most:
            raise Busy(what=self.name, waiting=self._unfinished, retry_after_s=RETRY_AFTER_S)
        self._unfinished += 1
        begun = asyncio.get_running_loop().run_in_executor(self._pool, lambda: work(*args, **kwargs))
        begun.add_done_callback(self._finished)
        return begun

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The work's result, or what it raises."""
        return await self.start(work, *args, **kwargs)

    def _finished(self, _: asyncio.Future[Any]) -> None:
        self._unfinished -= 1


# Bodies of pushes and uploads: placed, inspected, added up. The budget bounds how many there are.
PUSHES: Final = Threads("pushes", min(32, _CORES + 4))
# Requests that are large by themselves: parsed, checked, laid out. One at a time, since most of it is Python, and a
# second thread of that kind would only take turns with the event loop.
REQUESTS: Final = Threads("requests", 1, most_waiting=32)
# What makes a model outlive the process. Each model's writes wait for one another.
DISK: Final = Threads("disk", 4)
# Frames of whole states, made for workers as they are sent.
PULLS: Final = Threads("pulls", 2)
# What readers ask for over REST: snapshots that are verified, checkpoints, whole states. A reader beyond these comes again.
READS: Final = Threads("reads", 2, most_waiting=16)
