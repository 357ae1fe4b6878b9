"""The region of one membership: slots for gradients, a place for the parameters, and the local socket.

On the host both sides map two files that the server has sealed. A gradient may lie in its slot as soon as backward has
made it. On a device the region is the memory that `imported_memory.py` opens, and gradients are copied in at the step.
"""

from __future__ import annotations

import fcntl
import os
import socket
import weakref
from collections.abc import Mapping
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor

from pushstep.optim.ops.copies import copy, copy_all
from pushstep.optim.ops.rows import Merging
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import NoSharedMemory
from pushstep.proto.shared_memory.slots import VIEWS_KEPT, Places, SharedBody, SharedSlot, mapped, write
from pushstep.proto.wire.layout import ID_BYTES, Layout, Slot

from ..gradients.body import Rows
from ..gradients.sparse import MergedRows
from ..gradients.stretch import Stretch
from ..transport.streams import Body, Pulled
from .imported_memory import ImportedMemory
from .local_socket import LocalSocket

HANDOVER_S: Final = 5.0
_GET_SEALS: Final = 1034
_SEAL_SHRINK: Final = 0x2
Key = tuple[bytes, int, int, int]


class Region:
    """Owns the mapped memory and local socket. Overwrites no gradient that the user holds in a slot."""

    def __init__(
        self,
        opened: pb.OpenRegionResponse,
        layout: Layout,
        wires: Any,
        key: Key,
        timeout_s: float,
        where: torch.device | None,
    ) -> None:
        """`where`: the requested device; None: the host. NoSharedMemory if the layouts differ."""
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
        self.local_socket = LocalSocket(connection, timeout_s)
        self._parameters = SharedSlot(answer)
        self.slots: list[SharedSlot] = [
            SharedSlot(slots[start : start + opened.slot_bytes])
            for start in range(0, slots.numel(), opened.slot_bytes)
        ]
        self._range = (slots.data_ptr(), slots.data_ptr() + slots.numel())
        self._lent: dict[tuple[int, int], weakref.ref[Any]] = {}
        # by slot, the places of the dense gradients of the last push, and their addresses
        self._placed: dict[int, tuple[list[Slot], list[Tensor], list[int]]] = {}
        self._current = 0
        self._fresh = True

    def close(self) -> None:
        """Close the local socket. The host's memory stays mapped while the user holds a gradient in it."""
        if self._imported is not None:
            self._imported.close()
        self.local_socket.close()

    # Gradients in place.

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in one of the host's slots."""
        return tensor.is_cpu and self._range[0] <= tensor.data_ptr() < self._range[1]

    def lend(self, slot: Slot) -> Tensor | None:
        """A parameter's place in the slot of the next push, as a tensor of its dtype and shape.

        None while the user still holds an earlier tensor over that place, and always None on a device.
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
        # a numpy view for this loan: it dies with the last tensor over this place, which frees the place
        loan = memory.numpy()[:]
        self._lent[self._current, slot.index] = weakref.ref(loan)
        storage = torch.frombuffer(loan, dtype=dtype).untyped_storage()
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, slot.shape)  # type: ignore[call-overload,no-any-return]

    def _is_free(self, index: int, slot: Slot) -> bool:
        loan = self._lent.get((index, slot.index))
        return loan is None or loan() is None

    # Pushes and answers.

    def put(self, body: Body, gradients: Mapping[Slot, Tensor | Rows]) -> int | None:
        """Write a push's gradients into a slot; its index. None if they do not fit or each slot is held."""
        if not all(map(self.gradients.fits, body.segments)):
            return None
        with_rows: list[Slot] = []
        dense = cast(Mapping[Slot, Tensor], gradients)
        if tuple in map(type, gradients.values()):
            with_rows = [slot for slot, source in gradients.items() if isinstance(source, tuple)]
            dense = {slot: source for slot, source in gradients.items() if isinstance(source, Tensor)}
        stretches, plain = self._sorted_out(body, dense)
        order: list[int] = [self._current, *range(self._current), *range(self._current + 1, len(self.slots))]
        for index in order:
            if (
                all(self._is_free(index, slot) for slot in with_rows)
                and self._put_stretches(index, stretches)
                and self._put_dense(index, list(plain), list(plain.values()))
            ):
                if with_rows:
                    self._put_rows(index, body)
                if self._imported is not None:
                    self._imported.finish()
                self._fresh = True
                return index
        return None

    def _put_rows(self, index: int, body: Body) -> None:
        """Write the row-sparse gradients; those that are merged on the way by one kernel for all tables."""
        base = self.slots[index].memory.data_ptr()
        together: dict[Merging, dict[int, int]] = {}
        for segment, pieces in zip(body.segments, body.pieces, strict=True):
            if not segment.HasField("rows"):
                continue
            last = pieces[-1]
            if isinstance(last, MergedRows) and self._imported is None:
                place, _ = self.gradients.span(segment)
                together.setdefault(last.merging, {})[last.table] = base + place
            else:
                write(self.gradients, self.slots[index], segment, pieces, copy)
        for merging, places in together.items():
            ids_to = [places[table] for table in range(len(merging.counts))]
            rows_to = [at + ID_BYTES * n for at, n in zip(ids_to, merging.counts, strict=True)]
            merging.write_all(rows_to, ids_to)

    def _sorted_out(
        self, body: Body, dense: Mapping[Slot, Tensor]
    ) -> tuple[list[tuple[int, Stretch]], Mapping[Slot, Tensor]]:
        """The stretches of a push, each with its first byte in a slot, and the gradients that are in none."""
        stretches = [
            (self.gradients.start(segment.arena, segment.start), pieces[0])
            for segment, pieces in zip(body.segments, body.pieces, strict=True)
            if pieces and isinstance(pieces[0], Stretch)
        ]
        if not stretches or self._imported is not None:
            return [], dense
        if sum(len(stretch.indices) for _, stretch in stretches) == len(dense):
            return stretches, {}
        covered = {int(index) for _, stretch in stretches for index in stretch.indices}
        return stretches, {slot: source for slot, source in dense.items() if slot.index not in covered}

    def _put_stretches(self, index: int, stretches: list[tuple[int, Stretch]]) -> bool:
        """Gather stretches into their places, except what lies there; False if a place is held."""
        base = self.slots[index].memory.data_ptr()
        held = [number for (at, number), loan in self._lent.items() if at == index and loan() is not None]
        for start, stretch in stretches if held else ():
            places = np.searchsorted(stretch.indices, held)
            places = places[places < len(stretch.indices)]
            places = places[np.isin(stretch.indices[places], held)]
            if (stretch.addresses[places] != base + start + stretch.runs.starts[places]).any():
                return False
        for start, stretch in stretches:
            if not held:
                stretch.runs.gather(base + start, stretch.addresses)
                continue
            targets = base + start + stretch.runs.starts[:-1]
            stretch.runs.gather_those(targets, stretch.addresses, stretch.addresses != targets)
        return True

    def _put_dense(self, index: int, slots: list[Slot], sources: list[Tensor]) -> bool:
        """Copy dense gradients into their places, except those that lie there; False if one is held."""
        if not slots:
            return True
        _, targets, addresses = self._places(index, slots)
        if not self._lent:
            copy_all(targets, sources)
            return True
        away = [
            k
            for k, source in enumerate(sources)
            if source.data_ptr() != addresses[k]
            or source.dtype is not targets[k].dtype
            or not source.is_contiguous()
        ]
        if not all(self._is_free(index, slots[k]) for k in away):
            return False
        copy_all([targets[k] for k in away], [sources[k] for k in away])
        return True

    def _places(self, index: int, slots: list[Slot]) -> tuple[list[Slot], list[Tensor], list[int]]:
        placed = self._placed.get(index)
        if placed is None or placed[0] != slots:
            targets = [self._place(index, slot) for slot in slots]
            placed = slots, targets, list(map(Tensor.data_ptr, targets))
            if len(slots) <= VIEWS_KEPT:
                self._placed[index] = placed
        return placed

    def _place(self, index: int, slot: Slot) -> Tensor:
        """A parameter's place in a slot, as a tensor of the gradients' dtype and the parameter's shape."""
        dtype = self.gradients.dtypes[slot.arena]
        start = self.gradients.start(slot.arena, slot.start)
        nbytes = (slot.stop - slot.start) * dtype.itemsize
        with torch.inference_mode(False):
            return self.slots[index].memory[start : start + nbytes].view(dtype).view(slot.shape)

    def answer_of(self, header: pb.PullHeader) -> Pulled:
        """The answer that the server wrote. It lies in the region's memory: read it before the next call."""
        if self._imported is not None:
            self._imported.read()
        return Pulled(header, self.answer.layout, SharedBody(self.answer, self._parameters, header.segments))


def _map(opened: pb.OpenRegionResponse) -> tuple[socket.socket, Tensor, Tensor]:
    """The connection of a region on the host, its slots and the place of its parameters, as byte tensors."""
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
    """The connection of a region on a device, and its opened memory."""
    slots_bytes = opened.slots * opened.slot_bytes
    connection = _connected(opened)
    try:
        return connection, ImportedMemory(connection, where, slots_bytes, slots_bytes + opened.answer_bytes)
    except BaseException:
        connection.close()
        raise


def _connected(opened: pb.OpenRegionResponse) -> socket.socket:
    """The connection that keeps a region alive, after the token was sent to the server."""
    local_socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        local_socket.settimeout(HANDOVER_S)
        local_socket.connect(opened.path)
        local_socket.sendall(opened.token)
    except BaseException:
        local_socket.close()
        raise
    return local_socket


def _fetch(opened: pb.OpenRegionResponse) -> tuple[socket.socket, list[int]]:
    """The connection and its two descriptors. ConnectionRefusedError if the listener is not the server.

    Only the server that made the token knows it, and hands the descriptors over for it.
    """
    local_socket = _connected(opened)
    try:
        _, fds, _, _ = socket.recv_fds(local_socket, 1, 2, socket.MSG_CMSG_CLOEXEC)
        if len(fds) != 2:
            for fd in fds:
                os.close(fd)
            raise ConnectionRefusedError(f"what listens at {opened.path} is not the server")
    except BaseException:
        local_socket.close()
        raise
    return local_socket, list(fds)


def _mapped(fd: int, nbytes: int, writable: bool, prefault_bytes: int) -> Tensor:
    if os.fstat(fd).st_size != nbytes or not fcntl.fcntl(fd, _GET_SEALS) & _SEAL_SHRINK:
        raise ConnectionRefusedError("the memory that was handed over is not sealed at its size")
    return mapped(fd, nbytes, writable=writable, prefault_bytes=prefault_bytes)
