"""The process: start, serve, stop, in that order.

gRPC and HTTP share one event loop. A stop first says that no work is taken, lets what is in flight finish, then
snapshots every model and exits 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import IO, Final

import grpc
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pushstep.proto.frames import MAX_MESSAGE_BYTES, TRANSPORT_LIMIT_BYTES
from pushstep.proto.memory import keep_freed_blocks

from .catalog import Catalog
from .config import Config, is_loopback, split_address
from .descriptors import Spare, shared_out
from .grpc_door import SERVICE, GrpcDoor
from .http_server import HttpServer
from .line_door import LineDoor
from .rest_door import create_app
from .shared_memory import SharedMemory
from .staging import WINDOW_BYTES, Budget
from .threads import PUSHES, REQUESTS
from .warmup import warm_kernels

log = logging.getLogger("pushstep.service")

GRPC_OPTIONS: Final = (
    # A little above our own limit, so that a somewhat too large message gets a named error. Of what is larger, gRPC
    # reads the length and no more.
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES + (1 << 20)),
    ("grpc.max_send_message_length", TRANSPORT_LIMIT_BYTES),
    # Big HTTP/2 frames halve the receive cost of a chunk: 16 KiB frames are 64 Python objects per MiB.
    ("grpc.http2.max_frame_size", 4 << 20),
    # Windows are memory that a sender fills before anyone reads, so the budget counts them; gRPC's probe of the
    # bandwidth would widen them.
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    ("grpc.http2.bdp_probe", 0),
    # What one connection can have the loop do at once. A session has a connection of its own, and 8 pushes in flight.
    ("grpc.max_concurrent_streams", 64),
    # Two servers on one port would each see half of the workers.
    ("grpc.so_reuseport", 0),
    # Who connects has to speak HTTP/2 within this time; gRPC's own is two minutes.
    ("grpc.server_handshake_timeout_ms", 10_000),
    # A connection without calls ends, and a client of gRPC's opens another with its next call. There is none for its age: a
    # push may be under way.
    ("grpc.max_connection_idle_ms", 600_000),
    # One whose other end has gone without a word: workers and their servers ask each other.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Who asks more often than this three times is sent away.
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    ("grpc.http2.max_ping_strikes", 2),
    # Of the headers of a call. Ours take some hundred bytes.
    ("grpc.max_metadata_size", 4 << 10),
    ("grpc.absolute_max_metadata_size", 8 << 10),
)


# How long the event loop waits for a thread that computes in Python; at each of its turns, so at 5 ms, Python's own, a push
# takes ten times as long beside one. Pushes per second beside somebody's large manifests: 100 of 1000 at 5 ms, 390 at this.
SWITCH_S: Final = 200e-6


class DataFolderLocked(RuntimeError):
    """Another server uses the data folder."""


class Service:
    """One server process."""

    def __init__(self, config: Config) -> None:
        keep_freed_blocks()
        self.config = config
        self.catalog = Catalog(config)
        device = self.catalog.device
        budget = Budget(config.staging_bytes, config.stall_s / 4, device.fresh_memory)
        self._shares = shared_out(config.max_connections)
        self.memory = SharedMemory(budget, config.memory_path(), self._shares.local)
        self.door = GrpcDoor(self.catalog, budget, self.memory, config.stall_s)
        self._stop = asyncio.Event()
        connections = ("grpc.max_allowed_incoming_connections", self._shares.grpc)
        self._grpc = grpc.aio.server(options=(*GRPC_OPTIONS, connections))
        self._health = health.aio.HealthServicer()
        self._lock: IO[str] | None = None
        self.grpc_address = ""
        self.http_address = ""
        self.unix_path = ""

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then stop in order."""
        sys.setswitchinterval(SWITCH_S)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        http = await self._start()
        serving = asyncio.create_task(http.serve())
        while not http.started and not serving.done():
            await asyncio.sleep(0.005)
        await PUSHES.run(warm_kernels, self.catalog.device.where, self.config.data / "kernels")
        await self.catalog.load()
        await self._say(health_pb2.HealthCheckResponse.SERVING)
        unix = f" unix={self.unix_path}" if self.unix_path else ""
        print(f"ready grpc={self.grpc_address} http={self.http_address}{unix}", flush=True)
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait({stopped, serving}, return_when=asyncio.FIRST_COMPLETED)
        await self._drain(http, serving)

    async def _start(self) -> uvicorn.Server:
        self.catalog.device.open()
        self._lock = lock_folder(self.config.data)
        self.unix_path = self._bind_grpc()
        listener, self.http_address = bind_http(self.config.http)
        self.door.http_url = f"http://{self.http_address}"
        self.door.unix_path = self.unix_path
        if self.memory.path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.memory.path)
            self.memory.start(LineDoor(self.door).serve)
        self._grpc.add_generic_rpc_handlers((self.door.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        old_mask = os.umask(0o177)  # the Unix socket is this user's alone from the moment it exists
        try:
            await self._grpc.start()
        finally:
            os.umask(old_mask)
        host, _ = split_address(self.config.http)
        allowed = {"localhost", "127.0.0.1", "::1", host} if is_loopback(host) else None
        config = uvicorn.Config(
            create_app(self.catalog, allowed, self.grpc_address),
            log_config=None,
            lifespan="off",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(self.config.drain_s) or 1,
        )
        return HttpServer(config, listener, self._shares.http, self.config.stall_s, Spare())

    def _bind_grpc(self) -> str:
        host, _ = split_address(self.config.grpc)
        try:
            port = self._grpc.add_insecure_port(self.config.grpc)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self.config.grpc} for gRPC: {error}") from error
        self.grpc_address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        path = self.config.unix_path()
        if path is None:
            log.info("no Unix socket: its path would be too long, or it was turned off")
            return ""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # the folder is locked: whoever made it is dead
        old_mask = os.umask(0o177)
        try:
            self._grpc.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on unix:{path}: {error}") from error
        finally:
            os.umask(old_mask)
        return path

    async def _say(self, status: int) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def _drain(self, http: uvicorn.Server, serving: asyncio.Task[None]) -> None:
        log.info("stopping: draining for at most %.0f s", self.config.drain_s)
        self.door.draining = True
        for model in self.catalog.models.values():
            model.executor.let_go()
        self.catalog.ready = False
        await self._health.enter_graceful_shutdown()
        await self._grpc.stop(self.config.drain_s)
        await self.memory.stop()
        http.should_exit = True
        await serving
        REQUESTS.let_go()
        await self.catalog.stop()
        if self.unix_path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.unix_path)
        if self._lock is not None:
            self._lock.close()
        log.info("stopped")


def lock_folder(folder: Path) -> IO[str]:
    """Take the data folder for this process, as long as the returned file is open. DataFolderLocked if it is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise DataFolderLocked(
            f"another server uses {folder}; stop it, or choose another folder with --data"
        ) from error
    return lock


def bind_http(address: str) -> tuple[socket.socket, str]:
    """A listening socket for HOST:PORT and the address that it got. uvicorn would exit the process if it failed."""
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # with the protocol named, or asyncio leaves Nagle's algorithm on: 40 ms for every answer on a kept connection
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(f"cannot listen on {address} for HTTP: {error.strerror}") from error
    got = bound.getsockname()[1]
    return bound, f"[{host}]:{got}" if ":" in host else f"{host}:{got}"
