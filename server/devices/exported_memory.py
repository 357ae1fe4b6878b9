"""A region's memory on the device of the models: one allocation, exported to a worker that computes there.

Gradients are copied on the device into a slot, and the gate and the step read them there. Parameters come back the same
way. The host gets a sixteenth of a large push, for its digest (`optim/ops/digest.py`), and the norms' block sums.

**Ownership.** The server allocates and exports and the worker opens, so a worker that dies leaves nothing behind. CUDA
gives no guarantee for memory that is freed while another process has it open, so the server does not free it then. A
live worker reports on the region's own pipe that it has closed the memory. Otherwise its process must have ended, which
a pidfd tells. The end of the local socket is not enough: a dying process closes its sockets and its device in no known
order, and a live one may have lost its socket and still have copies under way. Until then the bytes count as taken.
The death of the server is the one case without a remedy: a worker then only closes the memory.

**Waiting.** No events cross the process border. The worker waits for its own stream before it names a slot. The gate's
thread waits for its stream, and the writer thread for the model's stream, before the call is answered. Freeing waits for
the whole device, so a thread does that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Final

import torch
from torch import Tensor

from pushstep.optim.ops.digest import xxh3_64
from pushstep.proto.errors import NoSharedMemory
from pushstep.proto.shared_memory import cuda_ipc as device_memory
from pushstep.proto.shared_memory.local_socket import Status, framed
from pushstep.proto.shared_memory.slots import Places, SharedBody, SharedSlot
from pushstep.proto.types_pb2 import DeviceMemory, Segment
from pushstep.proto.wire.frames import segment_table

log = logging.getLogger("pushstep.memory")
_CREDENTIALS: Final = struct.Struct("3i")


class ExportedBody(SharedBody):
    """A body that lies in a slot on the device."""

    def __init__(self, places: Places, slot: SharedSlot, segments: Sequence[Segment]) -> None:
        super().__init__(places, slot, segments)
        self._table = segment_table(segments)

    def digest(self, read: Callable[[int, int], None] | None = None) -> int:
        """The digest that the same body has when it is sent as frames. `read` is not called.

        Waits for the device.
        """
        parts = [self._slot.view(first, length, torch.uint8) for first, length in self._spans]
        return xxh3_64(self._table, parts) or 1  # never 0, as in BodyDigest


class ExportedMemory:
    """One region's memory, exported by the device's driver. Call it on the event loop, except `allocate`."""

    on_device = True

    def __init__(self, where: torch.device, freeing: Executor) -> None:
        """`freeing`: the thread for work that waits for the device."""
        self._where = where
        self._freeing = freeing
        self._address: int | None = None
        self._message = b""
        # the pipe and the pidfd that tell when no worker has it open any more
        self._closed = -1
        self._process = -1

    def allocate(self, slots_bytes: int, answer_bytes: int, prefault_bytes: int) -> tuple[Tensor, Tensor]:
        """Allocate and export. Returns the slots, and the place for parameters behind them."""
        driver, nbytes = device_memory.driver, slots_bytes + answer_bytes
        self._address = driver.allocate(self._where, nbytes)
        exported = DeviceMemory(
            device_uuid=driver.uuid(self._where),
            handle=driver.export(self._where, self._address),
            size_bytes=nbytes,
        )
        self._message = framed(Status.ANSWERED, exported.SerializeToString())
        memory = driver.tensor(self._where, self._address, nbytes)
        return memory[:slots_bytes], memory[slots_bytes:]

    def hand_over(self, connection: socket.socket) -> None:
        """Send the handle, and the pipe on which to report that it was closed.

        ConnectionError if the worker does not read. The worker's process is watched from then on.
        """
        sent = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, _, _ = _CREDENTIALS.unpack(sent)
        process = os.pidfd_open(pid)
        closed, tell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if socket.send_fds(connection, [self._message], [tell]) < len(self._message):
                raise ConnectionError("the worker does not read")
        except BaseException:  # the worker has no handle
            os.close(process)
            os.close(closed)
            raise
        finally:
            os.close(tell)
        self._process, self._closed = process, closed

    def free(self, then: Callable[[], None]) -> None:
        """Free the memory once no worker has it open. Calls `then` when its bytes are free."""
        if self._process < 0:
            self._free(then)
            return
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(self._process)
            loop.remove_reader(self._closed)
            os.close(self._process)
            os.close(self._closed)
            self._free(then)

        def told() -> None:
            if os.read(self._closed, 1):
                ended()
            else:  # the pipe was closed without a report: wait for the end of the process
                loop.remove_reader(self._closed)

        loop.add_reader(self._process, ended)
        loop.add_reader(self._closed, told)

    def _free(self, then: Callable[[], None]) -> None:
        address, self._address = self._address, None
        if address is None:
            then()
            return
        loop = asyncio.get_running_loop()

        def freed() -> None:
            try:
                device_memory.driver.free(self._where, address)
            except NoSharedMemory as error:  # the device is lost: so is everything on it
                log.error("a region on the device was not given back: %s", error.message)
            with contextlib.suppress(RuntimeError):  # the loop has ended: nothing counts the bytes any more
                loop.call_soon_threadsafe(then)

        with contextlib.suppress(RuntimeError):  # the server has stopped: the memory goes with its process
            self._freeing.submit(freed)
