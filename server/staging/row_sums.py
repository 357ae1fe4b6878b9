"""Sums of squares of rows: taken stretch by stretch of their table, and added in order.

So they have the same bits wherever the table lies, whole or cut between stretches (proto/wire/shards.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from pushstep.optim.ops import norms
from pushstep.proto.wire.shards import stretch_rows

from .gradient import RowsPart


def stretch_sums(parts: Sequence[RowsPart]) -> list[list[float]]:
    """Of each part, the sum of each stretch that has rows, in order."""
    return norms.stretch_sums(list(map(_rows, parts)))


def row_square_sums(parts: Sequence[RowsPart]) -> list[float]:
    """Of each part, the sum over all, added one after the other."""
    return norms.row_square_sums(list(map(_rows, parts)))


def _rows(part: RowsPart) -> norms.SomeRows:
    return norms.SomeRows(part.ids, part.rows, part.slot.rows, stretch_rows(part.slot))
