"""The kernels behind `ops/quantise.py`: they make or read blocks of int8 codes with one float32 scale each.

Each kernel reads its input once. A block is its scale's four bytes and then one byte per element. All arithmetic is float32, so
any language gets the same bytes. With a = gradient + residual:

    scale = max|a| / 127          0 where that is below the smallest normal float32; NaN if any a is not finite
    code  = a / scale             rounded to nearest, halves to even; 0 where the scale is 0 or NaN
    value = code * scale          what the receiver reads
    rest  = a - value             exact (Sterbenz); the residual as it was where the scale is NaN

A unit is a parameter or a row. Blocks are counted from each unit's start, and a unit's last block may be shorter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from .intrinsics import (
    CODE,
    FIRST,
    FLOAT32,
    GRAD,
    PARAM,
    SCALE,
    SECOND,
    claim,
    folded,
    load,
    store,
    tensor_at,
)
from .norms import BLOCK_ELEMENTS, LANES

SCALE_BYTES: Final = 4
QUANTISE_SIGNATURE: Final = "void(int64, int64, int64, int64, int64, int64, int64[::1], int64)"
DEQUANTISE_SIGNATURE: Final = (
    "void(int64, int64, int64[::1], int64[::1], int64[::1], int64[::1], float64[::1], int64[::1], int64)"
)
_INFINITY: Final = 0x7F800000
_SMALLEST_NORMAL: Final = np.float32(2.0**-126)
# Adding and then subtracting it rounds a float32 below 2**22 to an integer, halves to even.
_ROUNDER: Final = np.float32(1.5 * 2.0**23)
_LEVELS: Final = np.float32(127.0)
_ZERO: Final = np.float32(0.0)


def quantise(spec: tuple[int, int]) -> Callable[..., None]:
    """Make `kernel(source, residual, rest, codes, length, begin, plan, worker)`, which quantises blocks.

    spec: the gradient's element kind, and the number of elements in a block. source, residual, rest and codes are
    addresses. A unit has `length` elements. The first block has number `begin`.
    """
    kind, block = spec

    def kernel(
        source: int, residual: int, rest: int, codes: int, length: int, begin: int, plan: Any, worker: int
    ) -> None:
        per_unit = (length + block - 1) // block
        unit_bytes = length + SCALE_BYTES * per_unit
        a = np.empty(block, np.float32)
        bits = a.view(np.int32)
        top_bits = np.empty(1, np.int32)
        top = top_bits.view(np.float32)
        piece = claim(plan, worker)
        while piece >= 0:
            for number in range(begin + piece * plan[1], begin + min((piece + 1) * plan[1], plan[2])):
                unit = number // per_unit
                place = number - unit * per_unit
                count = min(block, length - place * block)
                at = unit * length + place * block
                to = codes + unit * unit_bytes + place * (block + SCALE_BYTES)
                for j in range(count):
                    a[j] = load(source, at + j, kind, False, GRAD) + load(
                        residual, at + j, FLOAT32, False, FIRST
                    )
                largest = np.int32(0)
                for j in range(count):
                    largest = max(largest, bits[j] & np.int32(0x7FFFFFFF))
                top_bits[0] = largest
                scale = top[0] / _LEVELS
                if largest >= _INFINITY:
                    store(to, 0, np.float32(np.nan), SCALE, PARAM)
                    for j in range(count):
                        store(to + SCALE_BYTES, j, _ZERO, CODE, PARAM)
                        store(rest, at + j, load(residual, at + j, FLOAT32, False, FIRST), FLOAT32, SECOND)
                elif scale < _SMALLEST_NORMAL:
                    store(to, 0, _ZERO, SCALE, PARAM)
                    for j in range(count):
                        store(to + SCALE_BYTES, j, _ZERO, CODE, PARAM)
                        store(rest, at + j, a[j], FLOAT32, SECOND)
                else:
                    store(to, 0, scale, SCALE, PARAM)
                    for j in range(count):
                        code = (a[j] / scale + _ROUNDER) - _ROUNDER
                        store(to + SCALE_BYTES, j, code, CODE, PARAM)
                        store(rest, at + j, a[j] - code * scale, FLOAT32, SECOND)
            piece = claim(plan, worker)

    return kernel


def dequantise(spec: tuple[int, bool]) -> Callable[..., None]:
    """Make `kernel(codes, values, froms, tos, sizes, starts, sums, plan, worker)`, over units.

    Each piece of work is a norm block of a unit. spec: the number of elements in a block of codes, and whether to sum the
    squares of the float32 values, in the order of `kernels/norms.py`. codes and values are addresses. froms: each unit's
    first byte of codes. tos: each unit's first element of values. starts: the number of each unit's first norm block.
    """
    block, summed = spec

    def kernel(
        codes: int,
        values: int,
        froms: Any,
        tos: Any,
        sizes: Any,
        starts: Any,
        sums: Any,
        plan: Any,
        worker: int,
    ) -> None:
        lanes = np.empty(LANES, np.float64)
        piece = claim(plan, worker)
        while piece >= 0:
            start, stop = piece * plan[1], min((piece + 1) * plan[1], plan[2])
            unit = tensor_at(starts, start)
            for number in range(start, stop):
                while starts[unit + 1] <= number:
                    unit += 1
                first = (number - starts[unit]) * BLOCK_ELEMENTS
                end = min(first + BLOCK_ELEMENTS, sizes[unit])
                for at in range(first, end, block):
                    source = codes + froms[unit] + at + (at // block) * SCALE_BYTES
                    scale = load(source, 0, SCALE, False, GRAD)
                    to = tos[unit] + at
                    for j in range(min(block, end - at)):
                        code = load(source + SCALE_BYTES, j, CODE, False, GRAD)
                        store(values, to + j, code * scale, FLOAT32, PARAM)
                if summed:
                    for j in range(LANES):
                        lanes[j] = 0.0
                    for at in range(first, end, LANES):
                        for j in range(min(LANES, end - at)):
                            x = load(values, tos[unit] + at + j, FLOAT32, True, PARAM)
                            lanes[j] += x * x
                    sums[number] = folded(lanes)
            piece = claim(plan, worker)

    return kernel
