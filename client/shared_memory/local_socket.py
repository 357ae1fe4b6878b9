"""The worker's end of a region's local socket.

It carries the calls whose bytes lie in the region; the protocol is in `proto/shared_memory/local_socket.py`.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from typing import Final

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors.status import from_status
from pushstep.proto.shared_memory.local_socket import (
    HEAD_BYTES,
    READ_BYTES,
    SPINS,
    Method,
    Status,
    framed,
    status_of,
)

from ..transport.retry import TransportFailure
from ..transport.shield import shield

# If an answer came within this time, the next call spins that long before it sleeps: a sleep and a wake-up take
# 0.05 ms, and more on a busy core.
SPIN_S: Final = 1e-3 if SPINS else 0.0


class LocalSocket:
    """One connection, one call at a time. After a TransportFailure it is unusable."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._comes_soon = False
        connection.setblocking(False)

    def is_open(self) -> bool:
        """Whether the server's end is open, as far as this end can tell."""
        try:
            return self._connection.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def push(self, header: pb.PushHeader, commit: pb.PushCommit) -> pb.PushResponse:
        """Push the gradients that lie in the region."""
        return pb.PushResponse.FromString(self._call(Method.PUSH, header, commit))

    def exchange(self, header: pb.PushHeader, commit: pb.PushCommit) -> pb.PullHeader:
        """Exchange through the region: the answer's header, whose parameters lie in the region."""
        return pb.PullResponse.FromString(self._call(Method.EXCHANGE, header, commit)).header

    def _call(self, method: Method, header: pb.PushHeader, commit: pb.PushCommit) -> bytes:
        """The answer's bytes. The catalogue's error if refused; TransportFailure if none came in time."""
        request = pb.PushRequest(header=header, commit=commit).SerializeToString()
        begun_s = time.monotonic()
        until_s = begun_s + self._timeout_s
        shield.breaks(self._cut)
        try:
            self._send(framed(method, request), until_s)
            status, message = self._answer(begun_s, until_s)
        except OSError as error:
            raise TransportFailure(
                f"the local socket to the server broke: {error or type(error).__name__}"
            ) from error
        finally:
            shield.breaks(None)
        self._comes_soon = time.monotonic() - begun_s < SPIN_S
        if status is Status.REFUSED:
            raise from_status(message)
        return message

    def _send(self, message: bytes, until_s: float) -> None:
        sent = 0
        while sent < len(message):
            try:
                sent += self._connection.send(message[sent:])
            except BlockingIOError:
                self._wait(select.POLLOUT, until_s)

    def _answer(self, begun_s: float, until_s: float) -> tuple[Status, bytes]:
        """One answer, nearly always in a single read: a second one would let other threads run first."""
        received = b""
        while True:
            try:
                more = self._connection.recv(READ_BYTES)
            except BlockingIOError:
                if self._comes_soon and time.monotonic() - begun_s < SPIN_S:
                    os.sched_yield()  # let the server run, if it waits for this core
                else:
                    self._wait(select.POLLIN, until_s)
                continue
            if not more:
                raise ConnectionResetError("the server closed it")
            received += more
            if len(received) >= HEAD_BYTES:
                status, length = status_of(received[:HEAD_BYTES])
                if len(received) >= HEAD_BYTES + length:
                    return status, received[HEAD_BYTES : HEAD_BYTES + length]

    def _wait(self, event: int, until_s: float) -> None:
        """Sleep until the connection is ready. TimeoutError if it is not by `until_s` (monotonic)."""
        left_s = until_s - time.monotonic()
        poll = select.poll()
        poll.register(self._connection, event)
        if left_s <= 0 or not poll.poll(left_s * 1e3):
            raise TimeoutError("no answer in time")

    def _cut(self) -> None:
        """End a wait for the server; any thread may call this."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection, which ends the region on the server."""
        self._connection.close()
