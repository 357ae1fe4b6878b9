"""Sends answers over gRPC, and drops readers that have stopped.

gRPC keeps a message until the reader has made room for it. If the reader has stopped, gRPC would keep the message for
ever, and with it everything that the rest of the answer is made of. So a reader that takes less than PROGRESS_BYTES in
`stall_s` is dropped, as a stream that brings no more is. What is kept for it is released, and its connection is
closed: only that makes gRPC release the message, too. gRPC does not say which Unix socket a call uses. There only the
call ends, and the message stays with the connection; a process that reaches that socket is of this server's user.

How much of a message has gone cannot be seen from outside gRPC. If a message takes long, the kernel's count of the
connection's acknowledged bytes tells whether it moves. A message of several PROGRESS_BYTES has as many `stall_s` at
most.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

import grpc

from pushstep.proto.errors import ReaderStalled

from ..counters.server_counts import ServerCounts, Way
from ..staging.read_budget import ReadBudget
from .connections import Place, connections_to, place_of, socket_of
from .timed_messages import PROGRESS_BYTES

log = logging.getLogger("pushstep.grpc")
Context = grpc.aio.ServicerContext[Any, Any]
# The longest interval between two checks of the readers.
LONGEST_LOOK_S: Final = 1.0
# An answer of so few bytes is a receipt, which must not wait for room that stopped readers hold.
UNCOUNTED_BYTES: Final = 4 << 10
# tcpi_bytes_acked of Linux's struct tcp_info.
_BYTES_ACKED: Final = struct.Struct("=120xQ")


class Reader:
    """One call's answer. It hands messages to gRPC one at a time, and counts each while gRPC has it."""

    __slots__ = (
        "_context",
        "_counted_bytes",
        "_is_open",
        "_readers",
        "_rested_s",
        "_seen",
        "_size_bytes",
        "_socket",
        "_task",
        "_way",
        "_window_bytes",
        "_window_s",
        "begun_s",
        "is_dropped",
    )

    def __init__(self, readers: Readers, context: Context) -> None:
        self._readers = readers
        self._context = context
        self._task = asyncio.current_task()
        # the window in which PROGRESS_BYTES must go: its start, and the bytes that have gone in it
        self._window_s = self._rested_s = self.begun_s = time.monotonic()
        self._window_bytes = self._size_bytes = self._counted_bytes = 0
        # its connection, once that was found, and the acknowledged bytes when it last made progress
        self._socket: socket.socket | None = None
        self._seen = 0
        self._is_open = False
        self.is_dropped = False
        self._way = readers.counts.way_of(context.peer())

    def counted(self, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The caller's messages, whose bytes are counted as they come."""
        return _Counted(messages, self._way)

    async def take(self, message: bytes) -> None:
        """Hand over a message and return when gRPC has room for the next. OverBudget, ReaderStalled."""
        size = len(message)
        if size > UNCOUNTED_BYTES:
            await self._count(size)
        self.begin(size)
        try:
            if not self._is_open:
                await self._open()
            await self._context.write(message)
        except asyncio.CancelledError:
            # tell the reader why, unless its connection was closed: then nobody is left to be told
            if (
                self.is_dropped
                and self._socket is None
                and self._task is not None
                and not self._task.uncancel()
            ):
                raise ReaderStalled(seconds=self._readers.stall_s) from None
            raise
        except grpc.aio.InternalError:  # gRPC raises this for a call that has ended meanwhile
            raise asyncio.CancelledError from None
        finally:
            self.end()
            self._way.sent_bytes += size
            self._window_bytes += size
            if self._window_bytes >= PROGRESS_BYTES:
                self._window_s, self._window_bytes = self._rested_s, 0

    async def _open(self) -> None:
        """Send the initial metadata, before the first message and to the end, even if the call is cut meanwhile.

        gRPC notes that they are sent once it hears so. A call that is cut before that, also in a first message that
        carries them, could not be ended with a status: its reader would wait for ever.
        """
        opening = asyncio.ensure_future(self._context.send_initial_metadata(()))
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            await asyncio.wait([opening])
            opening.exception()  # nobody else asks for it
            raise
        self._is_open = True

    def begin(self, size_bytes: int) -> None:
        """Start to watch the reader: `size_bytes` are on their way to it."""
        self.begun_s = time.monotonic()
        # the reader did not cause the pause since the last message
        self._window_s += self.begun_s - self._rested_s
        self._size_bytes = size_bytes
        self._readers.watch(self)

    def end(self, _: object = None) -> None:
        """Stop watching: the message has gone, or never will. Its budget bytes are given back."""
        self._readers.forget(self)
        self._rested_s = time.monotonic()
        self._readers.budget.give_back(self._counted_bytes)
        self._counted_bytes = 0
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def last(self, message: bytes = b"") -> None:
        """Watch the reader until gRPC has ended the call, which it does by itself.

        `message`: the answer's only message, which gRPC sends then. OverBudget if there is no room for a large one.
        """
        self._way.sent_bytes += len(message)
        if len(message) > PROGRESS_BYTES:
            await self._count(len(message))
        if self._task is not None:
            self.begin(len(message))
            self._task.add_done_callback(self.end)

    async def _count(self, size_bytes: int) -> None:
        need_bytes = 2 * size_bytes  # the message, and gRPC's copy of it
        if not self._readers.budget.take(need_bytes):
            await self._readers.budget.claim(need_bytes)
        self._counted_bytes = need_bytes

    # Called by the timer of Readers.

    @property
    def place(self) -> Place | None:
        """The peer of its connection; None if it cannot be told, or if the connection was found already."""
        return place_of(self._context.peer()) if self._socket is None else None

    def look_at(self, connection: socket.socket) -> None:
        """Use this connection from now on to see what has arrived. `end` closes it."""
        self._socket, self._seen = connection, acked_bytes(connection)

    def has_stalled(self, now_s: float) -> bool:
        """True if the reader has taken too little for too long."""
        if self._socket is not None:
            acked = acked_bytes(self._socket)
            if acked - self._seen >= PROGRESS_BYTES:
                self._seen, self._window_s, self._window_bytes = acked, now_s, 0
        stall_s = self._readers.stall_s
        longest_s = stall_s * max(1, -(-self._size_bytes // PROGRESS_BYTES))
        return now_s - self._window_s > stall_s or now_s - self.begun_s > longest_s

    def drop(self) -> None:
        """End the call, and its connection if that was found."""
        self.is_dropped = True
        log.info("a reader at %s took nothing for %g s: dropped", self._context.peer(), self._readers.stall_s)
        connection = self._socket
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if self._task is not None:
            self._task.cancel()


class _Counted:
    """A call's messages, counted on their way in."""

    __slots__ = ("_messages", "_way")

    def __init__(self, messages: AsyncIterator[bytes], way: Way) -> None:
        self._messages = messages
        self._way = way

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        message = await self._messages.__anext__()
        self._way.received_bytes += len(message)
        return message


class Readers:
    """The readers that something is on its way to, and the timer that checks them. On the event loop only."""

    def __init__(self, budget: ReadBudget, stall_s: float, counts: ServerCounts) -> None:
        self.budget = budget
        self.counts = counts
        self.stall_s = stall_s
        self._look_s = min(stall_s / 8, LONGEST_LOOK_S)
        self._waited_for: set[Reader] = set()
        self._clock: asyncio.TimerHandle | None = None

    def watch(self, reader: Reader) -> None:
        """Check a reader from time to time."""
        self._waited_for.add(reader)
        if self._clock is None:
            self._clock = asyncio.get_running_loop().call_later(self._look_s, self._look)

    def forget(self, reader: Reader) -> None:
        """Stop checking a reader."""
        self._waited_for.discard(reader)

    def _look(self) -> None:
        self._clock = None
        now_s = time.monotonic()
        slow = [reader for reader in self._waited_for if now_s - reader.begun_s > self._look_s]
        self._find_connections(slow)
        for reader in slow:
            if reader.has_stalled(now_s):
                reader.drop()
        if self._waited_for:
            self._clock = asyncio.get_running_loop().call_later(self._look_s, self._look)

    def _find_connections(self, readers: Iterable[Reader]) -> None:
        wanted: dict[Place, list[Reader]] = {}
        for reader in readers:
            if (place := reader.place) is not None:
                wanted.setdefault(place, []).append(reader)
        if wanted:
            for place, connection in connections_to(wanted):
                for reader in wanted[place]:
                    reader.look_at(socket_of(connection.fileno()))
                connection.close()


def acked_bytes(connection: socket.socket) -> int:
    """The bytes that the peer of a TCP connection has acknowledged; 0 if the system does not tell."""
    try:
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
        return int(_BYTES_ACKED.unpack(told)[0])
    except (OSError, AttributeError, struct.error):
        return 0
