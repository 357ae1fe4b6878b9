"""A bare socket that moves the same bytes and does nothing with them: what the kernel asks for them.

Buffers are made once and reused, so no page is ever fresh; Python only calls `sendall` and `recv_into`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Sequence

from .driver import Driver, End, end_all
from .side import Side, side_of

HEAD = struct.Struct("<QQ")  # bytes that follow, bytes that are wanted back
BUFFER_BYTES = 4 << 20  # of the socket, as far as the kernel allows


def _address(family: str, folder: str) -> tuple[socket.AddressFamily, object]:
    if family == "unix":
        return socket.AF_UNIX, os.path.join(folder, "socket")
    return socket.AF_INET, ("127.0.0.1", int(open(os.path.join(folder, "port")).read()))


def _tuned(connection: socket.socket) -> socket.socket:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    if connection.family == socket.AF_INET:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def receive(connection: socket.socket, into: memoryview) -> bool:
    """Fill `into`; False if the other side has gone."""
    while into:
        got = connection.recv_into(into)
        if not got:
            return False
        into = into[got:]
    return True


def _listen(family: str, folder: str) -> End:
    listener = socket.socket(socket.AF_UNIX if family == "unix" else socket.AF_INET)
    listener.bind(os.path.join(folder, "socket") if family == "unix" else ("127.0.0.1", 0))
    listener.listen()
    if family == "tcp":
        with open(os.path.join(folder, "port"), "w") as file:
            file.write(str(listener.getsockname()[1]))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=_answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener.close


def _answer(connection: socket.socket) -> None:
    buffer = bytearray()
    head = bytearray(HEAD.size)
    with _tuned(connection), contextlib.suppress(OSError):
        while receive(connection, memoryview(head)):
            incoming, outgoing = HEAD.unpack(head)
            if len(buffer) < max(incoming, outgoing):
                buffer = bytearray(max(incoming, outgoing))
            if not receive(connection, memoryview(buffer)[:incoming]):
                return
            connection.sendall(memoryview(buffer)[:outgoing])


class SocketWorker:
    """One connection."""

    def __init__(self, family: str, folder: str, payload_bytes: int) -> None:
        kind, address = _address(family, folder)
        self._connection = _tuned(socket.socket(kind))
        self._connection.connect(address)  # type: ignore[arg-type]
        self._out = bytearray(payload_bytes)
        self._back = bytearray(payload_bytes)

    def _move(self, out_bytes: int, back_bytes: int) -> None:
        self._connection.sendall(HEAD.pack(out_bytes, back_bytes))
        self._connection.sendall(memoryview(self._out)[:out_bytes])
        receive(self._connection, memoryview(self._back)[:back_bytes])

    def exchange(self) -> None:
        """Send all, get as much back."""
        self._move(len(self._out), len(self._back))

    def push(self) -> None:
        """Send all, get one byte."""
        self._move(len(self._out), 1)

    def push_and_pull(self) -> None:
        """One after the other."""
        self.push()
        self.pull()

    def pull(self) -> None:
        """Ask, and get all."""
        self._move(0, len(self._back))

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


def _workers(family: str, folder: str, payload_bytes: int) -> Sequence[SocketWorker]:
    return [SocketWorker(family, folder, payload_bytes)]


class Socket:
    """Owns a process that listens and one that connects."""

    def __init__(self, family: str) -> None:
        self._family = family
        self._folder = tempfile.TemporaryDirectory()
        self._server = Driver(_listen, family, self._folder.name)
        self._driver = Driver()
        self._server.answer()
        self._driver.answer()

    def side(self, payload_bytes: int) -> Side:
        """One worker that moves so many bytes each way."""
        return side_of(
            f"socket {self._family}",
            _workers,
            [self._driver],
            [(self._family, self._folder.name, payload_bytes)],
            servers=[self._server.pid],
        )

    def close(self) -> None:
        """End the processes."""
        end_all([self._driver, self._server])
        self._folder.cleanup()
