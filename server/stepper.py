"""The one writer of a model: a thread that does, one after the other, everything that touches its arenas.

Decisions are made on the event loop, in the order in which they are submitted here; that order is the model's
history. The thread runs kernels and copies, which let go of the GIL, so the loop never waits for one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Stepper:
    """First in, first out, one at a time."""

    def __init__(self, model: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"stepper-{model}")

    def submit(self, job: Callable[[], T]) -> asyncio.Future[T]:
        """Queue a job behind all earlier ones. Its result, or what it raised, comes with the future."""
        return asyncio.get_running_loop().run_in_executor(self._thread, job)

    async def close(self) -> None:
        """Let the queue run empty and end the thread."""
        await asyncio.to_thread(self._thread.shutdown)
