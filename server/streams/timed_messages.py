"""A client's messages, with a limit on every wait.

A stream that brings less than PROGRESS_BYTES in `stall_s` has stalled. A stream that crawls holds its staging just
like one that has stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from pushstep.proto.errors import StreamStalled

# 6.5 KB/s at the default `stall_s` of 10 s: less than any link that is fit for training.
PROGRESS_BYTES: Final = 64 << 10


class TimedMessages:
    """One stream's messages, as raw bytes from gRPC."""

    def __init__(self, messages: AsyncIterator[bytes], stall_s: float) -> None:
        self._messages = messages
        self._stall_s = stall_s
        # when PROGRESS_BYTES must have come (0: as if a window began with the next wait), and the bytes that have come
        self._due_s = 0.0
        self._came_bytes = 0

    async def next(self) -> bytes | None:
        """The next message, or None at the stream's end. Raises StreamStalled."""
        self._due_s = self._due_s or asyncio.get_running_loop().time() + self._stall_s
        try:
            async with asyncio.timeout_at(self._due_s):
                message = await anext(self._messages, None)
        except TimeoutError as error:
            raise StreamStalled(seconds=self._stall_s) from error
        self._came_bytes += len(message or b"")
        if self._came_bytes >= PROGRESS_BYTES:
            self.begin_window()
        return message

    def begin_window(self) -> None:
        """Start a new window with the next wait: enough bytes have come, or the client did not cause the last one."""
        self._due_s = 0.0
        self._came_bytes = 0
