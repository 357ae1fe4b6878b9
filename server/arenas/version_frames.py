"""The frames of one version of the parameters, made once for all readers: dense ones, and rows."""

from __future__ import annotations

import asyncio
import copy
import io
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

import torch

from pushstep.optim.ops.rows import moved
from pushstep.proto.types_pb2 import Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.buffers import MessagePool
from pushstep.proto.wire.frames import Piece, Source, Writer, pack
from pushstep.proto.wire.layout import ID_BYTES, Slot

from ..staging.read_budget import ReadBudget
from .arena import Arenas

if TYPE_CHECKING:
    from pushstep.optim.ops.rows import Moved

# Wider rows are copied before they are sent: a chunk ends between rows where it can.
WIDEST_BYTES: Final = 64 << 10


class DenseFrames:
    """The frames of one version's dense parameters: sent as they are made, kept while a reader needs them."""

    def __init__(self, segments: list[Segment], memory: MessagePool, clock: Callable[[], float]) -> None:
        self.segments = segments
        self._clock = clock
        # when a reader last took a frame, or a frame was made
        self.moved_s = self._clock()
        self._memory = memory
        self._buffers: list[io.BytesIO] = []
        self._made: list[bytes] = []
        self._complete = False
        self._fault: Exception | None = None
        self._readers: list[asyncio.Future[None]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the elements in all frames."""
        return sum((s.stop - s.start) * dtypes.to_torch(s.dtype, "segment").itemsize for s in self.segments)

    def _take(self, size_bytes: int) -> io.BytesIO:
        if not self._buffers:
            weakref.finalize(self, self._memory.give_back, self._buffers).atexit = False
        self._buffers.append(self._memory.take(size_bytes))
        return self._buffers[-1]

    def make(self, bodies: Sequence[Sequence[Source]], wake: Callable[[Callable[[], None]], object]) -> None:
        """Make all frames, outside the event loop (`DeviceStream.publish`).

        `wake` runs a call on the event loop.
        """
        try:
            for frame in pack(bodies, take=self._take):
                self._made.append(frame)
                self.moved_s = self._clock()
                wake(self._wake)
        except Exception as error:
            self._fault = error
            raise
        finally:
            self._complete = True
            wake(self._wake)

    def made(self) -> list[bytes] | None:
        """All frames, once they are there, for a reader who takes them now; None before that."""
        if not self._complete or self._fault is not None:
            return None
        self.moved_s = self._clock()
        return self._made

    def _wake(self) -> None:
        readers, self._readers = self._readers, []
        for reader in readers:
            if not reader.done():
                reader.set_result(None)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        sent = 0
        # in this order: when `_complete` is seen to be set, every frame is there
        while not (self._complete and sent == len(self._made)):
            if sent < len(self._made):
                yield self._made[sent]
                self.moved_s = self._clock()
                sent += 1
            else:
                reader = asyncio.get_running_loop().create_future()
                self._readers.append(reader)
                await reader
        if self._fault is not None:
            raise copy.copy(self._fault)


class RowFrames:
    """The frames of what is sent by rows, for readers that have the same version.

    The budget counts them while they exist.
    """

    def __init__(self, segments: list[Segment], frames: list[bytes], budget: ReadBudget, nbytes: int) -> None:
        self.segments = segments
        self.frames = frames
        weakref.finalize(self, budget.give_back, nbytes).atexit = False


def fetched(arenas: Arenas, body: Sequence[Piece]) -> list[Source]:
    """The sources of frames for pieces that may lie on the device."""
    return [source for piece in body for source in arenas.device_stream.outgoing(piece.source, piece.dtype)]


def dense_runs(arenas: Arenas, wire: torch.dtype | None) -> list[tuple[Segment, list[Slot]]]:
    """The segments of the parameters that are not sent by rows, each with its slots. Do not write to them."""
    if not arenas.row_changes.versions:
        return arenas.layout.whole(wire)
    plain = [slot for slot in arenas.layout.slots if slot.index not in arenas.row_changes.versions]
    return arenas.layout.dense_segments(plain, wire)


def rows_bytes(slot: Slot, ids: torch.Tensor | None, wire: torch.dtype | None) -> int:
    """Bytes of a segment with some rows of a parameter, or with all if that is no larger or `ids` is None."""
    row_bytes = slot.row_elements * (wire or slot.dtype).itemsize
    whole_bytes = slot.rows * row_bytes
    return whole_bytes if ids is None else min(whole_bytes, ids.numel() * (ID_BYTES + row_bytes))


def changed_rows(
    arenas: Arenas, slot: Slot, ids: torch.Tensor | None, wire: torch.dtype | None
) -> tuple[Segment, torch.Tensor, torch.Tensor | None]:
    """A segment that carries some rows of a parameter, or all of it when that is no larger or `ids` is None.

    Also the parameter, and the ids of the rows: None for all.
    """
    dtype = wire or slot.dtype
    segment = Segment(
        arena=slot.arena, start=slot.start, stop=slot.stop, dtype=dtypes.to_wire(dtype, "segment")
    )
    table = arenas.view(slot)
    if ids is None or rows_bytes(slot, ids, wire) == rows_bytes(slot, None, wire):
        return segment, table, None
    segment.rows = ids.numel()
    return segment, table, ids


def rows_sources(
    arenas: Arenas, some: Sequence[tuple[Segment, torch.Tensor, torch.Tensor | None]]
) -> Iterator[list[Source]]:
    """The sources of frames for parameters, each whole or by some of its rows: their ids, then the rows.

    Each is made when it is asked for, so that only one copy exists at once.
    """
    named = [(table, ids) for segment, table, ids in some if ids is not None and _is_gathered(segment, table)]
    rows = moved([table for table, _ in named], [ids for _, ids in named]) if named else None
    gathered = 0
    for segment, table, ids in some:
        dtype = dtypes.to_torch(segment.dtype, "segment")
        if ids is None:
            yield fetched(arenas, [Piece(table, dtype)])
        elif rows is not None and _is_gathered(segment, table):
            yield [Piece(ids, torch.int64), GatheredRows(rows, gathered)]
            gathered += 1
        else:
            yield fetched(arenas, [Piece(ids, torch.int64), Piece(table.index_select(0, ids), dtype)])


def _is_gathered(segment: Segment, table: torch.Tensor) -> bool:
    narrow = 0 < table.nbytes <= WIDEST_BYTES * table.shape[0]
    return table.is_cpu and dtypes.to_torch(segment.dtype, "segment") == table.dtype and narrow


class GatheredRows:
    """The source of some rows of a table in host memory, read when their frame is made: before the next step is taken."""

    def __init__(self, rows: Moved, table: int) -> None:
        """table: its place among those of `rows`."""
        self._rows = rows
        self._table = table
        # a chunk never splits a row
        self.unit_bytes = rows.row_bytes(table)
        self.nbytes = rows.count(table) * self.unit_bytes

    def writer(self) -> Writer:
        """A writer that gathers straight into its target."""

        def write(target: torch.Tensor, start: int) -> None:
            first, count = start // self.unit_bytes, target.numel() // self.unit_bytes
            self._rows.gather_of(self._table, target.data_ptr(), first, first + count)

        return write
