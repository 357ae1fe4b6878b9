"""Kernels over rows of tables, of many tables at once: gather, merge, update and scatter in one pass.

Only named rows are read or written; nothing grows with the table. Rows of equal id are summed in order of
appearance, in the arithmetic's precision, and rounded once to the gradient's dtype. `merging.py` does
the same before rows are sent: merging here or there gives the same bits.

Element-wise, Adadelta is the dense rule. Adagrad keeps torch's sparse order, which differs from its dense one:

    h = h + g*g                         two roundings
    p = p + -lr * (g / (sqrt(h) + eps))

Row-wise (state (rows, 1)), m is the mean over a row, summed in double:

    h = h + m(g*g);  p = fma(-lr / (sqrt(h) + eps), g, p)
    v = rho*v + (1-rho)*m(g*g);  d = sqrt((u + eps) / (v + eps)) * g;  u = rho*u + (1-rho)*m(d*d);  p = fma(-lr, d, p)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
from numba.extending import register_jitable

from ..dense import EPS, GRAD_SCALE, ONE_MINUS_RHO, QUOTIENT_SCALE, RHO, WEIGHT_DECAY
from ..intrinsics import (
    FIRST,
    GRAD,
    PARAM,
    SECOND,
    claim,
    fma,
    load,
    load_integer,
    prefetch,
    store,
    store_integer,
    tensor_at,
    through,
)

# Columns of a list of tables that are stepped: addresses, of which IDS, ORDER and SEGMENTS are of int64, and the elements of
# a row. MARKS: of a number for each row of the table, which becomes `mark` where the row is stepped; 0: there are none.
(
    TABLE_PARAM,
    TABLE_GRAD,
    TABLE_FIRST,
    TABLE_SECOND,
    TABLE_IDS,
    TABLE_ORDER,
    TABLE_SEGMENTS,
    TABLE_MARKS,
    TABLE_WIDTH,
) = range(9)
TABLE_COLUMNS: Final = 9
ROWS_SIGNATURE: Final = (
    "void(int64[:, ::1], int64[::1], float64[:, ::1], float64[::1], int64, int64[::1], int64)"
)

# Random rows wait for memory, so rows ahead are prefetched. 100 K rows of 32 in 2 M take 2.2 ms, and 8.8 ms if only
# the next row is prefetched.
PREFETCH_ROWS: Final = 16
BYTES: Final = (4, 8, 2, 2)


class RowSpec(NamedTuple):
    """What a row kernel is compiled for."""

    adadelta: bool
    wide: bool
    param: int
    grad: int
    state: int
    row_wise: bool = False
    every_row: bool = False  # row k of the gradient is row k of the table: no ids
    merged: bool = True  # False: `order` and `segments` say which gradient rows make one table row
    unscale: bool = False
    scaled: bool = False
    maximize: bool = False
    coupled: bool = False


def _mean_square(x: Any) -> float:
    a, b, c, d = 0.0, 0.0, 0.0, 0.0  # four sums, or else every addition waits for the one before
    whole = len(x) & ~3
    for j in range(0, whole, 4):
        a += np.float64(x[j]) * np.float64(x[j])
        b += np.float64(x[j + 1]) * np.float64(x[j + 1])
        c += np.float64(x[j + 2]) * np.float64(x[j + 2])
        d += np.float64(x[j + 3]) * np.float64(x[j + 3])
    for j in range(whole, len(x)):
        a += np.float64(x[j]) * np.float64(x[j])
    return float(((a + b) + (c + d)) / len(x))


mean_square: Any = register_jitable(_mean_square)


def rows_step(spec: RowSpec) -> Callable[..., None]:
    """Make the kernel that steps unique rows of a list of tables.

    `kernel(tables, starts, rates, scalars, mark, plan, worker)`. tables: (tables, TABLE_COLUMNS). starts: (tables + 1,)
    number of each table's first row, of all that are stepped. rates: (tables, 2) learning rate and factor. ids, order and
    segments: as `arrange` gives them; those that `spec` rules out are not read. scalars: by the columns in `kernels/dense.py`.
    """
    adadelta, wide, P, G, S, row_wise, every_row, merged, unscale, scaled, maximize, coupled = spec
    real: Any = np.float64 if wide else np.float32
    half = G >= 2
    param_bytes, grad_bytes, state_bytes = BYTES[P], BYTES[G], BYTES[S]

    def kernel(tables: Any, starts: Any, rates: Any, scalars: Any, mark: int, plan: Any, worker: int) -> None:
        rho, one_minus_rho = real(scalars[RHO]), real(scalars[ONE_MINUS_RHO])
        eps, weight_decay = real(scalars[EPS]), real(scalars[WEIGHT_DECAY])
        up, down = real(QUOTIENT_SCALE), real(QUOTIENT_SCALE**-0.5)
        grad_scale = real(scalars[GRAD_SCALE])
        buffer = np.empty(tables[:, TABLE_WIDTH].max(), real)
        piece = claim(plan, worker)
        while piece >= 0:
            start, stop = piece * plan[1], min((piece + 1) * plan[1], plan[2])
            table = tensor_at(starts, start)
            for number in range(start, stop):
                while starts[table + 1] <= number:
                    table += 1
                width = tables[table, TABLE_WIDTH]
                param_base, grad_base = tables[table, TABLE_PARAM], tables[table, TABLE_GRAD]
                first_base, second_base = tables[table, TABLE_FIRST], tables[table, TABLE_SECOND]
                ids, marks = tables[table, TABLE_IDS], tables[table, TABLE_MARKS]
                minus_lr, scale = real(-rates[table, 0]), real(rates[table, 1])
                state_width = 1 if row_wise else width
                g = buffer[:width]
                k = number - starts[table]
                row = k if every_row else load_integer(ids, k)
                param = param_base + row * width * param_bytes
                first = first_base + row * state_width * state_bytes
                second = second_base + row * state_width * state_bytes
                if not every_row and number + PREFETCH_ROWS < min(stop, starts[table + 1]):
                    ahead = load_integer(ids, k + PREFETCH_ROWS)
                    for line in range(0, width * param_bytes, 64):
                        prefetch(param_base + ahead * width * param_bytes + line)
                    for line in range(0, state_width * state_bytes, 64):
                        prefetch(first_base + ahead * state_width * state_bytes + line)
                        if adadelta:
                            prefetch(second_base + ahead * state_width * state_bytes + line)
                    if marks:
                        prefetch(marks + ahead * 8)
                if marks:
                    store_integer(marks, row, mark)
                if merged:
                    grad = grad_base + k * width * grad_bytes
                    for j in range(width):
                        g[j] = load(grad, j, G, wide, GRAD)
                else:
                    order, segments = tables[table, TABLE_ORDER], tables[table, TABLE_SEGMENTS]
                    begin, end = load_integer(segments, k), load_integer(segments, k + 1)
                    grad = grad_base + load_integer(order, begin) * width * grad_bytes
                    for j in range(width):
                        g[j] = load(grad, j, G, wide, GRAD)
                    for m in range(begin + 1, end):
                        grad = grad_base + load_integer(order, m) * width * grad_bytes
                        for j in range(width):
                            g[j] = g[j] + load(grad, j, G, wide, GRAD)
                    if half and end - begin > 1:
                        for j in range(width):
                            g[j] = through(g[j], G)
                if unscale or scaled or maximize or coupled:
                    for j in range(width):
                        x = g[j]
                        if unscale:
                            x = x / grad_scale
                        if scaled:
                            x = x * scale
                        if maximize:
                            x = -x
                        if coupled:
                            x = fma(weight_decay, load(param, j, P, wide, PARAM), x)
                        g[j] = x
                if row_wise:
                    mean = real(mean_square(g))
                    if adadelta:
                        v = fma(one_minus_rho, mean, rho * load(first, 0, S, wide, FIRST))
                        u = load(second, 0, S, wide, SECOND)
                        ratio = math.sqrt((u + eps) * up / (v + eps)) * down
                        for j in range(width):
                            d = ratio * g[j]
                            g[j] = d
                            store(param, j, fma(minus_lr, d, load(param, j, P, wide, PARAM)), P, PARAM)
                        store(first, 0, v, S, FIRST)
                        store(second, 0, fma(one_minus_rho, real(mean_square(g)), rho * u), S, SECOND)
                    else:
                        h = load(first, 0, S, wide, FIRST) + mean
                        store(first, 0, h, S, FIRST)
                        multiplier = minus_lr / (math.sqrt(h) + eps)
                        for j in range(width):
                            store(param, j, fma(multiplier, g[j], load(param, j, P, wide, PARAM)), P, PARAM)
                else:
                    for j in range(width):
                        x = g[j]
                        p = load(param, j, P, wide, PARAM)
                        if adadelta:
                            v = fma(one_minus_rho * x, x, rho * load(first, j, S, wide, FIRST))
                            u = load(second, j, S, wide, SECOND)
                            d = math.sqrt((u + eps) * up / (v + eps)) * down * x
                            store(first, j, v, S, FIRST)
                            store(second, j, fma(one_minus_rho * d, d, rho * u), S, SECOND)
                            p = fma(minus_lr, d, p)
                        else:
                            h = load(first, j, S, wide, FIRST) + x * x
                            store(first, j, h, S, FIRST)
                            p = p + minus_lr * (x / (math.sqrt(h) + eps))
                        store(param, j, p, P, PARAM)
            piece = claim(plan, worker)

    return kernel
