"""Threads for work that the event loop must not do itself, with a pool for each kind of work.

Each kind of work has threads of its own, so much work of one kind does not delay the others. Readers of snapshots over
REST do not delay pushes, and senders of huge manifests delay only manifests. Nothing uses asyncio's own threads, which
all kinds would share.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar

from pushstep.proto.errors import Busy

P = ParamSpec("P")
T = TypeVar("T")

RETRY_AFTER_S: Final = 1.0
_CORES: Final = os.cpu_count() or 1
# Large requests may take BURST_S at a stretch, and then this share of one core's time.
SHARE_OF_REQUESTS: Final = 0.25
BURST_S: Final = 30.0
# REST reads get this share of all cores, and scrapes of metrics this share of one.
SHARE_OF_READS: Final = 0.25
METRICS_BURST_S: Final = 5.0


class Share:
    """How much of its time a thread may work: `share` of it in the long run, and `burst_s` at a stretch.

    Python runs one thread at a time, so a thread that always works makes the event loop wait at every turn.
    """

    def __init__(self, share: float, burst_s: float) -> None:
        self._share = share
        self._burst_s = burst_s
        self._credit_s = burst_s
        self._seen_s = time.monotonic()
        self.ended = threading.Event()

    def run(self, work: Callable[[], T]) -> T:
        """Do the work and return its result. Rests first if too much was done lately."""
        self._earn()
        if self._credit_s < 0:
            self.ended.wait(-self._credit_s / self._share)
            self._earn()
        begun_s = time.monotonic()
        try:
            return work()
        finally:
            self._credit_s -= time.monotonic() - begun_s

    def _earn(self) -> None:
        now_s = time.monotonic()
        self._credit_s = min(self._burst_s, self._credit_s + (now_s - self._seen_s) * self._share)
        self._seen_s = now_s


class Threads:
    """A pool of `count` threads, with at most `most_waiting` calls that wait for one of them."""

    def __init__(
        self, name: str, count: int, most_waiting: int | None = None, share: Share | None = None
    ) -> None:
        """`most_waiting` None: no limit here, because something else limits the callers.

        `share`: how much of their time the threads may work.
        """
        self.name = name
        self.count = count
        self.most_waiting = most_waiting
        self._pool = ThreadPoolExecutor(count, name)
        self._most = None if most_waiting is None else count + most_waiting
        self._share = share
        self._unfinished = 0

    def start(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Have a thread do the work. Busy if too many calls wait already."""
        if self._most is not None and self._unfinished >= self._most:
            raise Busy(what=f"calls for {self.name}", waiting=self._unfinished, retry_after_s=RETRY_AFTER_S)
        self._unfinished += 1
        work_of_it = partial(work, *args, **kwargs)
        if self._share is not None:
            work_of_it = partial(self._share.run, work_of_it)
        begun = asyncio.get_running_loop().run_in_executor(self._pool, work_of_it)
        begun.add_done_callback(self._finished)
        return begun

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The work's result, or what it raises."""
        return await self.start(work, *args, **kwargs)

    async def run_unless(self, small: bool, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Like `run`, but in the calling thread if the work is small."""
        return work(*args, **kwargs) if small else await self.run(work, *args, **kwargs)

    def let_go(self) -> None:
        """End all pauses: the server stops, and its process waits for its threads."""
        if self._share is not None:
            self._share.ended.set()

    def _finished(self, _: asyncio.Future[Any]) -> None:
        self._unfinished -= 1


# Bodies of pushes and uploads: placed, inspected, added up. The budget bounds how many there are.
PUSHES: Final = Threads("pushes", min(32, _CORES + 4))
# Large requests: parsed, checked, laid out. One at a time, because most of the work is Python, and a second thread would
# only take turns with the event loop. A manifest of a million parameters takes some 10 s.
REQUESTS: Final = Threads("requests", 1, most_waiting=32, share=Share(SHARE_OF_REQUESTS, BURST_S))
# Reads and writes of the data folder. Each model's writes wait for one another.
DISK: Final = Threads("disk", 4)
# Reads and writes of a store of snapshots that is elsewhere, which may be slow, or may not answer.
STORE: Final = Threads("store", 8, most_waiting=64)
# Snapshots that are written, and verified, beside training: few at once, which rest most of the time.
SNAPSHOTS: Final = Threads("snapshots", 2)
# Frames of whole states, made for workers as they are sent.
PULLS: Final = Threads("pulls", 2)
# What readers ask for over REST: verified snapshots, checkpoints, whole states. Each computes all the time, so they have
# a quarter of the cores. If 16 readers wait, the next gets Busy.
READS: Final = Threads("reads", max(1, int(SHARE_OF_READS * _CORES)), most_waiting=16)
# Scrapes of /metrics, most of whose work is Python: a quarter of a core, however often they are asked for. A scrape
# of 10 models takes 20 ms, and one of 100 models with 10,000 workers each takes 2.4 s.
METRICS: Final = Threads("metrics", 1, most_waiting=8, share=Share(SHARE_OF_READS, METRICS_BURST_S))
# Chunks of files that are sent over REST. The limit on HTTP requests bounds the calls: each has one read at a time.
DOWNLOADS: Final = Threads("downloads", 2)
