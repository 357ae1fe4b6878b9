"""The memory of one membership: slots for gradients, the place where parameters come back, and the life line.

On the host both sides map two files that the server has sealed; a gradient may lie in its slot from the moment when
backward makes it. On a device it is what `imported_memory.py` has opened, and gradients are copied in at the step.
"""

from __future__ import annotations

import fcntl
import os
import socket
import weakref
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from pushstep.optim.copies import copy
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import NoSharedMemory
from pushstep.proto.frames import Piece
from pushstep.proto.layout import Layout, Slot
from pushstep.proto.region import Places, SharedBody, SharedSlot, mapped, write

from .gradients import Rows
from .imported_memory import ImportedMemory
from .line import Line
from .transport import Body, Pulled

HANDOVER_S: Final = 5.0
_GET_SEALS: Final = 1034
_SEAL_SHRINK: Final = 0x2
Key = tuple[bytes, int, int, int]


class Region:
    """Mapped memory: slots for gradients, and the place where parameters come back."""

    def __init__(
        self,
        opened: pb.OpenRegionResponse,
        layout: Layout,
        wires: Any,
        key: Key,
        timeout_s: float,
        where: torch.device | None,
    ) -> None:
        """`where`: the device that it was asked for on; None: the host."""
        self.number = opened.region
        self.key = key
        self.gradients = Places(layout, wires[0])
        self.answer = Places(layout, wires[1])
        if (opened.slot_bytes, opened.answer_bytes) != (self.gradients.nbytes, self.answer.nbytes):
            raise NoSharedMemory(problem="the server lays it out in another way")
        self._imported: ImportedMemory | None = None
        if where is not None and opened.device_uuid:
            connection, self._imported = _import(opened, where)
            slots, answer = self._imported.slots, self._imported.answer
        else:
            connection, slots, answer = _map(opened)
        self.line = Line(connection, timeout_s)
        self._parameters = SharedSlot(answer)
        self.slots: list[SharedSlot] = [
            SharedSlot(slots[start : start + opened.slot_bytes])
            for start in range(0, slots.numel(), opened.slot_bytes)
        ]
        self._range = (slots.data_ptr(), slots.data_ptr() + slots.numel())
        self._lent: dict[tuple[int, int], weakref.ref[Any]] = {}
        self._current = 0
        self._fresh = True

    def close(self) -> None:
        """Cut the life line. The host's memory stays mapped for as long as somebody holds a gradient in it."""
        if self._imported is not None:
            self._imported.close()
        self.line.close()

    # Gradients that lie where they will be read.

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in one of the slots."""
        return tensor.is_cpu and self._range[0] <= tensor.data_ptr() < self._range[1]

    def lend(self, slot: Slot) -> Tensor | None:
        """A parameter's place in the slot of the coming push, as a tensor; None while an earlier one is still held.

        On a device there is none to lend.
        """
        if self._imported is not None:
            return None
        if self._fresh and not self._is_free(self._current, slot):
            free = (index for index in range(len(self.slots)) if self._is_free(index, slot))
            self._current = next(free, self._current)
        if not self._is_free(self._current, slot):
            return None
        self._fresh = False
        dtype = self.gradients.dtypes[slot.arena]
        start = self.gradients.start(slot.arena, slot.start)
        memory = self.slots[self._current].memory[start : start + (slot.stop - slot.start) * dtype.itemsize]
        # an object of its own, which dies with the last tensor over this place, whoever made that
        loan = memory.numpy()[:]
        self._lent[self._current, slot.index] = weakref.ref(loan)
        storage = torch.frombuffer(loan, dtype=dtype).untyped_storage()
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, slot.shape)  # type: ignore[call-overload,no-any-return]

    def _is_free(self, index: int, slot: Slot) -> bool:
        loan = self._lent.get((index, slot.index))
        return loan is None or loan() is None

    # Pushes and answers.

    def put(self, body: Body, gradients: Mapping[Slot, Tensor | Rows]) -> int | None:
        """Write a push's gradients into a slot; which one. None if they do not fit, or every slot is still looked at."""
        if not all(self.gradients.fits(segment) for segment in body.segments):
            return None
        order = [self._current, *(k for k in range(len(self.slots)) if k != self._current)]
        for index in order:
            if all(self._may_write(index, slot, gradient) for slot, gradient in gradients.items()):
                for segment, pieces in zip(body.segments, body.pieces, strict=True):
                    # they all are: a session whose pushes are made smaller opens no region
                    exact = [piece for piece in pieces if isinstance(piece, Piece)]
                    write(self.gradients, self.slots[index], segment, exact, copy)
                if self._imported is not None:
                    self._imported.finish()
                self._fresh = True
                return index
        return None

    def _may_write(self, index: int, slot: Slot, gradient: Tensor | Rows) -> bool:
        if self._is_free(index, slot):
            return True
        place = self.slots[index].memory.data_ptr() + self.gradients.start(slot.arena, slot.start)
        return (
            isinstance(gradient, Tensor)
            and gradient.dtype == self.gradients.dtypes[slot.arena]
            and gradient.is_contiguous()
            and gradient.data_ptr() == place
        )

    def answer_of(self, header: pb.PullHeader) -> Pulled:
        """What the server wrote. It is over the region's memory, and is read before the next call."""
        if self._imported is not None:
            self._imported.read()
        return Pulled(header, self.answer.layout, SharedBody(self.answer, self._parameters, header.segments))


def _map(opened: pb.OpenRegionResponse) -> tuple[socket.socket, Tensor, Tensor]:
    """The life line of a region on the host, its slots and the place of its parameters."""
    connection, fds = _fetch(opened)
    try:
        slots = _mapped(fds[0], opened.slots * opened.slot_bytes, True, opened.slot_bytes)
        return connection, slots, _mapped(fds[1], opened.answer_bytes, False, opened.answer_bytes)
    except BaseException:
        connection.close()
        raise
    finally:
        for fd in fds:
            os.close(fd)


def _import(opened: pb.OpenRegionResponse, where: torch.device) -> tuple[socket.socket, ImportedMemory]:
    """The same of a region on a device."""
    slots_bytes = opened.slots * opened.slot_bytes
    connection = _connected(opened)
    try:
        return connection, ImportedMemory(connection, where, slots_bytes, slots_bytes + opened.answer_bytes)
    except BaseException:
        connection.close()
        raise


def _connected(opened: pb.OpenRegionResponse) -> socket.socket:
    """The connection that keeps a region alive, on which the server has been shown the token."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        line.settimeout(HANDOVER_S)
        line.connect(opened.path)
        line.sendall(opened.token)
    except BaseException:
        line.close()
        raise
    return line


def _fetch(opened: pb.OpenRegionResponse) -> tuple[socket.socket, list[int]]:
    """The connection and its descriptors. Only the server that made the token knows it."""
    line = _connected(opened)
    try:
        _, fds, _, _ = socket.recv_fds(line, 1, 2, socket.MSG_CMSG_CLOEXEC)
        if len(fds) != 2:
            for fd in fds:
                os.close(fd)
            raise ConnectionRefusedError(f"what listens at {opened.path} is not the server")
    except BaseException:
        line.close()
        raise
    return line, list(fds)


def _mapped(fd: int, nbytes: int, writable: bool, prefault_bytes: int) -> Tensor:
    if os.fstat(fd).st_size != nbytes or not fcntl.fcntl(fd, _GET_SEALS) & _SEAL_SHRINK:
        raise ConnectionRefusedError("the memory that was handed over is not sealed at its size")
    return mapped(fd, nbytes, writable=writable, prefault_bytes=prefault_bytes)
