"""Memory that a worker on the same host and its server both map: gradients in, parameters out, nothing sent.

A session's region is two memfds, made and sealed here and handed over a Unix socket of their own, since gRPC carries no
descriptors: whoever brings the one-time token of an OpenRegion, and is this server's user or root, is sent them. For a
worker on the GPU of the models it is memory of that device (`exported_memory.py`), handed over in the same way. The
connection then stays as the region's life line, over which the worker also makes the calls that name the region (see
line_door.py). When it closes the worker is gone, and so is the region; it also ends with its session (leave, lease,
eviction, next epoch, restore, the model's end), once the step that reads it has.

A slot belongs to the worker until a push names it, and to the server from there until that call is answered. A worker
that writes to it in between spoils the values of its own gradient, and may slip a NaN past the gate: nothing that it
could not do by sending them. It cannot make the server read or write anywhere else: the memory cannot shrink, and
nothing in it becomes an index or a length but row ids, which are copied out before they are checked.
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

from pushstep.proto import dtypes
from pushstep.proto.errors import ManifestChanged, NoSharedMemory, OverBudget, OverCapacity
from pushstep.proto.region import TOKEN_BYTES, Places
from pushstep.proto.training_pb2 import OpenRegionRequest, OpenRegionResponse
from pushstep.proto.types_pb2 import DType, Identity

from .exported_memory import ExportedMemory
from .host_memory import HostMemory
from .model import Model
from .region import HANDOVER_S, SLOTS, Region
from .staging import Budget
from .unix_socket import UnixSocket

log = logging.getLogger("pushstep.memory")

# Regions stand for as long as their sessions: frames must always find room beside them.
BUDGET_SHARE: Final = 0.5
# Connections that have not shown a token yet; whoever is turned away sends frames.
WAITING_LIMIT: Final = 64
SWEEP_S: Final = 0.5
_CREDENTIALS: Final = struct.Struct("3i")


class SharedMemory:
    """The regions of all sessions, and the socket that hands them over. Used on the event loop only."""

    def __init__(self, budget: Budget, path: str, most: int) -> None:
        """`most`: regions at once, each of which has a connection."""
        self.path = path
        self._most = most
        self._budget = budget
        self._regions: dict[int, Region] = {}
        # closed, and not free as long as a worker still has the device's memory open
        self._leaving: set[Region] = set()
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting = 0
        # one at a time: zeroing pages takes long enough to keep other workers' threads from their steps
        self._allocator = ThreadPoolExecutor(1, thread_name_prefix="regions")

    def start(self, serve: Callable[[socket.socket], Awaitable[None]]) -> None:
        """Listen, if there is a path to listen at. `serve` answers the calls on a life line until it closes."""
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
        """Close every region and the socket. Nothing if it was done."""
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
        """A region for a live session; NoSharedMemory, of which frames are the way out, if there is none to have."""
        if self._listener is None:
            raise NoSharedMemory(problem="this server does not share any")
        if request.manifest_hash != model.layout.manifest_hash:
            raise ManifestChanged(model=model.name)
        gradients = Places(model.layout, _wire(request.push_dtype))
        answer = Places(model.layout, _wire(request.pull_dtype))
        memory = self._memory_for(model, request.device_uuid)
        region = Region(model, request.identity, gradients, answer, self._budget, memory)
        self._close_of(model, request.identity.worker)
        await self._until_gone(model, request.identity.worker)
        self._close_of(model, request.identity.worker)
        self._reserve(region)
        self._regions[region.number] = region
        allocating = asyncio.get_running_loop().run_in_executor(self._allocator, region.allocate)
        region.hold_until(allocating)
        try:
            await asyncio.shield(allocating)  # a caller that goes away leaves the thread at work
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
        """Where a region lies that is asked for on a device (or on none)."""
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
            if known.model is model and known.identity.worker == worker:
                self._close(known)

    async def _until_gone(self, model: Model, worker: str) -> None:
        """Wait a while for what a worker has given up on the device: it has said so, and the budget does not know yet."""
        leaving = [r for r in self._leaving if r.model is model and r.identity.worker == worker]
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
        """The region of this number; None for 0, NoSharedMemory unless it is this very session's."""
        if number == 0:
            return None
        region = self._regions.get(number)
        if region is None or region.line is None:
            raise NoSharedMemory(problem="the region was closed")
        own, theirs = region.identity, identity
        if (own.model_uid, own.worker, own.epoch) != (theirs.model_uid, theirs.worker, theirs.epoch):
            raise NoSharedMemory(problem="the region is another session's")
        return region

    def close_stale(self) -> None:
        """Close the regions whose session has ended."""
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
        """One connection: the token in, the descriptors out, then the worker's calls until it is gone."""
        region: Region | None = None
        connection.setblocking(False)
        try:
            try:
                region = self._claim(await _token(connection))
            finally:
                self._waiting -= 1
            if region is None:
                return
            region.line = connection
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
            if region.line is None and not region.closed and secrets.compare_digest(region.token, token):
                return region
        return None


async def _token(connection: socket.socket) -> bytes:
    """What a process of our own user says first; too short if it says no more."""
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
    """PermissionError unless the other end is a process of this server's user, or of root."""
    sent = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(sent)
    if uid not in (0, os.geteuid()):
        raise PermissionError(f"user {uid} is not this server's")


def _wire(dtype: int) -> torch.dtype | None:
    return None if dtype == DType.DTYPE_UNSPECIFIED else dtypes.to_torch(dtype, "the region asked for")
