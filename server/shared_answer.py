"""One version of the parameters, written into a session's region by the model's writer, so never torn.

A step's kernel writes what it steps in the same pass; what the step did not touch is copied between two steps. Nothing
is written but while the call that asked for it is under way: the memory is the worker's again once it is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Set

import torch
from torch import Tensor

from pushstep.optim.copies import copy
from pushstep.proto.errors import ManifestChanged
from pushstep.proto.frames import Piece
from pushstep.proto.layout import Slot
from pushstep.proto.region import write

from .arena import Arenas
from .model import Model
from .publish import Published, dense_runs, rows_body
from .region import Region
from .staging import INLINE_BYTES


class SharedAnswer:
    """The answer of one call, for a worker that holds `have_version` of `timeline`."""

    def __init__(self, model: Model, region: Region, timeline: int, have_version: int | None) -> None:
        self.published: Published | None = None
        # what writing all of it would come to
        self.nbytes = region.answer.nbytes
        self.region = region
        self._model = model
        # now: a region that is closed under a step must not fail it
        self._memory = region.parameters
        self._timeline = timeline
        self._have = have_version

    def copy_out(self, arenas: Arenas) -> list[Tensor] | None:
        """Where a step's kernel may write each arena, too; None if it cannot write there."""
        if arenas.device.type != "cpu" or not self._same_layout(arenas):
            return None
        places = self.region.answer
        return [places.arena(self._memory, arena.index) for arena in arenas.layout.arenas]

    async def newest(self) -> Published:
        """The version of when the writer gets to it."""
        self.region.require_memory()
        small = self.nbytes <= INLINE_BYTES
        writing = self._model.stepper.submit(lambda: self.complete(self._model.arenas), small=small)
        self.region.hold_until(writing)
        return await asyncio.shield(writing)

    def after_step(self, arenas: Arenas, written: Set[int]) -> None:
        """Complete the version that a step has just made. A failure is left to who asks again: the step was taken."""
        with contextlib.suppress(Exception):
            self.published = self.complete(arenas, written)

    def complete(self, arenas: Arenas, written: Set[int] = frozenset()) -> Published:
        """In the writer's thread: the version of now, of which the slots `written` are there already."""
        if not self._same_layout(arenas):
            # a group was added since the push was let in: joining again, the worker finds its receipt
            raise ManifestChanged(model=self._model.name)
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
            arenas.lane.finish()
        return Published(
            arenas.timeline, arenas.version, arenas.layout, unchanged, segments, None, None, shared=True
        )

    def _same_layout(self, arenas: Arenas) -> bool:
        return arenas.layout.manifest_hash == self.region.layout.manifest_hash


def _unwritten(slots: list[Slot], written: Set[int]) -> list[tuple[int, int]]:
    """The ranges of neighbouring slots that are not in `written`."""
    ranges: list[tuple[int, int]] = []
    for slot in slots:
        if slot.index in written:
            continue
        if ranges and ranges[-1][1] == slot.start:
            ranges[-1] = (ranges[-1][0], slot.stop)
        else:
            ranges.append((slot.start, slot.stop))
    return ranges
