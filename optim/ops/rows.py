"""Row-sparse gradients, which are (ids, rows) pairs: how duplicate ids are merged, everywhere; and rows of many tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..backends import reference
from ..step.operands import OutOfBounds as OutOfBounds
from ..step.operands import check_bounds as check_bounds
from ..step.operands import check_ids, run_of
from ..step.step import FUSED_DTYPES

if TYPE_CHECKING:
    from ..cpu.merging import Moved as Moved


def coalesce(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Unique ascending ids and their rows, duplicates summed in order of appearance.

    ids: int64 of shape (n,); rows: (n, ...). Sums run in float32 for half rows (float64 for double) and are rounded
    once. IndexError for a negative id. To merge again changes nothing, so both ends of the wire may merge.
    """
    check_ids(ids, rows)
    if has_kernels(rows):
        from ..cpu.merging import coalesce as on_cpu  # numba is imported at the first step, not before

        return on_cpu(ids, rows)
    return reference.coalesce(ids, rows)


def has_kernels(rows: Tensor) -> bool:
    """True if kernels can merge and move rows like these."""
    return rows.is_cpu and rows.dtype in FUSED_DTYPES


class Merging:
    """Rows of several tables, all of one dtype that has kernels, which `coalesce` would merge one table at a time.

    The ids are arranged at once, in one call. The rows are merged later, where they are wanted.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], limits: Sequence[int]) -> None:
        """pairs: the ids and rows of each table. OutOfBounds for an id that is negative or not below the table's limit."""
        from ..cpu import merging

        for ids, rows in pairs:
            check_ids(ids, rows)
        self._merging = merging
        self._arranged = merging.Arranged([ids for ids, _ in pairs], limits)
        self._rows = [run_of(rows.detach()) for _, rows in pairs]
        self.counts: Sequence[int] = self._arranged.counts

    def ids(self, table: int) -> Tensor:
        """A table's ids: ascending, without repetition."""
        return self._arranged.ids(table)

    def places(self, table: int) -> Tensor | None:
        """For each id as it came, its place among the different ones; None if they came as they are now."""
        return self._arranged.places(table)

    def rows(self, table: int) -> Tensor:
        """A table's rows, one for each of its ids: as they came if there is nothing to merge."""
        came = self._rows[table]
        if self._arranged.is_as_given(table):
            return came
        merged = torch.empty((self.counts[table], *came.shape[1:]), dtype=came.dtype, device="cpu")
        self.write(table, merged.data_ptr(), 0, self.counts[table])
        return merged

    def row_bytes(self, table: int) -> int:
        """Bytes of a row."""
        rows = self._rows[table]
        return rows.nbytes // (rows.shape[0] or 1)

    def write(self, table: int, target: int, begin: int, end: int) -> None:
        """Write rows [begin, end) of a table, merged, to an address: that of row 0."""
        no_ids = np.zeros(1, np.int64)
        self._merging.merge(
            self._arranged, self._rows[table : table + 1], table, np.array([target]), no_ids, begin, end
        )

    def write_all(self, targets: Sequence[int], ids_to: Sequence[int]) -> None:
        """Write all rows of all tables, merged, and their ids, to an address for each table."""
        self._merging.merge(self._arranged, self._rows, 0, np.array(targets), np.array(ids_to))


def check_all_bounds(ids: Sequence[Tensor], rows: Sequence[int]) -> None:
    """`check_bounds` of several tables' ids: 1-d int64, of tables with so many rows each. OutOfBounds."""
    if all(each.is_cpu for each in ids):
        if ids:
            from ..cpu.merging import check_all_bounds as on_cpu

            on_cpu(ids, rows)
        return
    for table, (each, limit) in enumerate(zip(ids, rows, strict=True)):
        try:
            check_bounds(each, limit)
        except OutOfBounds as error:
            raise OutOfBounds(error.row, limit, table) from error


def moved(tables: Sequence[Tensor], ids: Sequence[Tensor]) -> Moved:
    """Rows of several tables, to be copied out of them or into them; see `cpu/merging.py`.

    The tables are contiguous and on the CPU. IndexError for an id outside its table.
    """
    from ..cpu.merging import Moved

    check_all_bounds(ids, [table.shape[0] for table in tables])
    return Moved(tables, ids)


def different(ids: Tensor) -> Tensor:
    """The different ones of ids, none of them negative, in ascending order."""
    from ..cpu.merging import NO_LIMIT, Arranged

    return Arranged([ids], [NO_LIMIT]).ids(0)
