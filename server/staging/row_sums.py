"""Sums of squares of rows: taken stretch by stretch of their table, and added in order.

So they have the same bits wherever the table lies, whole or cut between stretches (proto/wire/shards.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pushstep.optim.ops.norms import square_sums
from pushstep.proto.wire.layout import Slot
from pushstep.proto.wire.shards import stretch_rows


def stretches(slot: Slot, ids: Tensor, rows: Tensor) -> list[Tensor]:
    """The rows of each stretch that has some, in order; all of them if there is one stretch. ids: ascending."""
    length = stretch_rows(slot)
    if slot.rows <= length:
        return [rows]
    borders = torch.arange(length, slot.rows, length, dtype=torch.int64, device=ids.device)
    ends = [*torch.searchsorted(ids, borders).tolist(), ids.numel()]
    found, start = [], 0
    for stop in ends:
        if stop > start:
            found.append(rows[start:stop])
        start = stop
    return found


def stretch_sums(slot: Slot, ids: Tensor, rows: Tensor) -> list[float]:
    """The sum of each stretch that has rows, in order."""
    found = stretches(slot, ids, rows)
    return square_sums(found) if found else []


def row_square_sum(slot: Slot, ids: Tensor, rows: Tensor) -> float:
    """The sum over all."""
    return in_order(stretch_sums(slot, ids, rows))


def in_order(sums: Sequence[float]) -> float:
    """Sums added one after the other."""
    total = 0.0
    for one in sums:
        total += one
    return total
