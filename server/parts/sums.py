"""What the ranks have measured of one push's parts, made into what one server would have measured of the whole.

Sums of squares are added in the order in which one server adds them: blocks of a parameter one after the other, and then
parameters in manifest order. So norms have the same bits for every number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from pushstep.optim.ops.norms import block_sums
from pushstep.proto.errors import MalformedFrame
from pushstep.proto.shards_pb2 import RankSums
from pushstep.proto.types_pb2 import Segment
from pushstep.proto.wire.dtypes import NAMES, TORCH, to_wire
from pushstep.proto.wire.layout import Layout, Slot
from pushstep.proto.wire.shards import BLOCK_ELEMENTS, Part, Piece

from ..staging.gradient import DensePart, RowsPart, StagedPush
from ..staging.incoming import IncomingBody
from ..staging.row_sums import stretch_sums

StagedPart = DensePart | RowsPart


def measures(push: StagedPush, part: Part, blocks: Mapping[int, list[float]] | None = None) -> RankSums:
    """What a rank says of its part of a push. `blocks`: by parameter, block sums that were taken already."""
    made = RankSums()
    for one, sums in zip(push.parts, push.sums, strict=True):
        made.segments.append(_segment(one))
        if isinstance(one, RowsPart):
            if part.pieces[one.slot.index].is_first:
                made.sums.append(sums[0])
            else:
                (found,) = stretch_sums([one])
                made.sums.extend(found)
                made.counts.append(len(found))
            continue
        for slot, own in zip(one.slots, sums, strict=True):
            if part.pieces[slot.index].is_first:
                made.sums.append(own)
            else:
                known = None if blocks is None else blocks.get(slot.index)
                values = one.gradient[slot.start - one.start : slot.stop - one.start]
                made.sums.extend(block_sums(values) if known is None else known)
    if push.nonfinite_parameter is not None:
        made.nonfinite = 1 + part.layout.by_name[push.nonfinite_parameter].index
    return made


def known_blocks(
    incoming: IncomingBody | None, slots: Sequence[Sequence[Slot]], part: Part
) -> dict[int, list[float]]:
    """The block sums of later pieces that were taken while a body came in."""
    found: dict[int, list[float]] = {}
    if incoming is None:
        return found
    for index, covered in enumerate(slots):
        first = covered[0].index
        if not part.pieces[first].is_first:
            blocks = incoming.first_block_sums(index)
            if blocks is not None:
                found[first] = blocks
    return found


class Whole:
    """One push as a whole, put together from what each rank has of it, in the order of the ranks."""

    def __init__(self, whole: Layout) -> None:
        self._whole = whole
        self._sums: dict[int, float] = {}
        self._dense: dict[int, torch.dtype] = {}
        self._rows: dict[int, torch.dtype] = {}
        # of each parameter that is cut: by rows or not, and the elements that have come so far
        self._cut: dict[int, tuple[bool, int]] = {}
        self._nonfinite: Slot | None = None

    def add(self, part: Part, said: RankSums) -> None:
        """Add what one rank has. MalformedFrame if it does not fit what the ranks before it have."""
        sums, counts = iter(said.sums), iter(said.counts)
        try:
            for segment in said.segments:
                for slot in part.layout.slots_of(segment):
                    self._add(part.pieces[slot.index], slot, segment, sums, counts)
        except StopIteration as error:
            raise MalformedFrame(problem=f"rank {part.rank} says too few sums") from error
        if said.nonfinite:
            self._not_finite(self._whole.slots[part.pieces[said.nonfinite - 1].whole])

    def _add(
        self, piece: Piece, slot: Slot, segment: Segment, sums: Iterator[float], counts: Iterator[int]
    ) -> None:
        index, by_rows = piece.whole, segment.HasField("rows")
        kinds = self._rows if by_rows else self._dense
        dtype = TORCH.get(segment.dtype, torch.float32)
        kinds.setdefault(index, dtype)
        if not piece.is_whole:
            self._note_piece(piece, slot, by_rows=by_rows)
        if piece.is_first:
            self._sums[index] = next(sums)
            return
        many = next(counts) if by_rows else -(-(piece.stop - piece.start) // BLOCK_ELEMENTS)
        total = self._sums.get(index, 0.0)
        for _ in range(many):
            total += next(sums)
        self._sums[index] = total

    def _note_piece(self, piece: Piece, slot: Slot, *, by_rows: bool) -> None:
        rows_before, came = self._cut.get(piece.whole, (by_rows, 0))
        if rows_before != by_rows:
            raise MalformedFrame(
                problem=f"the gradient of {slot.name!r} is dense in one rank and has rows in another"
            )
        self._cut[piece.whole] = by_rows, came + piece.stop - piece.start

    def _not_finite(self, slot: Slot) -> None:
        before = self._nonfinite
        if before is None or (slot.arena, slot.start) < (before.arena, before.start):
            self._nonfinite = slot

    def push(self, here: StagedPush) -> StagedPush:
        """The push as the coordinator judges it. `here`: this rank's part. MalformedFrame if a piece is missing."""
        for index, (by_rows, came) in self._cut.items():
            slot = self._whole.slots[index]
            if not by_rows and came != slot.stop - slot.start:
                raise MalformedFrame(
                    problem=f"the dense gradient of {slot.name!r} lacks {slot.stop - slot.start - came} elements, which lie in "
                    "another rank"
                )
        parts: list[StagedPart] = []
        for run in _runs([self._whole.slots[index] for index in sorted(self._dense)]):
            nothing = torch.empty(0, dtype=self._dense[run[0].index], device="cpu")
            parts.append(DensePart(run[0].arena, run[0].start, tuple(run), nothing))
        for index, dtype in sorted(self._rows.items()):
            parts.append(_no_rows(self._whole.slots[index], dtype))
        norm = math.sqrt(sum([self._sums[index] for index in sorted(self._sums)], 0.0))
        nonfinite = None if self._nonfinite is None else self._nonfinite.name
        return StagedPush(len(self._sums), parts, nonfinite, norm, here=here)


def _segment(part: StagedPart) -> Segment:
    if isinstance(part, RowsPart):
        slot = part.slot
        dtype = to_wire(part.rows.dtype, slot.name)
        return Segment(arena=slot.arena, start=slot.start, stop=slot.stop, dtype=dtype, rows=part.ids.numel())
    first, last = part.slots[0], part.slots[-1]
    dtype = to_wire(part.gradient.dtype, first.name)
    segment = Segment(arena=part.arena, start=first.start, stop=last.stop, dtype=dtype)
    if first.start == last.stop:
        segment.parameter = first.index
    return segment


def with_steps_elsewhere(push: StagedPush | None, part: Part, by_rows: Iterable[int]) -> StagedPush:
    """A part of a push in which each parameter that is stepped by rows in any rank is stepped here: by none, if need be.

    by_rows: such parameters' indices in the whole. A step counts, whichever rows it moves.
    """
    parts = [] if push is None else list(push.parts)
    here = {one.slot.index for one in parts if isinstance(one, RowsPart)}
    for whole in by_rows:
        piece = part.by_whole.get(whole)
        if piece is not None and piece.index not in here:
            slot = part.layout.slots[piece.index]
            parts.append(_no_rows(slot, slot.dtype))
    if push is None:
        return StagedPush(0, parts, None, 0.0)
    return push if len(parts) == len(push.parts) else replace(push, parts=parts)


def rows_of(push: StagedPush) -> list[int]:
    """The parameters that a whole push steps by rows, by their indices."""
    return [one.slot.index for one in push.parts if isinstance(one, RowsPart)]


def _no_rows(slot: Slot, dtype: torch.dtype) -> RowsPart:
    ids = torch.empty(0, dtype=torch.int64, device="cpu")
    stepped = dtype if dtype in NAMES else torch.float32
    return RowsPart(slot, ids, torch.empty(0, *slot.shape[1:], dtype=stepped, device="cpu"))


def _runs(slots: Sequence[Slot]) -> list[list[Slot]]:
    """Neighbouring parameters together, as the segments of a push."""
    runs: list[list[Slot]] = []
    for slot in sorted(slots, key=lambda slot: (slot.arena, slot.start, slot.index)):
        if (
            runs
            and runs[-1][-1].arena == slot.arena
            and slot.start < slot.stop
            and runs[-1][-1].stop == slot.start
        ):
            runs[-1].append(slot)
        else:
            runs.append([slot])
    return runs
