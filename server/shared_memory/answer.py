"""Writes one version of the parameters into a session's region, in place of frames.

The model's writer thread does it, so a version is never torn. A step's kernel writes the parameters that it steps, in
the same pass. The others are copied between two steps. Nothing is written except during the call that asked for it:
once the call is answered, the memory belongs to the worker again.
"""

from __future__ import annotations

import asyncio

import torch
from torch import Tensor

from pushstep.optim.ops.copies import copy
from pushstep.optim.ops.rows import moved
from pushstep.proto.errors import ManifestChanged
from pushstep.proto.shared_memory.slots import write
from pushstep.proto.types_pb2 import Segment
from pushstep.proto.wire.frames import Piece
from pushstep.proto.wire.layout import ID_BYTES, Slot

from ..arenas.arena import Arenas, Flags, indices_of
from ..arenas.publisher import Published
from ..arenas.version_frames import changed_rows, dense_runs
from ..arenas.writer import ModelWriter
from ..process.inline import INLINE_BYTES
from .region import Region


class SharedAnswer:
    """The answer to one call, for a worker that holds `have_version` of `timeline`."""

    def __init__(
        self,
        model: str,
        arenas: Arenas,
        writer: ModelWriter,
        region: Region,
        timeline: int,
        have_version: int | None,
    ) -> None:
        self.published: Published | None = None
        # bytes that are written if nothing is unchanged
        self.nbytes = region.answer.nbytes
        self.wire = region.answer.wire
        self.region = region
        self._model = model
        self._arenas = arenas
        self._writer = writer
        # taken now: a region that closes during a step must not make the step fail
        self._memory = region.parameters
        self._timeline = timeline
        self._have = have_version

    def copy_out(self, arenas: Arenas) -> list[Tensor] | None:
        """For each arena, where a step's kernel may also write it; None if the kernel cannot write there."""
        if arenas.device.type != "cpu" or not self._same_layout(arenas):
            return None
        places = self.region.answer
        return [places.arena(self._memory, arena.index) for arena in arenas.layout.arenas]

    async def newest(self) -> Published:
        """Write the version that is newest when the writer gets to it. NoSharedMemory, ManifestChanged."""
        self.region.require_memory()
        small = self.nbytes <= INLINE_BYTES
        writing = self._writer.submit(lambda: self.complete(self._arenas), small=small)
        self.region.hold_until(writing)
        return await asyncio.shield(writing)

    def after_step(self, arenas: Arenas, written: Flags | None) -> None:
        """Complete the version that a step has just made; the slots that `written` marks are there already.

        A failure must not fail the step, which is taken: `published` stays None, and `newest` then raises it.
        """
        try:
            self.published = self.complete(arenas, written)
        except Exception:  # noqa: BLE001 - `newest` meets the same fault, outside the step
            self.published = None

    def complete(self, arenas: Arenas, written: Flags | None = None) -> Published:
        """In the writer thread: write the current version, except the slots that `written` marks. ManifestChanged."""
        if not self._same_layout(arenas):
            # a group was added after the push was admitted: the worker joins again and finds its receipt
            raise ManifestChanged(model=self._model)
        have = self._have if self._timeline == arenas.timeline else None
        unchanged = have == arenas.version and (written is None or not written.any())
        segments = []
        if not unchanged:
            places, memory = self.region.answer, self._memory
            for segment, slots in dense_runs(arenas, places.wire):
                segments.append(segment)
                for start, stop in _unwritten(slots, written):
                    target = places.arena(memory, segment.arena)[start:stop]
                    copy(target, arenas.flat(segment.arena)[start:stop], non_blocking=True)
            segments += self._write_rows(arenas, have)
            arenas.device_stream.finish()
        return Published(
            arenas.timeline, arenas.version, arenas.layout, unchanged, segments, None, None, shared=True
        )

    def _write_rows(self, arenas: Arenas, have: int | None) -> list[Segment]:
        """Write the tables' rows that have changed behind version `have`, by one kernel; their segments."""
        places, memory = self.region.answer, self._memory
        segments = []
        tables: list[Tensor] = []
        gathered: list[Tensor] = []
        targets: list[int] = []
        for index in sorted(arenas.row_changes.versions):
            found = arenas.row_changes.after(index, have)
            segment, table, ids = changed_rows(arenas, arenas.layout.slots[index], found, places.wire)
            segments.append(segment)
            if ids is None or not (
                table.is_cpu and memory.memory.is_cpu and places.dtypes[segment.arena] == table.dtype
            ):
                body = [table] if ids is None else [ids, table.index_select(0, ids)]
                kinds = [torch.int64, places.dtypes[segment.arena]][-len(body) :]
                pieces = [Piece(source.cpu(), kind) for source, kind in zip(body, kinds, strict=True)]
                write(places, memory, segment, pieces, copy)
            elif ids.numel():
                tables.append(table)
                gathered.append(ids)
                targets.append(memory.memory.data_ptr() + places.span(segment)[0])
        if tables:
            rows_to = [at + ID_BYTES * ids.numel() for at, ids in zip(targets, gathered, strict=True)]
            moved(tables, gathered).gather(rows_to, targets)
        return segments

    def _same_layout(self, arenas: Arenas) -> bool:
        return arenas.layout.manifest_hash == self.region.layout.manifest_hash


def _unwritten(slots: list[Slot], written: Flags | None) -> list[tuple[int, int]]:
    """The element ranges (start, stop) of slots that `written` does not mark; adjacent ones are joined."""
    marks = None if written is None else written[indices_of(slots)]
    if marks is None or not marks.any():
        return [(slots[0].start, slots[-1].stop)]
    if marks.all():
        return []
    ranges: list[tuple[int, int]] = []
    for slot, there in zip(slots, marks, strict=True):
        if there:
            continue
        if ranges and ranges[-1][1] == slot.start:
            ranges[-1] = (ranges[-1][0], slot.stop)
        else:
            ranges.append((slot.start, slot.stop))
    return ranges
