"""Writes one version of the parameters into a session's region, in place of frames.

The model's writer thread does it, so a version is never torn. A step's kernel writes the parameters that it steps, in
the same pass. The others are copied between two steps. Nothing is written except during the call that asked for it:
once the call is answered, the memory belongs to the worker again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Set

import torch
from torch import Tensor

from pushstep.optim.ops.copies import copy
from pushstep.proto.errors import ManifestChanged
from pushstep.proto.shared_memory.slots import write
from pushstep.proto.wire.frames import Piece
from pushstep.proto.wire.layout import Slot

from ..arenas.arena import Arenas
from ..arenas.publisher import Published, dense_runs, rows_body
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

    def after_step(self, arenas: Arenas, written: Set[int]) -> None:
        """Complete the version that a step has just made; the slots in `written` are there already.

        A failure must not fail the step, which is taken: `published` stays None, and `newest` then raises it.
        """
        try:
            self.published = self.complete(arenas, written)
        except Exception:  # noqa: BLE001 - `newest` meets the same fault, outside the step
            self.published = None

    def complete(self, arenas: Arenas, written: Set[int] = frozenset()) -> Published:
        """In the writer thread: write the current version, except the slots in `written`. ManifestChanged."""
        if not self._same_layout(arenas):
            # a group was added after the push was admitted: the worker joins again and finds its receipt
            raise ManifestChanged(model=self._model)
        have = self._have if self._timeline == arenas.timeline else None
        unchanged = have == arenas.version and not written
        segments = []
        if not unchanged:
            places, memory = self.region.answer, self._memory
            for segment, slots in dense_runs(arenas, places.wire):
                segments.append(segment)
                for start, stop in _unwritten(slots, written):
                    target = places.arena(memory, segment.arena)[start:stop]
                    copy(target, arenas.flat(segment.arena)[start:stop], non_blocking=True)
            for index in sorted(arenas.row_changed):
                ids = None if have is None else torch.nonzero(arenas.row_changed[index] > have).flatten()
                segment, body = rows_body(arenas, arenas.layout.slots[index], ids, places.wire)
                segments.append(segment)
                write(places, memory, segment, [Piece(p.source.cpu(), p.dtype) for p in body], copy)
            arenas.device_stream.finish()
        return Published(
            arenas.timeline, arenas.version, arenas.layout, unchanged, segments, None, None, shared=True
        )

    def _same_layout(self, arenas: Arenas) -> bool:
        return arenas.layout.manifest_hash == self.region.layout.manifest_hash


def _unwritten(slots: list[Slot], written: Set[int]) -> list[tuple[int, int]]:
    """The element ranges (start, stop) of slots that are not in `written`; adjacent ones are joined."""
    ranges: list[tuple[int, int]] = []
    for slot in slots:
        if slot.index in written:
            continue
        if ranges and ranges[-1][1] == slot.start:
            ranges[-1] = (ranges[-1][0], slot.stop)
        else:
            ranges.append((slot.start, slot.stop))
    return ranges
