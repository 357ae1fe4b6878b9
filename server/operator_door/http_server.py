"""The HTTP server: uvicorn's, in the service's own event loop, with its own loop of accepting connections.

It holds a limited number of connections. A new one takes the place of the one that has been idle for longest, so a
caller that opens thousands and sends nothing keeps nobody out. When file descriptors run out, it gives up one of its
spare ones or ends an idle connection. That is logged at most once in LOGGED_EVERY_S, not at every attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import uvicorn

from ..process.descriptors import Spare
from .http_protocol import HttpProtocol, Idle

log = logging.getLogger("pushstep.http")

RETRY_S: Final = 0.2
LOGGED_EVERY_S: Final = 60.0
_NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class HttpServer(uvicorn.Server):
    """Serves an application to whoever connects to a listening socket."""

    def __init__(
        self,
        config: uvicorn.Config,
        listener: socket.socket,
        most: int,
        stall_s: float,
        spare: Spare,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        """`most`: connections at once. `stall_s`: from it follow the time limits of HttpProtocol, and of handshakes.

        `tls`: what the next connection is served with; None for plain HTTP.
        """
        super().__init__(config)
        # below that, uvicorn logs a line for every malformed request
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        self._listener = listener
        self._most = most
        self._stall_s = stall_s
        self._spare = spare
        self._tls = tls
        self._idle: Idle = {}
        # handshakes under way, the oldest first: they count as connections
        self._shaking: dict[asyncio.Task[None], None] = {}
        self._accepting: asyncio.Task[None] | None = None
        self._logged_s = -LOGGED_EVERY_S

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the service: uvicorn would end the process before gRPC has drained."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections from now on."""
        await super().startup(sockets=[])
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections, and let requests under way finish."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait({self._accepting})
        self._listener.close()
        for handshake in tuple(self._shaking):
            handshake.cancel()
        await super().shutdown(sockets=[])
        self._spare.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._spare.refill()
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                await self._make_room(error)
                continue
            while self._held() >= self._most and self._end_idle():
                await asyncio.sleep(0)  # the descriptor is free after a turn of the loop
            if self._tls is None:
                await self._begin(connection)
                continue
            handshake = loop.create_task(self._begin(connection, self._tls()))
            self._shaking[handshake] = None
            handshake.add_done_callback(self._end_shaking)

    def _end_shaking(self, handshake: asyncio.Task[None]) -> None:
        self._shaking.pop(handshake, None)

    def _held(self) -> int:
        return len(self.server_state.connections) + len(self._shaking)

    async def _begin(self, connection: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Serve a connection, after its handshake."""
        how: dict[str, Any] = (
            {}
            if tls is None
            else {"ssl": tls, "ssl_handshake_timeout": self._stall_s, "ssl_shutdown_timeout": self._stall_s}
        )
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection, **how)
        except OSError as error:  # the caller has gone already, or speaks no TLS, or has no certificate
            log.debug("a connection ended before it began: %s", error)

    def _protocol(self) -> HttpProtocol:
        return HttpProtocol(self.config, self.server_state, self._idle, self._stall_s)

    async def _make_room(self, error: OSError) -> None:
        if time.monotonic() - self._logged_s >= LOGGED_EVERY_S:
            self._logged_s = time.monotonic()
            log.warning("a connection was not accepted: %s", error)
        if error.errno in _NO_ROOM and (self._spare.let_go() or self._end_idle()):
            await asyncio.sleep(0)
        else:
            await asyncio.sleep(RETRY_S)

    def _end_idle(self) -> bool:
        """End the handshake that is the oldest, or the connection that has been idle for longest. False if there is none."""
        handshake = next(iter(self._shaking), None)
        if handshake is not None:
            self._end_shaking(handshake)
            handshake.cancel()
            return True
        oldest = next(iter(self._idle), None)
        if oldest is None:
            return False
        del self._idle[oldest]
        oldest.transport.abort()
        return True
