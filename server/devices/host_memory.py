"""A region's memory on the host: two sealed memfds. The worker writes one and reads the other."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable
from typing import Final

from torch import Tensor

from pushstep.proto.shared_memory.slots import mapped

from .device import Device

_ADD_SEALS: Final = 1033
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW, _SEAL_FUTURE_WRITE = 0x1, 0x2, 0x4, 0x10


class HostMemory:
    """Memory that the server and a worker both map. It is freed with the last mapping in either process."""

    on_device = False

    def __init__(self, device: Device) -> None:
        self._device = device
        self._fds: list[int] = []

    def allocate(self, slots_bytes: int, answer_bytes: int, prefault_bytes: int) -> tuple[Tensor, Tensor]:
        """The slots, with `prefault_bytes` of them touched now, and the place for parameters."""
        for nbytes in (slots_bytes, answer_bytes):
            fd = os.memfd_create("pushstep", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            self._fds.append(fd)
            os.ftruncate(fd, nbytes)
        sealed = _SEAL_SHRINK | _SEAL_GROW | _SEAL_SEAL
        written = mapped(self._fds[0], slots_bytes, writable=True, prefault_bytes=prefault_bytes)
        read = mapped(self._fds[1], answer_bytes, writable=True, prefault_bytes=answer_bytes)
        made = self._device.shared(written), self._device.shared(read)
        fcntl.fcntl(self._fds[0], _ADD_SEALS, sealed)
        fcntl.fcntl(self._fds[1], _ADD_SEALS, sealed | _SEAL_FUTURE_WRITE)  # the worker may only read it
        return made

    def hand_over(self, connection: socket.socket) -> None:
        """Send the descriptors to the worker and close them here."""
        try:
            socket.send_fds(connection, [b"\0"], self._fds)
        finally:
            self._close()

    def free(self, then: Callable[[], None]) -> None:
        """Release the memory. Calls `then` when its bytes are free."""
        self._close()
        then()

    def _close(self) -> None:
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)
