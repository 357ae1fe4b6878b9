"""Kernels over lists of tables' rows: arrange ids, merge rows of equal id, copy rows out of tables and into them.

Rows of equal id are summed in order of appearance, in the arithmetic's precision, and rounded once to their dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numba.extending import register_jitable

from ..intrinsics import (
    GRAD,
    PARAM,
    claim,
    copy_bytes,
    load,
    load_integer,
    prefetch,
    store,
    store_integer,
    tensor_at,
)
from .step import BYTES, PREFETCH_ROWS

ARRANGE_SIGNATURE: Final = "void(int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64)"
MERGE_SIGNATURE: Final = (
    "void(int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64, "
    "int64[::1], int64)"
)
# Columns of a list of tables whose rows are copied: addresses of the table, of the ids, and of where ids and rows go or come
# from (0: ids go nowhere), and the bytes of a row.
MOVED_TABLE, MOVED_IDS, MOVED_IDS_TO, MOVED_ROWS, MOVED_BYTES = range(5)
MOVED_COLUMNS: Final = 5
MOVE_SIGNATURE: Final = "void(int64[:, ::1], int64[::1], int64, int64[::1], int64)"

BOUNDS_SIGNATURE: Final = "void(int64[::1], int64[::1], int64[:, ::1])"

# The widest digit. 100 K ids below 2 M are sorted in two passes of 11 bits: 0.8 ms; those below 100 K in two of 9 bits.
DIGIT_BITS: Final = 11


def merge(kind: int) -> Callable[..., None]:
    """Make the kernel that adds rows of equal id, of a list of tables, as `arrange` has arranged them.

    `kernel(sources, targets, ids_to, widths, starts, offsets, arranged, segments, begin, plan, worker)`. sources and targets:
    addresses of each table's rows, all of one dtype. ids_to: where its ids go; 0: nowhere. starts: (tables + 1,) number of
    each table's first merged row. offsets, also (tables + 1,), and segments: those of `arrange`; arranged: its order, and
    behind it its unique ids. The plan's rows are counted from `begin`. Sums run in float64 for float64, else in float32,
    and are rounded once.
    """
    wide = kind == 1
    real: Any = np.float64 if wide else np.float32
    size = BYTES[kind]

    def kernel(
        sources: Any,
        targets: Any,
        ids_to: Any,
        widths: Any,
        starts: Any,
        offsets: Any,
        arranged: Any,
        segments: Any,
        begin: int,
        plan: Any,
        worker: int,
    ) -> None:
        total = np.empty(widths.max(), real)
        n = len(arranged) >> 1
        piece = claim(plan, worker)
        while piece >= 0:
            start, stop = begin + piece * plan[1], begin + min((piece + 1) * plan[1], plan[2])
            table = tensor_at(starts, start)
            for number in range(start, stop):
                while starts[table + 1] <= number:
                    table += 1
                k, offset, width = number - starts[table], offsets[table], widths[table]
                if ids_to[table]:
                    store_integer(ids_to[table], k, arranged[n + offset + k])
                target = targets[table] + k * width * size
                if segments[offset + table] < 0:
                    copy_bytes(target, sources[table] + k * width * size, width * size)
                    continue
                first, last = segments[offset + table + k], segments[offset + table + k + 1]
                ahead = min(last + PREFETCH_ROWS, offsets[table + 1] - offset)
                for m in range(first + PREFETCH_ROWS, ahead):
                    near = sources[table] + arranged[offset + m] * width * size
                    for line in range(0, width * size, 64):
                        prefetch(near + line)
                row = sources[table] + arranged[offset + first] * width * size
                if last - first == 1:
                    copy_bytes(target, row, width * size)
                    continue
                for j in range(width):
                    total[j] = load(row, j, kind, wide, GRAD)
                for m in range(first + 1, last):
                    row = sources[table] + arranged[offset + m] * width * size
                    for j in range(width):
                        total[j] = total[j] + load(row, j, kind, wide, GRAD)
                for j in range(width):
                    store(target, j, total[j], kind, PARAM)
            piece = claim(plan, worker)

    return kernel


def move(scatters: bool) -> Callable[..., None]:
    """Make the kernel that copies rows out of tables, and their ids beside them; or into tables, if it `scatters`.

    `kernel(tables, starts, begin, plan, worker)`. tables: (tables, MOVED_COLUMNS). starts: (tables + 1,) number of each
    table's first row, of all that are copied. Rows go into a table only where no id of it comes twice.
    """

    def kernel(tables: Any, starts: Any, begin: int, plan: Any, worker: int) -> None:
        piece = claim(plan, worker)
        while piece >= 0:
            start, stop = begin + piece * plan[1], begin + min((piece + 1) * plan[1], plan[2])
            table = tensor_at(starts, start)
            for number in range(start, stop):
                while starts[table + 1] <= number:
                    table += 1
                k, size = number - starts[table], tables[table, MOVED_BYTES]
                base, ids = tables[table, MOVED_TABLE], tables[table, MOVED_IDS]
                if number + PREFETCH_ROWS < min(stop, starts[table + 1]):
                    ahead = base + load_integer(ids, k + PREFETCH_ROWS) * size
                    for line in range(0, size, 64):
                        prefetch(ahead + line)
                row = load_integer(ids, k)
                here, there = base + row * size, tables[table, MOVED_ROWS] + k * size
                if scatters:
                    copy_bytes(here, there, size)
                    continue
                copy_bytes(there, here, size)
                if tables[table, MOVED_IDS_TO]:
                    store_integer(tables[table, MOVED_IDS_TO], k, row)
            piece = claim(plan, worker)

    return kernel


def bounds(_: None) -> Callable[..., None]:
    """Make `kernel(ids, counts, ends)`, for the lowest and the highest id of each table; 0 and -1 of none.

    ids: addresses; counts: how many there are.
    """

    def kernel(ids: Any, counts: Any, ends: Any) -> None:
        for table in range(len(ids)):
            low, high = np.int64(0), np.int64(-1)
            if counts[table]:
                low = high = load_integer(ids[table], 0)
            for k in range(counts[table]):
                low = min(low, load_integer(ids[table], k))
                high = max(high, load_integer(ids[table], k))
            ends[table, 0], ends[table, 1] = low, high

    return kernel


def arrange(digit_bits: int) -> Callable[..., None]:
    """Make `kernel(ids, offsets, rows, unique, order, segments, counts, plan, worker)`, a stable radix sort of tables' ids.

    The ids of table t are ids[offsets[t] : offsets[t+1]]. unique and order have as many places, segments one more for each
    table. Of one table: equal ids come together, ascending, in order of appearance. `order` lists positions in `ids`;
    `unique[k]` owns order[segments[k] : segments[k+1]]. counts[t] becomes the number of unique ids, or -1 - position if an id
    is outside [0, rows[t]). If the ids already ascend strictly, segments[0] becomes -1, and unique has the ids.
    """
    one: Any = register_jitable(_arrange(digit_bits))

    def kernel(
        ids: Any,
        offsets: Any,
        rows: Any,
        unique: Any,
        order: Any,
        segments: Any,
        counts: Any,
        plan: Any,
        worker: int,
    ) -> None:
        piece = claim(plan, worker)
        while piece >= 0:
            for table in range(piece * plan[1], min((piece + 1) * plan[1], plan[2])):
                start, stop = offsets[table], offsets[table + 1]
                counts[table] = one(
                    ids[start:stop],
                    rows[table],
                    unique[start:stop],
                    order[start:stop],
                    segments[start + table : stop + table + 1],
                )
            piece = claim(plan, worker)

    return kernel


def _arrange(digit_bits: int) -> Callable[..., int]:
    def of_table(ids: Any, rows: int, unique: Any, order: Any, segments: Any) -> int:
        n = len(ids)
        ascending, largest = True, 0
        for k in range(n):
            if ids[k] < 0 or ids[k] >= rows:
                return -1 - k
            if k > 0 and ids[k] <= ids[k - 1]:
                ascending = False
            largest = max(largest, ids[k])
        if ascending:
            segments[0] = -1
            unique[:] = ids
            return n
        # Each digit reads one pair of arrays and writes the other; then the pairs change places.
        keys, places = unique, order
        spare_keys, spare_places = np.empty(n, np.int64), np.empty(n, np.int64)
        for k in range(n):
            keys[k] = ids[k]
            places[k] = k
        # as many passes as digits of `digit_bits` need, and no wider digits than these passes need
        bits = 1
        while largest >> bits:
            bits += 1
        passes = (bits + digit_bits - 1) // digit_bits
        width = (bits + passes - 1) // passes
        buckets, mask = 1 << width, (1 << width) - 1
        counts = np.empty(buckets, np.int64)
        shift = 0
        for _ in range(passes):
            counts[:] = 0
            for k in range(n):
                counts[(keys[k] >> shift) & mask] += 1
            total = 0
            for digit in range(buckets):
                here = counts[digit]
                counts[digit] = total
                total += here
            for k in range(n):
                digit = (keys[k] >> shift) & mask
                spare_keys[counts[digit]] = keys[k]
                spare_places[counts[digit]] = places[k]
                counts[digit] += 1
            keys, spare_keys = spare_keys, keys
            places, spare_places = spare_places, places
            shift += width
        count, previous = 0, -1
        for k in range(n):  # in place: nothing is written ahead of where it is read
            key, place = keys[k], places[k]
            if key != previous:
                unique[count] = key
                segments[count] = k
                count += 1
                previous = key
            order[k] = place
        segments[count] = n
        return count

    return of_table
