"""Who is being sent an answer over gRPC, and whether it takes it.

A message is handed to gRPC, which keeps it until the reader has made room: of a reader that has stopped, for ever, and with
it everything that the rest of the answer is made of. So a reader that takes less than PROGRESS_BYTES in `stall_s` is
dropped, as a stream that brings no more is; what is kept for it is let go of, and its connection ends: only that has
gRPC let go of the message, too. (Of a Unix socket gRPC does not say which it is. There the call ends, and the message
stays with the connection: whoever reaches that socket is this server's user.)

What of a message has gone cannot be seen from outside of gRPC. Of one that takes long, the connection's own count of what has
arrived tells whether it moves; a message of several PROGRESS_BYTES has as many `stall_s` at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from collections.abc import Iterable
from typing import Any, Final

import grpc

from pushstep.proto.errors import ReaderStalled

from .connections import Place, connections_to, place_of, socket_of
from .read_budget import ReadBudget
from .timed_messages import PROGRESS_BYTES

log = logging.getLogger("pushstep.grpc")
Context = grpc.aio.ServicerContext[Any, Any]
# How often it is looked at who is being waited for.
LONGEST_LOOK_S: Final = 1.0
# tcpi_bytes_acked of Linux's struct tcp_info.
_BYTES_ACKED: Final = struct.Struct("=120xQ")


class Reader:
    """One call's answer: messages are handed to gRPC one after the other, each counted while gRPC has it."""

    __slots__ = (
        "_context",
        "_counted_bytes",
        "_readers",
        "_rested_s",
        "_seen",
        "_size_bytes",
        "_socket",
        "_task",
        "_window_bytes",
        "_window_s",
        "begun_s",
        "is_dropped",
    )

    def __init__(self, readers: Readers, context: Context) -> None:
        self._readers = readers
        self._context = context
        self._task = asyncio.current_task()
        # since when, and how much of, less than PROGRESS_BYTES has gone
        self._window_s = self._rested_s = self.begun_s = time.monotonic()
        self._window_bytes = self._size_bytes = self._counted_bytes = 0
        # its connection, once it was looked for, and how much of that had arrived
        self._socket: socket.socket | None = None
        self._seen = 0
        self.is_dropped = False

    async def take(self, message: bytes) -> None:
        """Hand over a message; returns when gRPC has room for the next. OverBudget, ReaderStalled."""
        size = len(message)
        await self._count(size)
        self.begin(size)
        try:
            await self._context.write(message)
        except asyncio.CancelledError:
            # where its connection ended nobody is left to be told
            if (
                self.is_dropped
                and self._socket is None
                and self._task is not None
                and not self._task.uncancel()
            ):
                raise ReaderStalled(seconds=self._readers.stall_s) from None
            raise
        except grpc.aio.InternalError:  # gRPC's word for a call that has ended meanwhile
            raise asyncio.CancelledError from None
        finally:
            self.end()
            self._window_bytes += size
            if self._window_bytes >= PROGRESS_BYTES:
                self._window_s, self._window_bytes = self._rested_s, 0

    def begin(self, size_bytes: int) -> None:
        """Something is on its way, and its reader is waited for."""
        self.begun_s = time.monotonic()
        self._window_s += self.begun_s - self._rested_s  # the time in between was ours
        self._size_bytes = size_bytes
        self._readers.watch(self)

    def end(self, _: object = None) -> None:
        """It has gone, or never will."""
        self._readers.forget(self)
        self._rested_s = time.monotonic()
        self._readers.budget.give_back(self._counted_bytes)
        self._counted_bytes = 0
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def last(self, message: bytes = b"") -> None:
        """gRPC ends the call by itself, with this message if it is the only one: watched until that has gone."""
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

    # What the readers' clock asks.

    @property
    def place(self) -> Place | None:
        """The other end of its connection; None if that cannot be told, or is known to be looked at."""
        return place_of(self._context.peer()) if self._socket is None else None

    def look_at(self, connection: socket.socket) -> None:
        """Look at a connection of its own from now on."""
        self._socket, self._seen = connection, acked_bytes(connection)

    def has_stalled(self, now_s: float) -> bool:
        """Whether it has taken too little for too long."""
        if self._socket is not None:
            acked = acked_bytes(self._socket)
            if acked - self._seen >= PROGRESS_BYTES:
                self._seen, self._window_s, self._window_bytes = acked, now_s, 0
        stall_s = self._readers.stall_s
        longest_s = stall_s * max(1, -(-self._size_bytes // PROGRESS_BYTES))
        return now_s - self._window_s > stall_s or now_s - self.begun_s > longest_s

    def drop(self) -> None:
        """End its call, and its connection."""
        self.is_dropped = True
        log.info("a reader at %s took nothing for %g s: dropped", self._context.peer(), self._readers.stall_s)
        connection = self._socket
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if self._task is not None:
            self._task.cancel()


class Readers:
    """Those that something is on its way to, and the clock that looks at them. On the event loop only."""

    def __init__(self, budget: ReadBudget, stall_s: float) -> None:
        self.budget = budget
        self.stall_s = stall_s
        self._look_s = min(stall_s / 8, LONGEST_LOOK_S)
        self._waited_for: set[Reader] = set()
        self._clock: asyncio.TimerHandle | None = None

    def watch(self, reader: Reader) -> None:
        """Look at a reader now and then."""
        self._waited_for.add(reader)
        if self._clock is None:
            self._clock = asyncio.get_running_loop().call_later(self._look_s, self._look)

    def forget(self, reader: Reader) -> None:
        """Look at it no more."""
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
    """How much of what was sent on a TCP connection has arrived, as far as the system tells."""
    try:
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
        return int(_BYTES_ACKED.unpack(told)[0])
    except (OSError, AttributeError, struct.error):
        return 0
