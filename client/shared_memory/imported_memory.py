"""Memory of the server's device, opened in this process: gradients go in, parameters come out.

The server allocates and exports the memory. It frees the memory only after this process has said that it has closed it,
or has ended (see `server/devices/exported_memory.py`). So user code must not hold a tensor over it: gradients are
copied in at the step, on the device, which costs little beside a copy to the host, and no `p.grad` is placed there.

All device work here goes through torch's current stream. The stream is synchronised before a slot is handed over, since
the server does not wait for this process's streams, and before the memory is closed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import Final

import torch
from torch import Tensor

from pushstep.proto.errors import NoSharedMemory
from pushstep.proto.shared_memory import cuda_ipc as device_memory
from pushstep.proto.shared_memory.local_socket import HEAD_BYTES, READ_BYTES, Status, status_of

log = logging.getLogger("pushstep.client")
CLOSED: Final = b"\0"


class ImportedMemory:
    """Owns the memory that one region's handle opened, as two byte tensors: `slots` and `answer`."""

    def __init__(self, connection: socket.socket, where: torch.device, slots_bytes: int, nbytes: int) -> None:
        """Receive the handle and open it, or raise (NoSharedMemory, OSError) with nothing left open."""
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
        """Note that the current stream reads parameters, so that `finish` waits for it."""
        self._streams = [self._driver.stream(self._where)]

    def finish(self) -> None:
        """Wait until all device work on this memory is done."""
        for stream in (*self._streams, self._driver.stream(self._where)):
            stream.synchronize()
        self._streams = []

    def close(self) -> None:
        """Close the memory and tell the server. A child of fork only closes its end of the pipe."""
        tell, self._tell = self._tell, -1
        if tell < 0:
            return
        try:
            if os.getpid() == self._pid:
                self._unmap()
                with contextlib.suppress(OSError):  # a server that is gone needs no answer
                    os.write(tell, CLOSED)
        except (NoSharedMemory, RuntimeError) as error:
            # the device is lost: the memory stays open until this process ends
            log.warning("memory of %s was not closed: %s", self._where, error)
        finally:
            os.close(tell)

    def _unmap(self) -> None:
        address, self._address = self._address, None
        if address is not None:
            self.finish()
            self._driver.close(self._where, address)


def _received(connection: socket.socket) -> tuple[bytes, int]:
    """The message with the handle, and the pipe's descriptor that comes with it.

    ConnectionRefusedError if the server refused or is not the server; ConnectionResetError if it closed.
    """
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
