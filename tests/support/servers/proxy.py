"""A relay between a client and a server whose connections a test cuts, holds, or starves at will."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Literal, Self

Direction = Literal["up", "down"]
PIECE_BYTES = 64 << 10


class Proxy:
    """Forwards TCP from a free loopback port to `target` ("HOST:PORT", or the path of a Unix socket). "up" is from client
    to server. `pause_s`: how long each 64 KiB take on this link.
    """

    def __init__(self, target: str, pause_s: float = 0.0) -> None:
        self.target = target
        self._pause_s = pause_s
        self.connections = 0
        self.passed = {"up": 0, "down": 0}
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._gates = {"up": threading.Event(), "down": threading.Event()}
        self._cut_after: dict[str, int] = {}
        self._stop_after: dict[str, int] = {}
        self.stopped = False
        self._refusing = False
        self.release()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def hold(self, *directions: Direction) -> None:
        """Stop forwarding in these directions; the connections stay open and nobody notices."""
        for direction in directions:
            self._gates[direction].clear()

    def release(self, *directions: Direction) -> None:
        """Forward again, in these directions or in both."""
        for direction in directions or ("up", "down"):
            self._gates[direction].set()

    def cut(self) -> None:
        """Break every open connection; what was held back is lost. New ones are accepted."""
        with self._lock:
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def cut_after(self, direction: Direction, count: int) -> None:
        """Break the connections, once, when `count` further bytes have gone in this direction."""
        with self._lock:
            self._cut_after[direction] = self.passed[direction] + count

    def stop_after(self, direction: Direction, count: int) -> None:
        """Forward `count` further bytes in this direction and then hold it; `stopped` tells when."""
        with self._lock:
            self._stop_after[direction] = self.passed[direction] + count

    def refuse(self) -> None:
        """Break every connection, and every new one at once."""
        self._refusing = True
        self.cut()

    def accept(self) -> None:
        """Take connections again."""
        self._refusing = False

    def close(self) -> None:
        """End it."""
        self._refusing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self.release()
        for thread in self._threads:
            thread.join(timeout=5)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                client.close()
                continue
            self.connections += 1
            try:
                server = _connected(self.target)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
            ends: list[tuple[Direction, socket.socket, socket.socket]] = [
                ("up", client, server),
                ("down", server, client),
            ]
            pumps = [threading.Thread(target=self._pump, args=end, daemon=True) for end in ends]
            self._threads += pumps
            # the pair is closed when both directions have ended, so that no number is used again too early
            finish = threading.Thread(target=self._finish, args=(pumps, client, server), daemon=True)
            self._threads.append(finish)
            for thread in (*pumps, finish):
                thread.start()

    def _finish(self, pumps: list[threading.Thread], *pair: socket.socket) -> None:
        for pump in pumps:
            pump.join()
        with self._lock:
            self._open -= set(pair)
        for one in pair:
            one.close()

    def _pump(self, direction: Direction, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for piece in self._pieces(source):
                self._gates[direction].wait()
                with self._lock:
                    if source not in self._open:
                        return
                    limit = self._cut_after.get(direction)
                    allowed = len(piece) if limit is None else max(0, limit - self.passed[direction])
                    last = allowed < len(piece)
                    if last:
                        del self._cut_after[direction]
                    self.passed[direction] += min(allowed, len(piece))
                    if self.passed[direction] >= self._stop_after.get(direction, sys.maxsize):
                        del self._stop_after[direction]
                        self._gates[direction].clear()
                        self.stopped = True
                sink.sendall(piece[:allowed])
                if last:
                    self.cut()
                    return
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _pieces(self, source: socket.socket) -> Iterator[bytes]:
        while piece := source.recv(PIECE_BYTES):
            if self._pause_s:
                time.sleep(self._pause_s * len(piece) / PIECE_BYTES)
            yield piece


def _connected(target: str) -> socket.socket:
    if target.startswith("/"):
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.connect(target)
        return made
    host, _, port = target.rpartition(":")
    return socket.create_connection((host, int(port)))
