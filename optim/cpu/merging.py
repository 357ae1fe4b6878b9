"""Rows of many tables on the CPU, merged, copied out of tables and into them; `ops/rows.py` calls it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ..kernels.cache import compiled
from ..kernels.rows import merging as kernels
from ..step.operands import OutOfBounds, run_of
from .pointer_table import KIND
from .pool import over_slices

Array = np.ndarray[Any, Any]
# Rows of one slice, and how many the calling thread takes alone: some 16 K and 256 K elements of 32 in a row.
SLICE_ROWS: Final = 512
INLINE_ROWS: Final = 8192
# The same for tables, whose ids are arranged: 2,048 ids take 20 us.
INLINE_TABLES: Final = 4
NO_LIMIT: Final = 2**63 - 1


class Arranged:
    """Ids of several tables, each table's in ascending order and without repetition."""

    def __init__(self, ids: Sequence[Tensor], limits: Sequence[int]) -> None:
        """ids: 1-d int64 on the CPU; they are copied. limits: the number of rows of each table."""
        arrays = [each.numpy() for each in ids]
        self.offsets = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([len(each) for each in arrays], out=self.offsets[1:])
        n = int(self.offsets[-1])
        named = np.concatenate(arrays, dtype=np.int64) if arrays else np.zeros(0, np.int64)
        # the order and, behind it, the unique ids
        self.arranged = np.empty(2 * n, np.int64)
        self.segments = np.empty(n + len(arrays), np.int64)
        counts = np.zeros(len(arrays), np.int64)
        kernel = compiled(kernels.arrange, kernels.ARRANGE_SIGNATURE, kernels.DIGIT_BITS)
        rows = np.array(limits, np.int64)
        order, unique = self.arranged[:n], self.arranged[n:]
        work = partial(kernel, named, self.offsets, rows, unique, order, self.segments, counts)
        over_slices(work, len(arrays), slice_size=1, inline=INLINE_TABLES)
        for table in np.flatnonzero(counts < 0).tolist():
            wrong = int(named[self.offsets[table] - 1 - counts[table]])
            raise OutOfBounds(wrong, int(rows[table]), table)
        # how many different ids each table has
        self.counts: list[int] = counts.tolist()
        self.starts = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum(counts, out=self.starts[1:])
        self._unique = torch.from_numpy(unique)
        self._begins: list[int] = self.offsets[:-1].tolist()
        self._as_given: list[bool] = (
            self.segments[self.offsets[:-1] + np.arange(len(arrays))] == -1
        ).tolist()

    def ids(self, table: int) -> Tensor:
        """A table's different ids, ascending. It shares memory with those of the other tables."""
        start = self._begins[table]
        return self._unique[start : start + self.counts[table]]

    def places(self, table: int) -> Tensor | None:
        """For each id as it was given, its place among the different ones; None if they are as given."""
        if self.is_as_given(table):
            return None
        start, stop, count = self.offsets[table], self.offsets[table + 1], self.counts[table]
        borders = self.segments[start + table : start + table + count + 1]
        found = np.empty(stop - start, np.int64)
        found[self.arranged[start:stop]] = np.repeat(np.arange(count), np.diff(borders))
        return torch.from_numpy(found)

    def is_as_given(self, table: int) -> bool:
        """True if a table's ids came in ascending order, without repetition."""
        return self._as_given[table]


def merge(
    arranged: Arranged,
    rows: Sequence[Tensor],
    first: int,
    targets: Array,
    ids_to: Array,
    begin: int = 0,
    end: int | None = None,
) -> None:
    """Merge rows of the tables from `first` on to the addresses `targets`, and copy their ids to `ids_to`.

    rows: contiguous, of one dtype. [begin, end): of all merged rows of these tables, those that are wanted. An address is
    that of the table's first merged row; an address of 0 in `ids_to` leaves its ids out.
    """
    last = first + len(rows)
    starts = arranged.starts[first : last + 1] - arranged.starts[first]
    end = int(starts[-1]) if end is None else end
    if end <= begin:
        return
    sources = np.array([each.data_ptr() for each in rows], np.int64)
    widths = np.array([each.numel() // max(1, each.shape[0]) for each in rows], np.int64)
    kernel = compiled(kernels.merge, kernels.MERGE_SIGNATURE, KIND[rows[0].dtype])
    # the kernel counts its tables from 0, and the segments of table t begin at offsets[t] + t
    segments = arranged.segments[first:]
    work = partial(
        kernel,
        sources,
        targets,
        ids_to,
        widths,
        starts,
        arranged.offsets[first : last + 1],
        arranged.arranged,
        segments,
        begin,
    )
    over_slices(work, end - begin, slice_size=SLICE_ROWS, inline=INLINE_ROWS)


def check_all_bounds(ids: Sequence[Tensor], rows: Sequence[int]) -> None:
    """`check_all_bounds` of `ops/rows.py` for ids on the CPU."""
    ids = [each.contiguous() for each in ids]
    addresses = np.array([each.data_ptr() for each in ids], np.int64)
    counts = np.array([each.numel() for each in ids], np.int64)
    ends, limits = np.empty((len(ids), 2), np.int64), np.array(rows, np.int64)
    compiled(kernels.bounds, kernels.BOUNDS_SIGNATURE, None)(addresses, counts, ends)
    wrong = (ends[:, 0] < 0) | (ends[:, 1] >= limits)
    if wrong.any():
        table = int(wrong.argmax())
        low, high = ends[table].tolist()
        raise OutOfBounds(low if low < 0 else high, rows[table], table)


class Moved:
    """Rows of several tables that are copied out of them, or into them.

    The tables and ids have to live as long as this does. Their ids are inside of the tables.
    """

    def __init__(self, tables: Sequence[Tensor], ids: Sequence[Tensor]) -> None:
        """tables: contiguous, on the CPU. ids: 1-d contiguous int64."""
        self._kept = tables, ids
        self.starts = np.zeros(len(tables) + 1, np.int64)
        np.cumsum([each.numel() for each in ids], out=self.starts[1:])
        self._tables = np.zeros((len(tables), kernels.MOVED_COLUMNS), np.int64)
        self._tables[:, kernels.MOVED_TABLE] = [table.data_ptr() for table in tables]
        self._tables[:, kernels.MOVED_IDS] = [each.data_ptr() for each in ids]
        self._tables[:, kernels.MOVED_BYTES] = [table.nbytes // max(1, table.shape[0]) for table in tables]

    def gather(
        self, targets: Sequence[int], ids_to: Sequence[int], begin: int = 0, end: int | None = None
    ) -> None:
        """Copy rows [begin, end) of all of these to addresses, and their ids beside them (0: not)."""
        self._move(targets, ids_to, begin, end)

    def gather_of(self, table: int, target: int, begin: int, end: int) -> None:
        """Copy rows [begin, end) of one of the tables to an address."""
        one = self._tables[table : table + 1].copy()
        one[0, kernels.MOVED_ROWS] = target - begin * self.row_bytes(table)
        starts = np.array([0, self.count(table)], np.int64)
        kernel = compiled(kernels.move, kernels.MOVE_SIGNATURE, False)
        over_slices(
            partial(kernel, one, starts, begin), end - begin, slice_size=SLICE_ROWS, inline=INLINE_ROWS
        )

    def count(self, table: int) -> int:
        """How many rows of a table are copied."""
        return int(self.starts[table + 1] - self.starts[table])

    def row_bytes(self, table: int) -> int:
        """Bytes of a row."""
        return int(self._tables[table, kernels.MOVED_BYTES])

    def scatter(self, sources: Sequence[int]) -> None:
        """Copy rows from addresses into the tables."""
        self._move(sources, [0] * len(sources), scatters=True)

    def _move(
        self,
        rows: Sequence[int],
        ids_to: Sequence[int],
        begin: int = 0,
        end: int | None = None,
        *,
        scatters: bool = False,
    ) -> None:
        last = int(self.starts[-1]) if end is None else end
        if last > begin:
            tables = self._tables.copy()
            tables[:, kernels.MOVED_ROWS] = rows
            tables[:, kernels.MOVED_IDS_TO] = ids_to
            kernel = compiled(kernels.move, kernels.MOVE_SIGNATURE, scatters)
            work = partial(kernel, tables, self.starts, begin)
            over_slices(work, last - begin, slice_size=SLICE_ROWS, inline=INLINE_ROWS)


def coalesce(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`coalesce` of `ops/rows.py` for CPU tensors of a dtype that has kernels. IndexError for a negative id."""
    arranged = Arranged([ids.contiguous()], [NO_LIMIT])
    if arranged.is_as_given(0):
        return ids, rows
    rows = run_of(rows)
    count = arranged.counts[0]
    merged = torch.empty((count, *rows.shape[1:]), dtype=rows.dtype, device="cpu")
    merge(arranged, [rows], 0, np.array([merged.data_ptr()], np.int64), np.zeros(1, np.int64))
    return arranged.ids(0).clone(), merged
