"""What a model's arenas held at one version, read beside training: nothing is copied that nobody overwrites.

The writer thread makes a mark between two steps, which takes no time. From then on `Arenas.writing` has whatever a write
is about to overwrite for the first time saved here first: blocks of dense parameters, single rows of tables
(`captured_table.py`). A reader takes the arenas in order, a chunk at a time, from what was saved or from where it lies.
One lock makes each chunk and each saving whole. So a step waits for a chunk at most, and what was read needs no saving.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch
from torch import Tensor

from pushstep.proto.errors import OutOfMemory
from pushstep.proto.types_pb2 import Segment
from pushstep.proto.wire.buffers import BufferPool
from pushstep.proto.wire.layout import Layout, Slot

from ..devices.device import DeviceStream
from ..process.memory import CPU, take
from ..staging.gradient import DensePart, RowsPart
from .captured_table import CHUNK_BYTES, SCANNED_ROWS, WHAT, CapturedTable, chunks_of

PARAMETER: Final = "parameter"
# In front of the id of the hook that keeps the average.
AVERAGE: Final = "average."
# What is saved at once.
BLOCK_ELEMENTS: Final = 1 << 20
# Memory of blocks that is kept for the next snapshot. To save 1 GB in memory that is there takes 0.07 s of CPU time, and in
# fresh memory, with its page faults, 0.6 to 1.3 s.
KEPT_BYTES: Final = 1 << 30
_POOL: Final = BufferPool(KEPT_BYTES)
LARGEST_ITEM_BYTES: Final = 8
NOTHING: Final = torch.empty(0, dtype=torch.uint8, device="cpu")


class Span(NamedTuple):
    """Elements [start, stop) of an arena: parameters and states."""

    arena: int
    start: int
    stop: int


class Averaged(NamedTuple):
    """The average that a hook keeps of an arena, all of it."""

    hook: str
    arena: int


# What a write overwrites.
Written = Span | Averaged | DensePart | RowsPart


def spans_of(segments: Iterable[Segment], slots: Iterable[Slot]) -> list[Span]:
    """The elements of segments and of parameters."""
    found = [Span(segment.arena, segment.start, segment.stop) for segment in segments]
    return found + [Span(slot.arena, slot.start, slot.stop) for slot in slots]


@dataclass(slots=True)
class _Run:
    """Neighbouring elements of an arena that are of no table."""

    start: int
    stop: int
    # by the tensor's name: saved blocks by number, and the first element that was not read
    saved: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    read_to: dict[str, int] = field(default_factory=dict)


class Capture:
    """A model's parameters, states and step counts at one version, with its extras and lineage."""

    def __init__(
        self,
        layout: Layout,
        timeline: int,
        version: int,
        arenas: Sequence[Mapping[str, Tensor]],
        steps: list[int],
        extras: Mapping[str, Tensor],
        lineage: Sequence[tuple[int, int]],
        averages: Mapping[str, Mapping[int, Tensor]],
        row_changed: Mapping[int, Tensor] | None = None,
        stream: DeviceStream | None = None,
    ) -> None:
        """arenas: each one's flat tensors, PARAMETER and its states by name. row_changed: each table's, by its slot.

        averages: by hook and arena.
        """
        self.layout = layout
        self.timeline = timeline
        self.version = version
        self.steps = steps
        self.extras = extras
        self.lineage = lineage
        self.has_averages = bool(averages)
        self._held = arenas
        self._arenas = [
            {**flats, **{AVERAGE + hook: kept[index] for hook, kept in averages.items() if index in kept}}
            for index, flats in enumerate(arenas)
        ]
        self._stream = stream or DeviceStream(CPU)
        self._lock = threading.Lock()
        self._closed = False
        # of blocks and rows that were saved; a block's go when it was read, those of rows when all is read
        self.saved_bytes = 0
        self._problem: OutOfMemory | None = None
        self.tables: dict[int, CapturedTable] = {}
        self._pieces: list[list[_Run | CapturedTable]] = []
        # all elements, of averages
        self._averaged = [_Run(0, arena.elements) for arena in layout.arenas]
        slots = [layout.slots[index] for index in row_changed or ()]
        for arena in layout.arenas:
            pieces: list[_Run | CapturedTable] = []
            flats, at = arenas[arena.index], 0
            for slot in sorted((slot for slot in slots if slot.arena == arena.index), key=_start):
                if slot.start == slot.stop:
                    continue
                if at < slot.start:
                    pieces.append(_Run(at, slot.start))
                tensors = {
                    name: flat[slot.start : slot.stop].view(slot.rows, -1) for name, flat in flats.items()
                }
                changed = (row_changed or {})[slot.index]
                self.tables[slot.index] = CapturedTable(slot, tensors, changed, version, self._stream)
                pieces.append(self.tables[slot.index])
                at = slot.stop
            if at < arena.elements:
                pieces.append(_Run(at, arena.elements))
            self._pieces.append(pieces)
        self._staging = NOTHING

    def names(self, arena: int) -> list[str]:
        """The tensors of an arena, large elements first, as a file has them."""
        flats = self._arenas[arena]
        return sorted(flats, key=lambda name: (-flats[name].itemsize, name))

    def dtype(self, arena: int, name: str) -> torch.dtype:
        """The element type of one of them."""
        return self._arenas[arena][name].dtype

    def element_bytes(self, arena: int) -> int:
        """Bytes of an element of an arena with its states."""
        return sum(flat.itemsize for flat in self._arenas[arena].values())

    @property
    def extras_bytes(self) -> int:
        """Bytes of the extras."""
        return sum(tensor.nbytes for tensor in self.extras.values())

    def dense_elements(self, arena: int) -> int:
        """How many elements of each are of no table."""
        return sum(piece.stop - piece.start for piece in self._pieces[arena] if isinstance(piece, _Run))

    @property
    def is_open(self) -> bool:
        """True while it may still be read."""
        return not self._closed

    # For the writer thread.

    def save(self, parts: Iterable[Written]) -> bool:
        """Save what a write is about to overwrite, where that was not read or saved. The write goes on in any case.

        False once nothing more is to be saved.
        """
        with self._lock:
            if self._closed or self._problem is not None:
                return False
            try:
                for part in parts:
                    self._save(part)
            except OutOfMemory as error:  # the snapshot fails, and not the step
                self._problem = error
                self._drop()
            return self._problem is None

    def _save(self, part: Written) -> None:
        if isinstance(part, Averaged):
            self._save_average(part)
            return
        if isinstance(part, RowsPart):
            table = self.tables.get(part.slot.index)
            if table is not None:
                self.saved_bytes += table.save_rows(part.ids)
                return
            part = Span(part.slot.arena, part.slot.start, part.slot.stop)
        start, stop = part.start, part.slots[-1].stop if isinstance(part, DensePart) else part.stop
        if part.arena >= len(self._pieces):  # of a group that was added since
            return
        for piece in self._pieces[part.arena]:
            if isinstance(piece, CapturedTable):
                if start < piece.slot.stop and piece.slot.start < stop:
                    self.saved_bytes += piece.save_whole()
            elif start < piece.stop and piece.start < stop:
                self._save_blocks(self._held[part.arena], piece, start, stop)

    def _save_average(self, part: Averaged) -> None:
        if part.arena < len(self._pieces):
            name, run = AVERAGE + part.hook, self._averaged[part.arena]
            flat = self._arenas[part.arena].get(name)
            if flat is not None and flat.numel():
                self._save_blocks({name: flat}, run, run.start, run.stop)

    def _save_blocks(self, flats: Mapping[str, Tensor], run: _Run, start: int, stop: int) -> None:
        for name, flat in flats.items():
            saved = run.saved.setdefault(name, {})
            first = max(start, run.start, run.read_to.get(name, 0)) - run.start
            last = min(stop, run.stop) - 1 - run.start
            if first > last:  # all of it was read
                continue
            for number in range(first // BLOCK_ELEMENTS, last // BLOCK_ELEMENTS + 1):
                if number not in saved:
                    begin = run.start + number * BLOCK_ELEMENTS
                    source = flat[begin : min(begin + BLOCK_ELEMENTS, run.stop)]
                    saved[number] = block_memory(source.numel(), source.dtype)
                    self._stream.fetch(saved[number], source)
                    self.saved_bytes += saved[number].nbytes

    # For the one reader.

    def whole(self, arena: int, name: str) -> Iterator[Tensor]:
        """A whole flat tensor, in parts. Each is valid until the next one is asked for. OutOfMemory."""
        if name.startswith(AVERAGE):
            yield from self._elements(arena, name, self._averaged[arena])
            return
        for piece in self._pieces[arena]:
            if isinstance(piece, CapturedTable):
                yield from self.rows(piece.slot.index, name, None)
            else:
                yield from self._elements(arena, name, piece)

    def dense(self, arena: int, name: str) -> Iterator[Tensor]:
        """The elements of a flat tensor that are of no table, in parts, as `whole` gives them."""
        for piece in self._pieces[arena]:
            if isinstance(piece, _Run):
                yield from self._elements(arena, name, piece)

    def rows(self, slot: int, name: str, ids: Tensor | None) -> Iterator[Tensor]:
        """The rows of a table with these ids, which ascend, or all rows; in parts, as `whole` gives them."""
        table = self.tables[slot]
        for want in chunks_of(table, ids, self.dtype(table.slot.arena, name).itemsize):
            with self._lock:
                self._require_whole()
                base = table.base(name)
                if isinstance(want, range):
                    part = self._staged(len(want) * table.slot.row_elements, base.dtype).view(len(want), -1)
                    self._stream.fetch(part, base[want.start : want.stop])
                else:
                    part = self._stream.gathered(base, want)
                fresh = table.take_fresh()
            table.over(part, name, want, fresh)
            yield part
        with self._lock:
            table.end(name)

    def touched(self, slot: int, since: int) -> Tensor:
        """The ids of a table's rows that have changed behind a version of this timeline, ascending."""
        table, found = self.tables[slot], []
        for first in range(0, table.slot.rows, SCANNED_ROWS):
            with self._lock:
                self._require_whole()
                found.append(table.touched(since, first))
        return torch.cat(found)

    def close(self) -> None:
        """Keep nothing any more."""
        with self._lock:
            self._closed = True
            self._drop()

    def _elements(self, arena: int, name: str, run: _Run) -> Iterator[Tensor]:
        flat = self._arenas[arena][name]
        step = CHUNK_BYTES // LARGEST_ITEM_BYTES  # a divisor of a block
        for begin in range(run.start, run.stop, step):
            end = min(begin + step, run.stop)
            number, offset = divmod(begin - run.start, BLOCK_ELEMENTS)
            with self._lock:
                self._require_whole()
                block = run.saved.get(name, {}).get(number)
                if block is None:
                    part = self._staged(end - begin, flat.dtype)
                    self._stream.fetch(part, flat[begin:end])
                else:
                    part = block[offset : offset + end - begin]
                    if offset + step >= BLOCK_ELEMENTS or end == run.stop:
                        del run.saved[name][number]
                        self.saved_bytes -= block.nbytes
                run.read_to[name] = end
            yield part

    def _staged(self, elements: int, dtype: torch.dtype) -> Tensor:
        if self._staging.nbytes < elements * dtype.itemsize:
            self._staging = take(max(elements * dtype.itemsize, CHUNK_BYTES), torch.uint8, WHAT)
        return self._staging[: elements * dtype.itemsize].view(dtype)

    def _require_whole(self) -> None:
        if self._problem is not None:
            raise self._problem
        if self._closed:
            raise RuntimeError("it is read no more")

    def _drop(self) -> None:
        self._pieces, self.tables, self._staging = [[] for _ in self._pieces], {}, NOTHING
        self._averaged = [_Run(0, 0) for _ in self._averaged]
        self.saved_bytes = 0


def block_memory(elements: int, dtype: torch.dtype) -> Tensor:
    """Memory for a block that is saved. OutOfMemory."""
    try:
        return _POOL.take(elements * dtype.itemsize).view(dtype)
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError if there is no memory
        raise OutOfMemory(what=WHAT, need=elements * dtype.itemsize) from error


def _start(slot: Slot) -> int:
    return slot.start


def rest() -> bool:
    """Free the memory that is kept for the next snapshot, if none was made since the last call. True if some was freed."""
    return _POOL.rest()
