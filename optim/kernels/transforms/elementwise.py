"""The kernels behind `ops/transforms.py`: gradients scaled, clipped, given noise, centralized.

Each reads gradients of tensors that lie one behind the other, multiplies them by their tensor's factor, and writes them in
the dtype that is stepped. Elements, and rows, are independent of each other, so any split gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from ..intrinsics import EMA, FLOAT64, GRAD, PARAM, claim, fma, folded, load, store, tensor_at
from .normal import normal

SCALE, CLIP, NOISE = range(3)
# Elements that a thread takes at once, of one tensor.
BLOCK_ELEMENTS: Final = 4096
# Partial sums of a row's mean. Their number and order determine the bits.
LANES: Final = 16
SIGNATURE: Final = "void(int64, int64, int64[::1], int64[::1], float64[::1], float64, uint64[::1], int64[::1], int64, int64[::1], int64)"
ROWS_SIGNATURE: Final = (
    "void(int64, int64, int64[::1], int64[::1], int64[::1], boolean[::1], float64[::1], int64[::1], int64)"
)
AVERAGE_SIGNATURE: Final = "void(int64, int64, float64, int64[::1], int64)"


def elementwise(spec: tuple[int, int, int]) -> Callable[..., None]:
    """Make `kernel(target, source, borders, starts, factors, number, keys, ids, row, plan, worker)`.

    spec: the operation, and the element kinds of source and target. target and source are addresses, and may be equal if
    the kinds are. borders and starts: (tensors + 1,) each tensor's first element and first block. factors: one for each
    tensor. number: the bound of CLIP, the standard deviation of NOISE. keys: of NOISE, one for each tensor. ids and row: for
    rows of one tensor, their ids and length; else empty and 0.
    """
    operation, kind, total_kind = spec
    wide = total_kind == FLOAT64
    real: Any = np.float64 if wide else np.float32

    def kernel(
        target: int,
        source: int,
        borders: Any,
        starts: Any,
        factors: Any,
        number: float,
        keys: Any,
        ids: Any,
        row: int,
        plan: Any,
        worker: int,
    ) -> None:
        bound = real(number)
        piece = claim(plan, worker)
        while piece >= 0:
            start, stop = piece * plan[1], min((piece + 1) * plan[1], plan[2])
            tensor = tensor_at(starts, start)
            for block in range(start, stop):
                while starts[tensor + 1] <= block:
                    tensor += 1
                base = borders[tensor]
                first = base + (block - starts[tensor]) * BLOCK_ELEMENTS
                end = min(first + BLOCK_ELEMENTS, borders[tensor + 1])
                factor = real(factors[tensor])
                for i in range(first, end):
                    x = load(source, i, kind, wide, GRAD) * factor
                    if operation == CLIP:
                        x = bound if x > bound else (-bound if x < -bound else x)  # NaN passes
                    if operation == NOISE:
                        at = i - base
                        if row > 0:
                            at = ids[at // row] * row + at % row
                        x = x + real(number * normal(keys[tensor], at))
                    store(target, i, x, total_kind, PARAM)
            piece = claim(plan, worker)

    return kernel


def centralize(spec: tuple[int, int]) -> Callable[..., None]:
    """Make `kernel(target, source, borders, starts, lengths, centred, factors, plan, worker)`.

    spec: the element kinds of source and target. starts: (tensors + 1,) each tensor's first row. lengths: elements of a row
    of each tensor. centred: whether the mean of each of its rows is taken from it. The mean is a float64 sum, lane by lane.
    """
    kind, total_kind = spec
    wide = total_kind == FLOAT64
    real: Any = np.float64 if wide else np.float32

    def kernel(
        target: int,
        source: int,
        borders: Any,
        starts: Any,
        lengths: Any,
        centred: Any,
        factors: Any,
        plan: Any,
        worker: int,
    ) -> None:
        lanes = np.empty(LANES, np.float64)
        piece = claim(plan, worker)
        while piece >= 0:
            start, stop = piece * plan[1], min((piece + 1) * plan[1], plan[2])
            tensor = tensor_at(starts, start)
            for row in range(start, stop):
                while starts[tensor + 1] <= row:
                    tensor += 1
                first = borders[tensor] + (row - starts[tensor]) * lengths[tensor]
                end = min(first + lengths[tensor], borders[tensor + 1])
                factor, mean = real(factors[tensor]), real(0.0)
                if centred[tensor]:
                    for j in range(LANES):
                        lanes[j] = 0.0
                    for chunk in range(first, end, LANES):
                        for j in range(min(LANES, end - chunk)):
                            lanes[j] += load(source, chunk + j, kind, wide, GRAD) * factor
                    mean = real(folded(lanes) / (end - first))
                for i in range(first, end):
                    x = load(source, i, kind, wide, GRAD) * factor
                    store(target, i, x - mean, total_kind, PARAM)
            piece = claim(plan, worker)

    return kernel


def average(spec: tuple[int, int]) -> Callable[..., None]:
    """Make `kernel(averages, parameters, rest, plan, worker)`: average = fma(rest, p - average, average).

    spec: the element kinds of parameters and averages. With a `rest` of 1 the average becomes the parameter.
    """
    kind, average_kind = spec
    wide = average_kind == FLOAT64
    real: Any = np.float64 if wide else np.float32

    def kernel(averages: int, parameters: int, rest: float, plan: Any, worker: int) -> None:
        by = real(rest)
        piece = claim(plan, worker)
        while piece >= 0:
            for i in range(piece * plan[1], min((piece + 1) * plan[1], plan[2])):
                p = load(parameters, i, kind, wide, PARAM)
                if rest == 1.0:
                    store(averages, i, p, average_kind, EMA)
                else:
                    a = load(averages, i, average_kind, wide, EMA)
                    store(averages, i, fma(by, p - a, a), average_kind, EMA)
            piece = claim(plan, worker)

    return kernel
