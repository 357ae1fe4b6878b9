"""The kernel behind `ops/sums.py`: a weighted sum of gradients, and the norms of the sum in one pass.

It goes by the blocks of `kernels/norms.py`. A block is added up, which leaves it in the L1 cache. Then its squares are
summed in the order that is stated there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from .intrinsics import FLOAT32, FLOAT64, GRAD, PARAM, claim, folded, load, store, tensor_at
from .norms import BLOCK_ELEMENTS, LANES

SIGNATURE: Final = (
    "void(int64[::1], float64[::1], float64, int64, int64[::1], int64[::1], float64[::1], int64[::1], int64)"
)


def weighted_sum(kind: int) -> Callable[..., None]:
    """Make `kernel(terms, weights, divisor, target, borders, starts, sums, plan, worker)`.

    It adds gradients of tensors that lie one behind the other. kind: the element kind of the terms. terms: the address
    of each gradient of all the tensors. target: the address of the sum, float32 (float64 if the terms are float64).
    borders and starts: the number of each tensor's first element and first block. sums: one float64 for every block.
    """
    wide = kind == FLOAT64
    total_kind = FLOAT64 if wide else FLOAT32
    real: Any = np.float64 if wide else np.float32

    def kernel(
        terms: Any,
        weights: Any,
        divisor: float,
        target: int,
        borders: Any,
        starts: Any,
        sums: Any,
        plan: Any,
        worker: int,
    ) -> None:
        lanes = np.empty(LANES, np.float64)
        by = real(divisor)
        piece = claim(plan, worker)
        while piece >= 0:
            start, stop = piece * plan[1], min((piece + 1) * plan[1], plan[2])
            tensor = tensor_at(starts, start)
            for block in range(start, stop):
                while starts[tensor + 1] <= block:
                    tensor += 1
                first = borders[tensor] + (block - starts[tensor]) * BLOCK_ELEMENTS
                end = min(first + BLOCK_ELEMENTS, borders[tensor + 1])
                address, weight = terms[0], real(weights[0])
                for i in range(first, end):
                    store(target, i, load(address, i, kind, wide, GRAD) * weight, total_kind, PARAM)
                for term in range(1, len(terms)):
                    address, weight = terms[term], real(weights[term])
                    for i in range(first, end):
                        x = load(target, i, total_kind, wide, PARAM)
                        x = x + load(address, i, kind, wide, GRAD) * weight
                        store(target, i, x, total_kind, PARAM)
                if by != 1:
                    for i in range(first, end):
                        store(target, i, load(target, i, total_kind, wide, PARAM) / by, total_kind, PARAM)
                for j in range(LANES):
                    lanes[j] = 0.0
                for chunk in range(first, end, LANES):
                    for j in range(min(LANES, end - chunk)):
                        y = load(target, chunk + j, total_kind, True, PARAM)
                        lanes[j] += y * y
                sums[block] = folded(lanes)
            piece = claim(plan, worker)

    return kernel
