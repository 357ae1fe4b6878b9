"""The kernels behind norms: a float64 sum of squares per block of 4096 elements, in a fixed order.

Within a block, lane j of 256 adds up the elements j, j+256, j+512, ... in turn; then the lanes are folded in
halves: 128, 64, ... 1. The order determines the bits. So the result is the same for any split into whole blocks, any
number of threads and any vector width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from .intrinsics import GRAD, claim, folded, load, load_integer, tensor_at

BLOCK_ELEMENTS: Final = 4096
LANES: Final = 256
SIGNATURE: Final = "void(int64[::1], int64[::1], int64[::1], float64[::1], int64[::1], int64)"
# Columns of a list of tables of which some rows are there: addresses of their ids and of the rows, how many there are, the
# elements of one, and the rows of a stretch of the table.
ROWS_IDS, ROWS_AT, ROWS_COUNT, ROWS_WIDTH, ROWS_STRETCH = range(5)
ROWS_COLUMNS: Final = 5
STRETCHES_SIGNATURE: Final = "void(int64[:, ::1], int64[::1], float64[::1], int64[::1], int64[::1], int64)"


def block_sums(kind: int) -> Callable[..., None]:
    """Make `kernel(addresses, sizes, starts, sums, plan, worker)`, for the blocks of a list of tensors.

    kind: the element kind of all tensors. addresses and sizes: one per tensor, sizes in elements. starts:
    (tensors + 1,) number of the first block of each tensor. sums: one float64 for every block.
    """

    def kernel(addresses: Any, sizes: Any, starts: Any, sums: Any, plan: Any, worker: int) -> None:
        lanes = np.empty(LANES, np.float64)
        piece = claim(plan, worker)
        while piece >= 0:
            start, stop = piece * plan[1], min((piece + 1) * plan[1], plan[2])
            tensor = tensor_at(starts, start)
            for block in range(start, stop):
                while starts[tensor + 1] <= block:
                    tensor += 1
                address = addresses[tensor]
                first = (block - starts[tensor]) * BLOCK_ELEMENTS
                count = min(BLOCK_ELEMENTS, sizes[tensor] - first)
                width = LANES  # lanes behind the elements would only add zeros
                while width > 1 and width >> 1 >= count:
                    width >>= 1
                for j in range(width):
                    lanes[j] = 0.0
                for chunk in range(first, first + count, LANES):
                    for j in range(min(LANES, first + count - chunk)):
                        x = load(address, chunk + j, kind, True, GRAD)
                        lanes[j] += x * x
                sums[block] = folded(lanes[:width])
            piece = claim(plan, worker)

    return kernel


def stretch_sums(kind: int) -> Callable[..., None]:
    """Make `kernel(tables, starts, sums, counts, plan, worker)`, for the stretches of a list of tables.

    tables: (tables, ROWS_COLUMNS), all of one element kind, each with ascending ids. starts: (tables + 1,) number of the
    first stretch of each table. Of every stretch, sums becomes that of the rows in it, whose blocks are counted from the
    first of them and added in order; counts becomes how many these are.
    """

    def kernel(tables: Any, starts: Any, sums: Any, counts: Any, plan: Any, worker: int) -> None:
        lanes = np.empty(LANES, np.float64)
        piece = claim(plan, worker)
        while piece >= 0:
            start, stop = piece * plan[1], min((piece + 1) * plan[1], plan[2])
            table, row = tensor_at(starts, start), -1
            for number in range(start, stop):
                while starts[table + 1] <= number:
                    table, row = table + 1, -1
                ids, last = tables[table, ROWS_IDS], tables[table, ROWS_COUNT]
                border = (number - starts[table]) * tables[table, ROWS_STRETCH]
                if row < 0:
                    row, high = 0, last
                    while row < high:
                        middle = (row + high) >> 1
                        if load_integer(ids, middle) < border:
                            row = middle + 1
                        else:
                            high = middle
                first, border = row, border + tables[table, ROWS_STRETCH]
                while row < last and load_integer(ids, row) < border:
                    row += 1
                address, elements = tables[table, ROWS_AT], tables[table, ROWS_WIDTH]
                total = 0.0
                # A function that both kernels call, of one name and of several kinds, would be one for all of them in a
                # process that loads what others have compiled: numba numbers functions anew in each process.
                for begin in range(first * elements, row * elements, BLOCK_ELEMENTS):
                    count = min(BLOCK_ELEMENTS, row * elements - begin)
                    width = LANES
                    while width > 1 and width >> 1 >= count:
                        width >>= 1
                    for j in range(width):
                        lanes[j] = 0.0
                    for chunk in range(begin, begin + count, LANES):
                        for j in range(min(LANES, begin + count - chunk)):
                            x = load(address, chunk + j, kind, True, GRAD)
                            lanes[j] += x * x
                    total += folded(lanes[:width])
                sums[number], counts[number] = total, row - first
            piece = claim(plan, worker)

    return kernel
