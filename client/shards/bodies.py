"""Cuts the body of a push or an upload into one for each rank.

A body is made whole, as for a server alone, and then cut. So what int8 and top-k leave out does not depend on the
number of ranks, and neither do their residuals. Dense sources are sliced and not copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pushstep.proto.types_pb2 import Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.dtypes import int8_bytes
from pushstep.proto.wire.frames import Piece, Source, Writer
from pushstep.proto.wire.layout import Layout, Slot

from ..transport.streams import Body
from .parts import Held, Part


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes [start, stop) of a source that cannot be sliced: an int8 gradient, gathered ones, merged rows."""

    source: Source
    start: int
    stop: int

    @property
    def unit_bytes(self) -> int:
        """The source's."""
        return self.source.unit_bytes

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return self.stop - self.start

    def writer(self) -> Writer:
        """A writer of the source's bytes from the start of the stretch on."""
        write, first = self.source.writer(), self.start

        def written(target: Tensor, start: int) -> None:
            write(target, first + start)

        return written


# Of a slot of a dense segment: the number of the segment, the slot's place in it, and the piece, if it is cut.
_Taken = tuple[int, int, Held | None]


class Cutting:
    """Cuts the bodies of one layout. The plan is kept while bodies have the same list of segments."""

    def __init__(self, whole: Layout, parts: Sequence[Part]) -> None:
        self._whole = whole
        self._parts = parts
        self._planned: Sequence[Segment] | None = None
        self._plans: list[tuple[list[Segment], list[list[_Taken]]]] = []

    def of(self, body: Body) -> list[Body]:
        """The body of each rank, in their order; one without segments for a rank that has no part in it."""
        if any(s.HasField("rows") or s.HasField("elements") for s in body.segments):
            return [self._sparse(body, part) for part in self._parts]
        if self._planned is not body.segments:
            self._plans = [self._plan(body.segments, part) for part in self._parts]
            self._planned = body.segments
        return [Body(segments, [self._sources(body, run) for run in runs]) for segments, runs in self._plans]

    def _sources(self, body: Body, run: Sequence[_Taken]) -> list[Source]:
        """The sources of a run of neighbours."""
        if not run:
            return []
        number = run[0][0]
        segment, sources = body.segments[number], body.pieces[number]
        slots = self._whole.slots_of(segment)
        if len(sources) == len(slots):
            return [_taken(sources[place], held) for _, place, held in run]
        # many gradients are gathered by one source
        itemsize = dtypes.to_torch(segment.dtype, "segment").itemsize
        (_, first, low), (_, last, high) = run[0], run[-1]
        start = slots[first].start + (0 if low is None else low.start) - segment.start
        stop = (slots[last].stop if high is None else slots[last].start + high.stop) - segment.start
        return [Bytes(sources[0], start * itemsize, stop * itemsize)]

    def _plan(self, segments: Sequence[Segment], part: Part) -> tuple[list[Segment], list[list[_Taken]]]:
        made: list[Segment] = []
        runs: list[list[_Taken]] = []
        for number, segment in enumerate(segments):
            for slots, taken in self._dense(number, segment, part):
                made.append(_segment(segment, slots))
                runs.append(taken)
        return made, runs

    def _dense(self, number: int, segment: Segment, part: Part) -> list[tuple[list[Slot], list[_Taken]]]:
        """The runs of neighbours in the rank's arenas, each with its slots and the sources of their values."""
        runs: list[tuple[list[Slot], list[_Taken]]] = []
        for place, slot in enumerate(self._whole.slots_of(segment)):
            held = part.of.get(slot.index)
            if held is None:
                continue
            taken = [] if slot.start == slot.stop else [(number, place, None if held.is_whole else held)]
            last = runs[-1][0][-1] if runs else None
            if last is not None and (last.arena, last.stop) == (held.slot.arena, held.slot.start):
                runs[-1][0].append(held.slot)
                runs[-1][1].extend(taken)
            else:
                runs.append(([held.slot], taken))
        return runs

    def _sparse(self, body: Body, part: Part) -> Body:
        """A body of which some segments name rows or elements."""
        segments: list[Segment] = []
        pieces: list[Sequence[Source]] = []
        for number, (segment, sources) in enumerate(zip(body.segments, body.pieces, strict=True)):
            for slots, taken in self._dense(number, segment, part):
                made = _segment(segment, slots)
                if segment.HasField("rows"):
                    held = part.of[self._whole.slots_of(segment)[0].index]
                    made.rows, found = _rows(held, sources)
                    # the parameter's step counts in each rank, and has to be named in one
                    if not made.rows and (segment.rows or held.first_row):
                        continue
                elif segment.HasField("elements"):
                    made.elements, found = self._elements(segment, slots, part, sources)
                else:
                    found = self._sources(body, taken)
                segments.append(made)
                pieces.append(found)
        return Body(segments, pieces)

    def _elements(
        self, segment: Segment, slots: Sequence[Slot], part: Part, sources: Sequence[Source]
    ) -> tuple[int, list[Source]]:
        """The selected elements that lie in a run of the rank's slots, counted from the run's first."""
        first, last = part.held[slots[0].index], part.held[slots[-1].index]
        start = first.whole.start + first.start - segment.start
        stop = last.whole.start + last.stop - segment.start
        indices, values = _of_piece(sources[0]), _of_piece(sources[1])
        low, high = _between(indices.source, start, stop)
        return high - low, [
            Piece(indices.source[low:high] - start, indices.dtype),
            Piece(values.source[low:high], values.dtype),
        ]


def _segment(segment: Segment, slots: Sequence[Slot]) -> Segment:
    """The segment of these slots of a rank, of the dtype and state of the whole model's segment."""
    return Segment(
        arena=slots[0].arena,
        start=slots[0].start,
        stop=slots[-1].stop,
        dtype=segment.dtype,
        state=segment.state,
        parameter=slots[0].index if segment.HasField("parameter") else None,
    )


def _taken(source: Source, held: Held | None) -> Source:
    if held is None:
        return source
    if isinstance(source, Piece):
        return Piece(held.view(source.source), source.dtype)
    # int8: its blocks are counted from the parameter's start, and a cut lies between two of them
    stop = source.nbytes if held.is_last else int8_bytes(held.stop)
    return Bytes(source, int8_bytes(held.start), stop)


def _rows(held: Held, sources: Sequence[Source]) -> tuple[int, list[Source]]:
    """The rows of a row-sparse gradient that lie in a piece; ids ascend."""
    ids, rows = _of_piece(sources[0]), sources[1]
    if held.is_whole:
        return ids.source.numel(), list(sources)
    first, count = held.first_row, held.slot.rows
    low, high = _between(ids.source, first, first + count)
    own = Piece(ids.source[low:high] - first, torch.int64)
    if isinstance(rows, Piece):
        return high - low, [own, Piece(rows.source[low:high], rows.dtype)]
    unit = rows.nbytes // max(1, ids.source.numel())
    return high - low, [own, Bytes(rows, low * unit, high * unit)]


def _between(ascending: Tensor, start: int, stop: int) -> tuple[int, int]:
    """The places of the values in [start, stop)."""
    ends = torch.tensor([start, stop], dtype=torch.int64, device=ascending.device)
    low, high = torch.searchsorted(ascending, ends).tolist()
    return low, high


def _of_piece(source: Source) -> Piece:
    if not isinstance(source, Piece):
        raise TypeError(f"{type(source).__name__} cannot be indexed")
    return source
