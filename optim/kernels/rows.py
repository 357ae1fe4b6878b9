"""Kernels over rows of a table: arrange the ids, then gather, merge, update and scatter in one pass.

Only named rows are read or written; nothing grows with the table. Rows of equal id are summed in order of
appearance, in the arithmetic's precision, and rounded once to the gradient's dtype. `coalesce` in `ops/rows.py` does
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

from .dense import EPS, GRAD_SCALE, ONE_MINUS_RHO, QUOTIENT_SCALE, RHO, WEIGHT_DECAY
from .intrinsics import FIRST, GRAD, PARAM, SECOND, claim, fma, load, prefetch, store, through

ROWS_SIGNATURE: Final = "void(int64[::1], int64[::1], int64[::1], int64[::1], int64, float64, float64, float64[::1], int64[::1], int64)"
ARRANGE_SIGNATURE: Final = "int64(int64[::1], int64, int64[::1], int64[::1], int64[::1])"

MERGE_SIGNATURE: Final = "void(int64, int64, int64[::1], int64[::1], int64, int64[::1], int64)"

# Random rows wait for memory, so rows ahead are prefetched. 100 K rows of 32 in 2 M take 2.2 ms, and 8.8 ms if only
# the next row is prefetched.
PREFETCH_ROWS: Final = 16
# 100 K ids below 2 M are sorted in two passes of 11 bits: 0.8 ms.
DIGIT_BITS: Final = 11
_BYTES: Final = (4, 8, 2, 2)


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
    """Make the kernel that steps unique rows of one table.

    `kernel(addresses, ids, order, segments, width, lr, factor, scalars, plan, worker)`. addresses: of the parameter,
    the gradient's rows and the states. ids, order and segments: as `arrange` gives them; those that `spec` rules out
    are not read. scalars: by the columns in `dense.py`.
    """
    adadelta, wide, P, G, S, row_wise, every_row, merged, unscale, scaled, maximize, coupled = spec
    real: Any = np.float64 if wide else np.float32
    half = G >= 2
    param_bytes, grad_bytes, state_bytes = _BYTES[P], _BYTES[G], _BYTES[S]

    def kernel(
        addresses: Any,
        ids: Any,
        order: Any,
        segments: Any,
        width: int,
        lr: float,
        factor: float,
        scalars: Any,
        plan: Any,
        worker: int,
    ) -> None:
        rho, one_minus_rho = real(scalars[RHO]), real(scalars[ONE_MINUS_RHO])
        eps, weight_decay = real(scalars[EPS]), real(scalars[WEIGHT_DECAY])
        up, down = real(QUOTIENT_SCALE), real(QUOTIENT_SCALE**-0.5)
        grad_scale, minus_lr, scale = real(scalars[GRAD_SCALE]), real(-lr), real(factor)
        param_base, grad_base = addresses[0], addresses[1]
        first_base, second_base = addresses[2], addresses[3]
        state_width = 1 if row_wise else width
        g = np.empty(width, real)
        piece = claim(plan, worker)
        while piece >= 0:
            start, stop = piece * plan[1], min((piece + 1) * plan[1], plan[2])
            for k in range(start, stop):
                row = k if every_row else ids[k]
                param = param_base + row * width * param_bytes
                first = first_base + row * state_width * state_bytes
                second = second_base + row * state_width * state_bytes
                if not every_row and k + PREFETCH_ROWS < stop:
                    ahead = ids[k + PREFETCH_ROWS]
                    for line in range(0, width * param_bytes, 64):
                        prefetch(param_base + ahead * width * param_bytes + line)
                    for line in range(0, state_width * state_bytes, 64):
                        prefetch(first_base + ahead * state_width * state_bytes + line)
                        if adadelta:
                            prefetch(second_base + ahead * state_width * state_bytes + line)
                if merged:
                    grad = grad_base + k * width * grad_bytes
                    for j in range(width):
                        g[j] = load(grad, j, G, wide, GRAD)
                else:
                    begin, end = segments[k], segments[k + 1]
                    grad = grad_base + order[begin] * width * grad_bytes
                    for j in range(width):
                        g[j] = load(grad, j, G, wide, GRAD)
                    for m in range(begin + 1, end):
                        grad = grad_base + order[m] * width * grad_bytes
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


def merge(kind: int) -> Callable[..., None]:
    """Make `kernel(source, target, order, segments, width, plan, worker)`, which adds rows of equal id.

    source and target are addresses of (n, width) and (unique, width) elements of one dtype. Sums run in float64 for
    float64, else in float32, and are rounded once.
    """
    wide = kind == 1
    real: Any = np.float64 if wide else np.float32
    size = _BYTES[kind]

    def kernel(
        source: int, target: int, order: Any, segments: Any, width: int, plan: Any, worker: int
    ) -> None:
        total = np.empty(width, real)
        piece = claim(plan, worker)
        while piece >= 0:
            for k in range(piece * plan[1], min((piece + 1) * plan[1], plan[2])):
                begin, end = segments[k], segments[k + 1]
                row = source + order[begin] * width * size
                for j in range(width):
                    total[j] = load(row, j, kind, wide, GRAD)
                for m in range(begin + 1, end):
                    row = source + order[m] * width * size
                    for j in range(width):
                        total[j] = total[j] + load(row, j, kind, wide, GRAD)
                row = target + k * width * size
                for j in range(width):
                    store(row, j, total[j], kind, PARAM)
            piece = claim(plan, worker)

    return kernel


def arrange(digit_bits: int) -> Callable[..., int]:
    """Make `kernel(ids, rows, unique, order, segments) -> count`, a stable radix sort of ids.

    Equal ids come together, ascending, in order of appearance. `order` lists positions in `ids`; `unique[k]` owns
    order[segments[k] : segments[k+1]]. The kernel returns the number of unique ids, or -1 - position if an id is
    outside [0, rows). If the ids already ascend strictly, segments[0] becomes -1 and nothing else is written.
    """
    buckets, mask = 1 << digit_bits, (1 << digit_bits) - 1

    def kernel(ids: Any, rows: int, unique: Any, order: Any, segments: Any) -> int:
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
            return n
        # Each digit reads one pair of arrays and writes the other; then the pairs change places.
        keys, places = unique, order
        spare_keys, spare_places = np.empty(n, np.int64), np.empty(n, np.int64)
        for k in range(n):
            keys[k] = ids[k]
            places[k] = k
        counts = np.empty(buckets, np.int64)
        shift = 0
        while shift == 0 or (largest >> shift) > 0:
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
            shift += digit_bits
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

    return kernel
