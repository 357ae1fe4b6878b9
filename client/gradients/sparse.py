"""The row-sparse gradients of one push: arranged together, and merged straight into where they are sent or shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from pushstep.optim.ops.rows import Merging, has_kernels
from pushstep.proto.wire.frames import Piece, Source, Writer
from pushstep.proto.wire.layout import Slot

# Wider rows are merged before they are sent: a chunk ends between rows where it can.
WIDEST_BYTES: Final = 64 << 10
# Ids were checked when the gradients were taken.
NO_LIMIT: Final = 2**63 - 1
Named = tuple[Slot, Tensor, Tensor]


class MergedRows:
    """The source of one table's rows: one for each id, duplicates summed in order of appearance."""

    def __init__(self, merging: Merging, table: int) -> None:
        self.merging = merging
        self.table = table
        # a chunk never splits a row
        self.unit_bytes = max(1, merging.row_bytes(table))
        self.nbytes = merging.counts[table] * merging.row_bytes(table)

    def writer(self) -> Writer:
        """A writer that merges straight into its target."""

        def write(target: Tensor, start: int) -> None:
            first, count = start // self.unit_bytes, target.numel() // self.unit_bytes
            self.merging.write(self.table, target.data_ptr() - start, first, first + count)

        return write


def merged_rows(
    named: Sequence[Named], wire: torch.dtype | None
) -> dict[Slot, tuple[Tensor, Sequence[Source]]]:
    """By slot, the different ids of gradients and what sends them with their rows.

    Only of gradients that kernels can merge and that are sent in the dtype that they have.
    """
    kinds: dict[torch.dtype, list[Named]] = {}
    for slot, ids, rows in named:
        narrow = slot.row_elements * rows.dtype.itemsize <= WIDEST_BYTES
        if has_kernels(rows) and ids.is_cpu and rows.dtype == (wire or slot.dtype) and narrow:
            kinds.setdefault(rows.dtype, []).append((slot, ids, rows))
    found: dict[Slot, tuple[Tensor, Sequence[Source]]] = {}
    for members in kinds.values():
        merging = Merging([(ids, rows) for _, ids, rows in members], [NO_LIMIT] * len(members))
        for table, (slot, _, _) in enumerate(members):
            ids = merging.ids(table)
            found[slot] = ids, [Piece(ids, torch.int64), MergedRows(merging, table)]
    return found
