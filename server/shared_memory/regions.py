"""Regions of all sessions: memory that a worker on this host and the server both map, in place of sending.

The worker writes gradients there, and the server writes parameters. A region consists of two memfds, which the server
makes and seals (`devices/host_memory.py`). gRPC carries no descriptors, so a Unix socket hands them over. A process is
sent them if it brings the one-time token of an OpenRegion, and belongs to this server's user or to root. A worker on
the GPU of the models gets memory of that device (`devices/exported_memory.py`), handed over in the same way.

The connection then stays open as the region's local socket. Over it the worker makes the calls that name the region
(`worker_door/local.py`). When it closes, the worker is gone, and the region ends. The region also ends with its session
(leave, lease, eviction, next epoch, restore, the model's end), once the step that reads it is done.

A slot belongs to the worker until a push names it. From then on it belongs to the server until that call is answered. A
worker that writes to it in between spoils the values of its own gradient, and may slip a NaN past the gate. It could
do the same by sending gradients. It cannot make the server read or write anywhere else: the memory cannot shrink, and
nothing in it becomes an index or a length except row ids, which are copied out before they are checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch

from pushstep.proto.errors import ManifestChanged, NoSharedMemory, OverBudget, OverCapacity
from pushstep.proto.shared_memory.slots import TOKEN_BYTES, Places
from pushstep.proto.training_pb2 import OpenRegionRequest, OpenRegionResponse
from pushstep.proto.types_pb2 import DType, Identity
from pushstep.proto.wire import dtypes

from ..access.caller import CALLER
from ..devices.exported_memory import ExportedMemory
from ..devices.host_memory import HostMemory
from ..models.model import Model
from ..process.unix_socket import UnixSocket
from ..staging.budget import Budget
from .region import HANDOVER_S, SLOTS, Region

log = logging.getLogger("pushstep.memory")

# Share of the budget for all regions. They last as long as their sessions, and frames must always find room.
BUDGET_SHARE: Final = 0.5
# Most connections that have not shown a token yet. A worker that is turned away sends frames.
WAITING_LIMIT: Final = 64
SWEEP_S: Final = 0.5
_CREDENTIALS: Final = struct.Struct("3i")


class SharedMemory:
    """The regions of all sessions, and the socket that hands them over. Used on the event loop only."""

    def __init__(self, budget: Budget, path: str, most: int) -> None:
        """`most`: how many regions may be open at once. Each has a connection."""
        self.path = path
        self._most = most
        self._budget = budget
        self._regions: dict[int, Region] = {}
        # closed regions of device memory: not free as long as a worker has that memory open
        self._leaving: set[Region] = set()
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting = 0
        # one thread: zeroing pages takes long, and in several threads would delay other workers' steps
        self._allocator = ThreadPoolExecutor(1, thread_name_prefix="regions")

    def start(self, serve: Callable[[socket.socket], Awaitable[None]]) -> None:
        """Listen at `path`, if there is one. `serve` answers the calls on a local socket until it closes."""
        if not self.path:
            return
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.setblocking(False)
        self._unix = UnixSocket(self.path)
        with self._unix.taken() as bound:
            listener.bind(bound)
            listener.listen(128)
        self._listener = listener
        self._serve = serve
        self._keep(self._accept(listener))
        self._keep(self._sweep())

    async def stop(self) -> None:
        """Close every region and the socket. A second call does nothing."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for region in list(self._regions.values()):
            self._close(region)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self._unix.release()
        self._allocator.shutdown()

    async def open(self, model: Model, request: OpenRegionRequest) -> OpenRegionResponse:
        """Open a region for a live session, in place of the worker's last one.

        ManifestChanged for another manifest; NoSharedMemory if no region can be had: the worker then sends frames.
        """
        if self._listener is None:
            raise NoSharedMemory(problem="this server does not share any")
        if request.manifest_hash != model.layout.manifest_hash:
            raise ManifestChanged(model=model.name)
        gradients = Places(model.layout, _wire(request.push_dtype))
        answer = Places(model.layout, _wire(request.pull_dtype))
        memory = self._memory_for(model, request.device_uuid)
        region = Region(model.uid, model.has_live, request.identity, gradients, answer, self._budget, memory)
        self._close_of(model, request.identity.worker)
        await self._until_gone(model, request.identity.worker)
        self._close_of(model, request.identity.worker)
        self._reserve(region)
        self._regions[region.number] = region
        allocating = asyncio.get_running_loop().run_in_executor(self._allocator, region.allocate)
        region.hold_until(allocating)
        try:
            await asyncio.shield(allocating)  # if the caller goes away, the thread works on
        except (OSError, MemoryError) as error:
            self._close(region)
            raise NoSharedMemory(problem=f"the memory could not be had ({type(error).__name__})") from error
        except NoSharedMemory as error:
            self._close(region)
            log.warning("sharing memory of %s: %s", model.device.where, error.message)
            raise
        except BaseException:
            self._close(region)
            raise
        if region.closed:
            raise NoSharedMemory(problem="its session ended, or asked for another one")
        region.ready_s = time.monotonic()
        return OpenRegionResponse(
            region=region.number,
            token=region.token,
            path=self.path,
            slots=SLOTS,
            slot_bytes=gradients.nbytes,
            answer_bytes=region.answer.nbytes,
            device_uuid=request.device_uuid,
        )

    def _memory_for(self, model: Model, device_uuid: bytes) -> HostMemory | ExportedMemory:
        """Memory of the device with this uuid, or of the host if it is empty. NoSharedMemory."""
        if not device_uuid:
            return HostMemory(model.device)
        own = model.device.uuid()
        if device_uuid != own:
            raise NoSharedMemory(
                problem=f"the worker is on device {device_uuid.hex()}, the model on {own.hex()}"
            )
        return ExportedMemory(model.device.where, self._allocator)

    def _close_of(self, model: Model, worker: str) -> None:
        for known in list(self._regions.values()):
            if known.model_uid == model.uid and known.identity.worker == worker:
                self._close(known)

    async def _until_gone(self, model: Model, worker: str) -> None:
        """Wait, for HANDOVER_S at most, until the worker's closed regions on the device are free.

        The worker has said that it has closed them, but their bytes are not back in the budget yet.
        """
        leaving = [r for r in self._leaving if r.model_uid == model.uid and r.identity.worker == worker]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HANDOVER_S):
                for region in leaving:
                    await region.gone.wait()

    def _reserve(self, region: Region) -> None:
        self._leaving = {known for known in self._leaving if not known.gone.is_set()}
        if len(self._regions) >= self._most:
            raise NoSharedMemory(problem=f"this process has connections for {self._most} regions")
        taken = sum(known.bytes_reserved for known in {*self._regions.values(), *self._leaving})
        if taken + region.bytes_reserved > BUDGET_SHARE * self._budget.total_bytes:
            raise NoSharedMemory(problem=f"{region.bytes_reserved} bytes more are over this server's budget")
        try:
            self._budget.reserve(region.bytes_reserved)
        except (OverBudget, OverCapacity) as error:
            raise NoSharedMemory(
                problem=f"{region.bytes_reserved} bytes more are over this server's budget"
            ) from error

    def of(self, identity: Identity, number: int) -> Region | None:
        """The region with this number; None for 0. NoSharedMemory unless it is open and this session's."""
        if number == 0:
            return None
        region = self._regions.get(number)
        if region is None or region.local_socket is None:
            raise NoSharedMemory(problem="the region was closed")
        own, theirs = region.identity, identity
        if (own.model_uid, own.worker, own.epoch) != (theirs.model_uid, theirs.worker, theirs.epoch):
            raise NoSharedMemory(problem="the region is another session's")
        return region

    def close_stale(self) -> None:
        """Close the regions whose session has ended, or whose worker has not come for them in time."""
        now_s = time.monotonic()
        for region in list(self._regions.values()):
            if not region.is_current(now_s):
                self._close(region)

    def _close(self, region: Region) -> None:
        self._regions.pop(region.number, None)
        region.close()
        if region.memory.on_device and not region.gone.is_set():
            self._leaving.add(region)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.close_stale()

    def _keep(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                log.warning("a worker's connection for shared memory was not accepted: %s", error)
                await asyncio.sleep(SWEEP_S)
                continue
            if self._waiting >= WAITING_LIMIT:
                connection.close()
            else:
                self._waiting += 1
                self._keep(self._hand_over(connection))

    async def _hand_over(self, connection: socket.socket) -> None:
        """Serve one connection: the token in, the memory out, then calls until the worker is gone."""
        region: Region | None = None
        connection.setblocking(False)
        try:
            try:
                region = self._claim(await _token(connection))
            finally:
                self._waiting -= 1
            if region is None:
                return
            region.local_socket = connection
            CALLER.set(region.caller)
            region.memory.hand_over(connection)
            await self._serve(connection)
        except (OSError, TimeoutError) as error:
            log.debug("shared memory connection ended: %s", error)
        finally:
            connection.close()
            if region is not None:
                self._close(region)

    def _claim(self, token: bytes) -> Region | None:
        for region in self._regions.values():
            if (
                region.local_socket is None
                and not region.closed
                and secrets.compare_digest(region.token, token)
            ):
                return region
        return None


async def _token(connection: socket.socket) -> bytes:
    """The token that a peer sends first; shorter if it closes early. PermissionError, TimeoutError."""
    require_own_user(connection)
    token = b""
    async with asyncio.timeout(HANDOVER_S):
        while len(token) < TOKEN_BYTES:
            more = await asyncio.get_running_loop().sock_recv(connection, TOKEN_BYTES - len(token))
            if not more:
                break
            token += more
    return token


def require_own_user(connection: socket.socket) -> None:
    """Raise PermissionError unless the peer is a process of this server's user, or of root."""
    sent = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(sent)
    if uid not in (0, os.geteuid()):
        raise PermissionError(f"user {uid} is not this server's")


def _wire(dtype: int) -> torch.dtype | None:
    return None if dtype == DType.DTYPE_UNSPECIFIED else dtypes.to_torch(dtype, "the region asked for")
