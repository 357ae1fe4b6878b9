"""Cuts a model into the parts that the ranks of a job hold: which elements of each parameter lie in which rank.

A part is a manifest like any other, with the whole model's groups and some of its parameters. Both sides compute the parts
from the whole manifest and the number of ranks, so only that number has to travel. Each rank has a contiguous range of
each arena, so only the parameters at its borders are cut. A piece of a parameter keeps its name, and its shape but for
the number of rows; `Parameter.whole_rows` and `first_row` say where it lies.

A part costs a push some 1.5 ms at both ends, whatever it holds. So a small model lies in fewer ranks, as
`Manifest.part_bytes` says, and the smallest in rank 0 alone.

A parameter is cut only between stretches of rows. A stretch is a whole number of rows and, counted from the parameter's
start, of the norms' blocks of 4096 elements, so every block lies in one rank. Sums of squares of rows are taken
stretch by stretch (`optim/ops/norms.py`), so those lie in one rank, too. Both are added in order, whoever has taken
them, and norms have the same bits for every number of ranks. A parameter has at most 256 stretches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..types_pb2 import Manifest
from .layout import ArenaSpec, Layout, Slot

# Elements of a block of the norms.
BLOCK_ELEMENTS: Final = 4096
MOST_STRETCHES: Final = 256
# The most ranks of a job.
MAX_RANKS: Final = 1024


@dataclass(frozen=True, slots=True)
class Piece:
    """What a rank holds of one parameter: elements [start, stop) of the whole one."""

    # the parameter's index in the whole manifest, and in the part's
    whole: int
    index: int
    start: int
    stop: int
    # the parameter begins here
    is_first: bool
    # the whole parameter is here
    is_whole: bool


class Part:
    """One rank's part of a model: its manifest, and where each of its parameters lies in the whole."""

    def __init__(self, rank: int, whole: Layout, ranges: Sequence[tuple[int, int, int]]) -> None:
        """`ranges`: of each parameter in the part, its index in the whole and the elements [start, stop), in order."""
        manifest = Manifest(groups=whole.manifest.groups)
        pieces = []
        for place, (index, start, stop) in enumerate(ranges):
            slot = whole.slots[index]
            parameter = manifest.parameters.add()
            parameter.CopyFrom(whole.manifest.parameters[index])
            is_whole = (start, stop) == (0, slot.stop - slot.start)
            if not is_whole:
                parameter.shape[0] = (stop - start) // slot.row_elements
                parameter.whole_rows, parameter.first_row = slot.rows, start // slot.row_elements
            pieces.append(Piece(index, place, start, stop, start == 0, is_whole))
        self.rank = rank
        self.layout = Layout(manifest)
        self.pieces = tuple(pieces)
        # the same, by the parameter's index in the whole
        self.by_whole = {piece.whole: piece for piece in pieces}


def taking_part(whole: Layout, ranks: int) -> int:
    """Among how many of the ranks a model is cut: those from 0 on."""
    least_bytes = whole.manifest.part_bytes
    held_bytes = sum(arena.elements * arena.dtype.itemsize for arena in whole.arenas)
    return ranks if not least_bytes else max(1, min(ranks, held_bytes // least_bytes))


def cut(whole: Layout, ranks: int) -> list[Part | None]:
    """The parts of a model in so many ranks; None for a rank that gets nothing. Rank 0 always has a part."""
    ranges: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]
    held = [0] * taking_part(whole, ranks)
    for arena in whole.arenas:
        _cut_arena(arena, ranges, held)
    for slot in whole.slots:
        if slot.start == slot.stop:
            ranges[0].append((slot.index, 0, 0))
    return [Part(rank, whole, sorted(found)) if found else None for rank, found in enumerate(ranges)]


def _cut_arena(arena: ArenaSpec, ranges: list[list[tuple[int, int, int]]], held: list[int]) -> None:
    """Share one arena out, so that all ranks come to hold the same number of bytes. Adds to `ranges` and `held`."""
    itemsize, ranks = arena.dtype.itemsize, len(held)
    aim = -(-(sum(held) + arena.elements * itemsize) // ranks)
    lacks = [max(0, aim - bytes_held) for bytes_held in held]
    total = sum(lacks) or 1
    # of each rank but the last: where its range ends at the latest, before it is rounded up to the next border
    ends = []
    before = 0
    for lack in lacks[:-1]:
        before += lack
        ends.append(-(-arena.elements * before // total))
    rank = 0
    for slot in arena.slots:
        elements, start = slot.stop - slot.start, 0
        while start < elements:
            while rank < len(ends) and slot.start + start >= ends[rank]:
                rank += 1
            stop = elements
            if rank < len(ends):
                stretch = stretch_rows(slot) * slot.row_elements
                stop = min(elements, -(-(ends[rank] - slot.start) // stretch) * stretch)
            ranges[rank].append((slot.index, start, stop))
            held[rank] += (stop - start) * itemsize
            start = stop


def stretch_rows(slot: Slot) -> int:
    """Rows of one stretch of a parameter, or of the parameter that this is a piece of. One that is not cut has one."""
    rows, width = slot.whole_rows or slot.rows, slot.row_elements
    if not rows or not width:
        return 1
    unit = BLOCK_ELEMENTS // math.gcd(BLOCK_ELEMENTS, width)
    return unit * -(-rows // (unit * MOST_STRETCHES))
