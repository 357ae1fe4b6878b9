"""The process: start, serve, stop, in that order.

gRPC and HTTP share one event loop. A stop first refuses new work, lets work in flight finish, then snapshots every
model. The models are saved however serving ends, also after an error. The exit status says if one was not saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import Awaitable
from typing import Any, Final
from urllib.parse import quote

import grpc
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pushstep.proto.wire.buffers import keep_freed_blocks

from .access.certificates import LOOK_S, Certificates
from .access.guard import Guard
from .capacity.idle_memory import give_back_idle
from .config import Config, is_loopback, split_address
from .devices.warmup import warm_kernels
from .links.job import Job
from .metrics.loop_lag import LoopLag
from .models.catalog import Catalog
from .models.saved_models import SavedModels
from .operator_door.app import create_app
from .operator_door.http_server import HttpServer
from .process.descriptors import Spare, shared_out
from .process.exit_status import ExitStatus
from .process.folder_lock import lock_folder
from .process.threads import DISK, METRICS, PUSHES, REQUESTS
from .process.unix_socket import UnixSocket
from .ranks.role import Role, begin, seen_by_operators
from .service_manager import tell_manager
from .shared_memory.regions import SharedMemory
from .traces.request_spans import Traces
from .worker_door.entrance import Entrance, require_entries
from .worker_door.grpc_options import GRPC_OPTIONS
from .worker_door.local import LocalDoor
from .worker_door.servicer import SERVICE, VERSION, GrpcDoor

log = logging.getLogger("pushstep.service")


# How long the event loop waits, at each of its turns, for a thread that computes in Python. Python's default is 5 ms.
# Pushes per second while large manifests are parsed, of 1000 without them: 100 at 5 ms, 390 at this.
SWITCH_S: Final = 200e-6
# Connections that may wait until the loop accepts them.
BACKLOG: Final = 2048


class Service:
    """One server process: its catalog, both doors, its sockets, and the lock on its data folder."""

    def __init__(self, config: Config, job: Job | None = None) -> None:
        """`job`: the rank of several that this process is."""
        keep_freed_blocks()
        self.config = config
        self.catalog = Catalog(config)
        self.guard = Guard(config.read_tokens())
        files = config.tls_files()
        self._certificates = None if files is None else Certificates(files)
        self._saved_models = SavedModels(self.catalog)
        self._shares = shared_out(config.max_connections)
        self._loop_lag = LoopLag(self.catalog.counts.loop_lag)
        self.memory = SharedMemory(self.catalog.staging, config.memory_path(), self._shares.local)
        self._traces = Traces() if config.otel else None
        self._role = None if job is None else Role(job, config, self.catalog, VERSION)
        made = GrpcDoor if self._role is None else self._role.door
        self.door = made(self.catalog, self.memory, config.stall_s, self._traces)
        self._stop = asyncio.Event()
        self._look_now = asyncio.Event()
        connections = ("grpc.max_allowed_incoming_connections", self._shares.grpc)
        # open doors ask nobody, and cost nothing
        asked = () if self.guard.is_open else (Entrance(self.guard, self.catalog.counts),)
        self._grpc = grpc.aio.server(options=(*GRPC_OPTIONS, connections), interceptors=asked)
        self._health = health.aio.HealthServicer()
        self._lock: int | None = None
        self._unix: UnixSocket | None = None
        self._http_socket: socket.socket | None = None
        self._http: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self.grpc_address = ""
        self.http_address = ""
        self.unix_path = ""

    async def run(self) -> ExitStatus:
        """Serve until told to stop, then stop in order; returns the status. Raises what prevents a start."""
        sys.setswitchinterval(SWITCH_S)
        loop = asyncio.get_running_loop()
        reloads = self._certificates is not None or not self.guard.is_open
        for number in _stop_signals():
            on_hang_up = number == signal.SIGHUP and reloads
            loop.add_signal_handler(number, self._reload if on_hang_up else self._stop.set)
        self._loop_lag.start()
        ready = False
        status = ExitStatus.SAVED
        try:
            await self._start()
            ready = True
            if not self._stop.is_set():
                await self._serve()
            status = await self._drain()
        except Exception:
            if not ready:
                raise
            log.exception("stopping: the server has failed")
            status = ExitStatus.BROKEN_OFF
        finally:
            self.catalog.draining = True
            REQUESTS.let_go()
            METRICS.let_go()
            self._loop_lag.stop()
            saved = await self._saved_models.save()
            if self._role is not None:
                await self._part("ranks", self._role.end())
            await self._let_go()
        return status if saved else ExitStatus.NOT_ALL_SAVED

    async def _start(self) -> None:
        self.catalog.device.open()
        self._lock = lock_folder(self.config.data)
        if self.catalog.remote is not None:
            await DISK.run(self.catalog.remote.open, takeover=self.config.snapshots_takeover)
        leads = self._role is None or self._role.job.leads
        if leads:
            self._http_socket, self.http_address = bind_http(self.config.http)
        await self._start_grpc()
        if self._http_socket is not None:
            await self._start_http(self._http_socket)
        await begin(self._role, self.config, self.grpc_address, self.unix_path, self._stop)
        if self._role is not None and not self._role.has_met:
            return  # it was told to stop
        await PUSHES.run(warm_kernels, self.catalog.device.where, self.config.data / "kernels")
        await self._saved_models.load(self._stop.is_set)
        if self._role is not None:
            await self._role.serve()

    async def _start_http(self, listener: socket.socket) -> None:
        self._http = self._http_server(listener)
        self._serving = asyncio.create_task(self._http.serve())
        while not self._http.started and not self._serving.done():
            await asyncio.sleep(0.005)
        if self._serving.done():
            self._serving.result()
            raise OSError(f"cannot listen on {self.config.http} for HTTP")

    async def _start_grpc(self) -> None:
        self._bind_grpc()
        scheme = "http" if self._certificates is None else "https"
        self.door.http_url = f"{scheme}://{self.http_address}" if self.http_address else ""
        self.door.unix_path = self.unix_path
        self.memory.start(LocalDoor(self.door).serve)
        handlers, more = ((), ()) if self._role is None else (self._role.handlers(), self._role.services)
        self._grpc.add_generic_rpc_handlers((self.door.handler(), *handlers))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        require_entries((*names, *more))
        reflection.enable_server_reflection(names, self._grpc)
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._grpc.start()

    def _http_server(self, listener: socket.socket) -> uvicorn.Server:
        host, _ = split_address(self.config.http)
        allowed = {"localhost", "127.0.0.1", "::1", host} if is_loopback(host) else None
        view = seen_by_operators(self._role, self.catalog, self.grpc_address, self.unix_path)
        config = uvicorn.Config(
            create_app(self.catalog, allowed, self.grpc_address, self.guard, view),
            log_config=None,
            lifespan="off",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(self.config.drain_s) or 1,
        )
        tls = None if self._certificates is None else self._certificates.context
        return HttpServer(config, listener, self._shares.http, self.config.stall_s, Spare(), tls)

    def _bind_grpc(self) -> None:
        host, asked = split_address(self.config.grpc)
        require_free(host, asked)
        try:
            if self._certificates is None:
                port = self._grpc.add_insecure_port(self.config.grpc)
            else:
                port = self._grpc.add_secure_port(self.config.grpc, self._certificates.for_grpc())
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self.config.grpc} for gRPC: {error}") from error
        self.grpc_address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        path = self.config.unix_path()
        if path is None:
            log.info("no Unix socket: its path would be too long, or it was turned off")
            return
        self._unix = UnixSocket(path)
        with self._unix.taken() as bound:
            try:
                self._grpc.add_insecure_port(f"unix:{quote(bound)}")
            except RuntimeError as error:
                raise OSError(f"cannot listen on unix:{path}: {error}") from error
        self.unix_path = path

    async def _say(self, status: int) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def _serve(self) -> None:
        """Serve until told to stop. Raises what ends the HTTP door; RuntimeError if it just closes."""
        beside = [
            asyncio.create_task(self.catalog.take_due_snapshots()),
            asyncio.create_task(give_back_idle(self.catalog)),
        ]
        if self._certificates is not None:
            beside.append(asyncio.create_task(self._look_at_certificates(self._certificates)))
        try:
            await self._until_stopped()
        finally:
            for task in beside:
                task.cancel()

    async def _look_at_certificates(self, certificates: Certificates) -> None:
        while True:
            self._look_now.clear()
            await DISK.run(certificates.look)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._look_now.wait()

    def _reload(self) -> None:
        """Read tokens and certificates anew. What cannot be used is logged, and changes nothing."""
        self._look_now.set()
        try:
            tokens = self.config.again().read_tokens()
            # no source is left: nobody is let in, where a guard that was made so would let everyone in
            self.guard.replace(tokens or ())
        except ValueError as error:
            log.error("the tokens stay as they are: %s", error)

    async def _until_stopped(self) -> None:
        await self._say(health_pb2.HealthCheckResponse.SERVING)
        # a shell's words: a path may have spaces
        unix = f" unix={shlex.quote(self.unix_path)}" if self.unix_path else ""
        try:
            rank = "" if self._role is None else f" rank={self._role.job.rank}"
            http = self.http_address and f" http={self.http_address}"
            print(f"ready{rank} grpc={self.grpc_address}{http}{unix}", flush=True)
        except OSError as error:  # the starter has closed our output; workers may still connect
            log.warning("nobody hears that the server is ready: %s", error)
        tell_manager("READY=1")
        stopped = asyncio.create_task(self._stop.wait())
        doors = {self._serving} if self._serving is not None else set()
        await asyncio.wait({stopped, *doors}, return_when=asyncio.FIRST_COMPLETED)
        for door in doors:
            if door.done() and not self._stop.is_set():
                door.result()
                raise RuntimeError("the HTTP door has closed by itself")

    async def _drain(self) -> ExitStatus:
        """Refuse new work and let work in flight finish. A part that fails does not stop the others."""
        tell_manager("STOPPING=1")
        log.info("stopping: draining for at most %.0f s", self.config.drain_s)
        self.catalog.draining = True
        self.catalog.ready = False
        for model in self.catalog.models.values():
            model.held.let_go()
            model.events.end("draining")
        self.door.steps.end()
        whole = await self._part("health", self._health.enter_graceful_shutdown())
        if self._role is not None:
            whole &= await self._part("ranks", self._role.drain(self.config.drain_s))
        whole &= await self._part("gRPC", self._grpc.stop(self.config.drain_s))
        whole &= await self._part("shared memory", self.memory.stop())
        if self._http is not None and self._serving is not None:
            self._http.should_exit = True
            whole &= await self._part("HTTP", self._serving)
        return ExitStatus.SAVED if whole else ExitStatus.BROKEN_OFF

    async def _part(self, name: str, work: Awaitable[Any]) -> bool:
        try:
            await work
        except Exception:
            log.exception("stopping: %s", name)
            return False
        return True

    async def _let_go(self) -> None:
        """Release what the process holds outside itself: sockets, shared memory, the data folder's lock."""
        self.catalog.close()
        await self._part("gRPC", self._grpc.stop(None))
        await self._part("shared memory", self.memory.stop())
        if self._serving is not None and not self._serving.done():
            self._serving.cancel()
            await asyncio.wait({self._serving})
        if self._http_socket is not None:
            self._http_socket.close()
        if self._unix is not None:
            self._unix.release()
        if self._lock is not None:
            os.close(self._lock)
        if self._traces is not None:
            await DISK.run(self._traces.end)
        log.info("stopped")


def _stop_signals() -> list[signal.Signals]:
    """SIGTERM, SIGINT, and SIGHUP (sent by a closed terminal) unless it is ignored, as under nohup.

    A server that has tokens or certificates to read anew does that at a SIGHUP.
    """
    signals = [signal.SIGTERM, signal.SIGINT]
    return signals if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*signals, signal.SIGHUP]


def require_free(host: str, port: int) -> None:
    """OSError if another process listens at one of the addresses of `host`.

    gRPC is content if it can bind one of them. A client that uses the name may then reach the other server.
    """
    if port == 0:
        return
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port} for gRPC: {error.strerror}") from error
    for family, _, protocol, _, place in found:
        if _is_taken(family, protocol, place):
            raise OSError(f"cannot listen on {host}:{port} for gRPC: {place[0]} is in use")


def _is_taken(family: int, protocol: int, place: Any) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        return (
            error.errno == errno.EADDRINUSE
        )  # no other process listens at an address that this machine lacks
    return False


def bind_http(address: str) -> tuple[socket.socket, str]:
    """A listening socket for HOST:PORT, and its address.

    OSError on failure, where uvicorn would exit the process.
    """
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # name the protocol, or asyncio leaves Nagle's algorithm on: 40 ms for every answer on a kept connection
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        # listen at once: until then another process may bind the same address
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise OSError(f"cannot listen on {address} for HTTP: {error.strerror}") from error
    got = bound.getsockname()[1]
    return bound, f"[{host}]:{got}" if ":" in host else f"{host}:{got}"
