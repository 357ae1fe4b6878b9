"""Memory of the server's device, opened in this process: where gradients are put and parameters come from.

The server allocates and exports it, and frees it only once this side has said that it has closed it, or is gone (see
`server/exported_memory.py`). So nobody else may hold a tensor over it: gradients are copied in at the step, on the
device, which is little beside carrying them to the host, and no `p.grad` is ever made to lie there.

All that is asked of the device here goes through torch's current stream. It is waited for before a slot is handed
over, since the server waits for no stream of ours, and before the memory is closed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import Final

import torch
from torch import Tensor

from pushstep.proto import device_memory
from pushstep.proto.errors import NoSharedMemory
from pushstep.proto.line import HEAD_BYTES, READ_BYTES, Status, status_of

log = logging.getLogger("pushstep.client")
CLOSED: Final = b"\0"


class ImportedMemory:
    """What one region's handle has opened."""

    def __init__(self, connection: socket.socket, where: torch.device, slots_bytes: int, nbytes: int) -> None:
        """Receive the handle and open it, or raise with nothing left open."""
        self._where = where
        self._pid = os.getpid()
        self._driver = device_memory.driver
        self._address: int | None = None
        self._streams: list[device_memory.Stream] = []
        message, self._tell = _received(connection)
        try:
            handle = device_memory.checked(message, self._driver.uuid(where), nbytes)
            self._address = self._driver.open(where, handle)
            if self._driver.extent(where, self._address) < nbytes:
                raise NoSharedMemory(problem=f"less than {nbytes} bytes were opened")
            memory = self._driver.tensor(where, self._address, nbytes)
        except BaseException:
            self.close()
            raise
        self.slots: Tensor = memory[:slots_bytes]
        self.answer: Tensor = memory[slots_bytes:]

    def read(self) -> None:
        """Note that parameters are read by what the current stream is asked for now."""
        self._streams = [self._driver.stream(self._where)]

    def finish(self) -> None:
        """Wait until all that was asked of the device here is done."""
        for stream in (*self._streams, self._driver.stream(self._where)):
            stream.synchronize()
        self._streams = []

    def close(self) -> None:
        """Close it and say so. A child of fork only lets go: the memory is its parent's."""
        tell, self._tell = self._tell, -1
        if tell < 0:
            return
        try:
            if os.getpid() == self._pid:
                self._unmap()
                with contextlib.suppress(OSError):  # a server that is gone does not ask
                    os.write(tell, CLOSED)
        except (
            NoSharedMemory,
            RuntimeError,
        ) as error:  # the device is lost: it stays open until this process ends
            log.warning("memory of %s was not closed: %s", self._where, error)
        finally:
            os.close(tell)

    def _unmap(self) -> None:
        address, self._address = self._address, None
        if address is not None:
            self.finish()
            self._driver.close(self._where, address)


def _received(connection: socket.socket) -> tuple[bytes, int]:
    """The message that a region's server sends, and the descriptor that comes with it."""
    message, fds, _, _ = socket.recv_fds(connection, READ_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    try:
        if len(fds) != 1:
            raise ConnectionRefusedError("what listens there is not the server, or has refused")
        while len(message) < HEAD_BYTES or len(message) < HEAD_BYTES + status_of(message[:HEAD_BYTES])[1]:
            more = connection.recv(READ_BYTES)
            if not more:
                raise ConnectionResetError("the server closed it")
            message += more
        if status_of(message[:HEAD_BYTES])[0] is not Status.ANSWERED:
            raise ConnectionRefusedError("the server has refused")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return message[HEAD_BYTES:], fds[0]
