"""The server, on an event loop that tells of each callback that keeps it for longer than asyncio's bound: 100 ms.

asyncio's debug mode measures the clock, and so what other processes do. This measures what the loop's own thread
computes, without the garbage of others that it happens to collect; what waits there instead (the disk, a lock) is told of
after a second.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from asyncio import format_helpers  # type: ignore[attr-defined]
from typing import Any

SLOW_S = 0.1
BLOCKED_S = 1.0
TOLD = "the event loop was kept for"
log = logging.getLogger("watched")


class Collected(threading.local):
    """How long this thread has collected garbage."""

    began_s = 0.0
    total_s = 0.0

    def __call__(self, phase: str, info: object) -> None:
        """What `gc.callbacks` calls."""
        if phase == "start":
            self.began_s = time.thread_time()
        else:
            self.total_s += time.thread_time() - self.began_s


def watch() -> None:
    """Have every callback of every loop in this process measured."""
    run, collected = asyncio.Handle._run, Collected()
    gc.callbacks.append(collected)

    def watched(handle: Any) -> None:
        computed_s, began_s = time.thread_time() - collected.total_s, time.monotonic()
        run(handle)
        computed_s, took_s = (
            time.thread_time() - collected.total_s - computed_s,
            time.monotonic() - began_s,
        )
        if computed_s > SLOW_S or took_s > BLOCKED_S:
            what = format_helpers._format_callback_source(handle._callback or "a cancelled one", ())
            log.warning("%s %.3f s (%.3f s of work) by %s", TOLD, took_s, computed_s, what)

    asyncio.Handle._run = watched  # type: ignore[method-assign]


if __name__ == "__main__":
    watch()
    from pushstep.server.__main__ import main

    main()
