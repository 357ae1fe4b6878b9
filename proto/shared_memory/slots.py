"""The layout of memory that worker and server both map: a slot holds a model's gradients or parameters.

The place of every element follows from the manifest and the wire dtype alone: a slot holds the arenas back to back,
each at a page boundary. So a gradient can be written to its place before it is known which others the push will hold.
A row-sparse segment lies in its own parameter's place, row ids and then rows, and has to fit there.

The other side may write to the memory at any time, so values read here may be garbage; that harms only the side that
wrote them. Row ids, which become indices, are copied out before they are used. Lengths come from the header alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..errors import MalformedFrame
from ..types_pb2 import Segment
from ..wire import dtypes
from ..wire.frames import BodyDigest, Piece, Source, segment_table
from ..wire.layout import Layout

PAGE_BYTES: Final = 4096
TOKEN_BYTES: Final = 16
# How much of a body is digested before `read` is called, so that its reader finds the bytes in the cache. Digest and
# norms of 64 MB take one thread 5.3 ms.
READ_BYTES: Final = 1 << 20
# Views kept per slot. A model of more parameters makes the other views anew at every call.
VIEWS_KEPT: Final = 1024
# madvise's constants, which Python does not name. 64 MB of fresh pages take 180 ms: when the memory is mapped, and
# not in the first step.
_POPULATE_READ: Final = 22
_POPULATE_WRITE: Final = 23


class Places:
    """The place of each element of a model in a slot of one wire dtype (None: each parameter's own dtype)."""

    def __init__(self, layout: Layout, wire: torch.dtype | None) -> None:
        self.layout = layout
        self.wire = wire
        self.dtypes = [wire or arena.dtype for arena in layout.arenas]
        self._starts: list[int] = []
        end = 0
        for arena, dtype in zip(layout.arenas, self.dtypes, strict=True):
            self._starts.append(end)
            end += -(-arena.elements * dtype.itemsize // PAGE_BYTES) * PAGE_BYTES
        self.nbytes = max(end, PAGE_BYTES)
        self._last: tuple[Sequence[Segment], Sequence[tuple[int, int]], bytes] | None = None

    def start(self, arena: int, element: int) -> int:
        """The byte of the slot at which an element of an arena begins."""
        return self._starts[arena] + element * self.dtypes[arena].itemsize

    def arena(self, slot: SharedSlot, arena: int) -> Tensor:
        """A whole arena in a slot, as a flat tensor."""
        start = self._starts[arena]
        size = self.layout.arenas[arena].elements * self.dtypes[arena].itemsize
        return slot.view(start, size, self.dtypes[arena])

    def fits(self, segment: Segment) -> bool:
        """Whether a segment's payload is no longer than its place. That holds for every dense segment."""
        if not segment.HasField("rows"):
            return True
        room = (segment.stop - segment.start) * self.dtypes[segment.arena].itemsize
        return self.layout.segment_bytes(segment) <= room

    def spans(self, segments: Sequence[Segment]) -> tuple[Sequence[tuple[int, int]], bytes]:
        """The `span` of each segment, and their table. Those of the last list are kept: it must not change."""
        last = self._last  # read once: pushes of many parameters ask in threads
        if last is None or last[0] is not segments:
            last = self._last = (
                segments,
                [self.span(segment) for segment in segments],
                segment_table(segments),
            )
        return last[1:]

    def span(self, segment: Segment) -> tuple[int, int]:
        """First byte and length of a legal segment's payload. MalformedFrame if it cannot lie in the slot."""
        arena, start, length = segment.arena, segment.start, self.layout.segment_bytes(segment)
        if segment.HasField("elements"):
            raise MalformedFrame(problem="a shared segment is dense or row-sparse, not element-sparse")
        dtype = self.dtypes[arena]
        if dtypes.to_torch(segment.dtype, "segment") is not dtype:
            raise MalformedFrame(
                problem="a shared segment is of another dtype than its region was opened for"
            )
        if length > (segment.stop - start) * dtype.itemsize:
            raise MalformedFrame(problem="a shared row-sparse segment is longer than its parameter's place")
        return self._starts[arena] + start * dtype.itemsize, length


class SharedSlot:
    """A slot's memory, and a cache of its views.

    Every call asks for the same views. A new view takes as long as copying a thousand elements, in torch as in numpy.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self._views: dict[tuple[int, int, torch.dtype], Tensor] = {}
        # copies by numpy take a third of the time
        self._bytes = memory.numpy() if memory.is_cpu else None

    def ids(self, start: int, nbytes: int) -> Tensor:
        """A copy of `nbytes` bytes from byte `start` on, as int64."""
        if self._bytes is None:
            return self.memory[start : start + nbytes].clone().view(torch.int64)
        return torch.from_numpy(self._bytes[start : start + nbytes].copy().view(np.int64))

    def view(self, start: int, nbytes: int, dtype: torch.dtype) -> Tensor:
        """`nbytes` bytes from byte `start` on, as a flat tensor of `dtype`."""
        key = start, nbytes, dtype
        found = self._views.get(key)
        if found is None:
            with torch.inference_mode(False):
                found = self.memory[start : start + nbytes].view(dtype)
            if len(self._views) < VIEWS_KEPT:
                self._views[key] = found
        return found


class SharedBody:
    """A body that lies in a slot. It is used as `frames.Assembly` is for a body that was sent."""

    def __init__(self, places: Places, slot: SharedSlot, segments: Sequence[Segment]) -> None:
        self._slot = slot
        self._spans, self._table = places.spans(segments)

    def part(self, segment: int, dtype: torch.dtype, start: int = 0, count: int | None = None) -> Tensor:
        """Elements of a segment as a flat tensor: `count` of `dtype` from byte `start` on.

        Row ids (int64) are a copy. All other elements lie in place.
        """
        first, length = self._spans[segment]
        size = length - start if count is None else count * dtype.itemsize
        if dtype is torch.int64:
            return self._slot.ids(first + start, size)
        return self._slot.view(first + start, size, dtype)

    def digest(self, read: Callable[[int, int], None] | None = None) -> int:
        """The digest that the same body has when it is sent.

        `read` is called as it goes, with a segment and how many of its bytes have been digested.
        """
        digest = BodyDigest(self._table)
        for segment, (first, length) in enumerate(self._spans):
            payload = self._slot.view(first, length, torch.uint8).numpy().data
            for start in range(0, length, READ_BYTES):
                stop = min(start + READ_BYTES, length)
                digest.update(payload[start:stop])
                if read is not None:
                    read(segment, stop)
        return digest.value


def write(
    places: Places,
    slot: SharedSlot,
    segment: Segment,
    pieces: Sequence[Source],
    copy: Callable[[Tensor, Tensor], None],
) -> None:
    """Put a segment's pieces in their place, tensors by `copy(target, source)`.

    A tensor that lies in its place already is left alone.
    """
    at, _ = places.span(segment)
    for piece in pieces:
        nbytes = piece.nbytes
        if not isinstance(piece, Piece):
            _made(slot.memory[at : at + nbytes], piece)
            at += nbytes
            continue
        source = piece.source
        if piece.dtype == torch.int64:  # ids may lie unaligned, so they are copied as bytes
            slot.memory[at : at + nbytes].copy_(source.detach().contiguous().view(torch.uint8))
        else:
            target = slot.view(at, nbytes, piece.dtype)
            lies_there = source.data_ptr() == target.data_ptr() and source.dtype == target.dtype
            if not (lies_there and source.is_contiguous()):
                copy(target if source.dim() == 1 else target.view(source.shape), source)
        at += nbytes


def _made(target: Tensor, piece: Source) -> None:
    """Have a source write its bytes, which it does in host memory."""
    if target.is_cpu:
        piece.writer()(target, 0)
        return
    host = torch.empty(target.numel(), dtype=torch.uint8, device="cpu")
    piece.writer()(host, 0)
    target.copy_(host)


@torch.inference_mode(False)  # a tensor made in inference mode may only be written to in that mode
def mapped(fd: int, nbytes: int, *, writable: bool, prefault_bytes: int) -> Tensor:
    """A file's bytes as a uint8 tensor. They stay mapped for as long as any tensor over them lives."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
    area = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, protection)
    with contextlib.suppress(OSError):  # Linux before 5.14 cannot; the first step then takes the page faults
        area.madvise(_POPULATE_WRITE if writable else _POPULATE_READ, 0, min(prefault_bytes, nbytes))
    if writable:
        return torch.frombuffer(area, dtype=torch.uint8)
    # torch warns of read-only buffers, so it is given a ctypes array over the same memory; nothing here writes to it
    view = np.frombuffer(area, np.uint8)
    memory = (ctypes.c_uint8 * nbytes).from_address(view.ctypes.data)
    memory._area = view  # type: ignore[attr-defined]  # keeps the mapping
    return torch.frombuffer(memory, dtype=torch.uint8)
