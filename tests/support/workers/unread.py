"""Calls whose answers are read as the test likes: not at all, or so many bytes at a time.

gRPC's own client reads ahead and gives no say in it, so these speak HTTP/2 by themselves: a stream's window is opened by
hand, and what comes on the socket is thrown away.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable

from tests.support.workers.hostile import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
    header_block,
)

INITIAL_WINDOW = 4
LARGEST_FRAME = 16 << 10


class UnreadCall:
    """One call on a connection of its own, of whose answer no more comes than there is window for."""

    def __init__(
        self,
        address: str,
        method: str,
        messages: Iterable[bytes],
        window: int = 0,
        metadata: Iterable[tuple[str, str]] = (),
    ) -> None:
        if address.startswith("unix:"):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(address.removeprefix("unix:"))
        else:
            host, _, port = address.rpartition(":")
            self.socket = socket.create_connection((host, int(port)), timeout=20)
        settings = struct.pack(">HI", INITIAL_WINDOW, window)
        self.socket.sendall(PREFACE + frame(SETTINGS, 0, 0, settings))
        self.socket.sendall(frame(HEADERS, END_HEADERS, 1, header_block("x", method, metadata)))
        body = b"".join(b"\0" + struct.pack(">I", len(message)) + message for message in messages)
        self._held = b""
        # answers of the server's: how much of the payload came, whether the answer has begun, whether the server has
        # ended the call or the connection, and the call with a status
        self.came_bytes = 0
        self.has_begun = self.has_ended = self.has_status = False
        for at in range(0, len(body), LARGEST_FRAME):
            self.socket.sendall(frame(DATA, 0, 1, body[at : at + LARGEST_FRAME]))
            self.hear()
        self.socket.sendall(frame(DATA, END_STREAM, 1))
        self.socket.setblocking(False)

    def open(self, window: int) -> None:
        """Take that much more."""
        self._send(b"".join(frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", window)) for stream in (0, 1)))

    def begins(self) -> bool:
        """Whether the server has begun to answer."""
        self.hear()
        return self.has_begun

    def is_over(self) -> bool:
        """Whether the server has ended the call, or the connection."""
        self.hear()
        return self.has_ended

    def hear(self) -> None:
        """Take note of what has come."""
        self.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while more := self._received():
                self._held += more
                self._look()
        self.socket.setblocking(True)

    def _received(self) -> bytes:
        try:
            more = self.socket.recv(1 << 20)
        except ConnectionError:
            more = b""
        self.has_ended = self.has_ended or not more
        return more

    def _look(self) -> None:
        while len(self._held) >= 9:
            size = int.from_bytes(self._held[:3], "big")
            if len(self._held) < 9 + size:
                return
            kind, flags, payload = self._held[3], self._held[4], self._held[9 : 9 + size]
            if kind == SETTINGS and not flags & ACK:
                self._send(frame(SETTINGS, ACK, 0))
            elif kind == PING and not flags & ACK:
                self._send(frame(PING, ACK, 0, payload))
            elif kind == DATA:
                self.came_bytes += size
            self.has_begun = self.has_begun or kind == HEADERS
            self.has_status = self.has_status or (kind == HEADERS and bool(flags & END_STREAM))
            self.has_ended = self.has_ended or self.has_status or kind == RST_STREAM
            self._held = self._held[9 + size :]

    def _send(self, message: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(message)

    def close(self) -> None:
        self.socket.close()
