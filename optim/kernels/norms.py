"""The kernel behind norms: a float64 sum of squares per block of 4096 elements, in a fixed order.

Within a block, lane j of 256 adds up the elements j, j+256, j+512, ... in turn; then the lanes are folded in
halves: 128, 64, ... 1. The order determines the bits. So the result is the same for any split into whole blocks, any
number of threads and any vector width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from .intrinsics import GRAD, claim, folded, load, tensor_at

BLOCK_ELEMENTS: Final = 4096
LANES: Final = 256
SIGNATURE: Final = "void(int64[::1], int64[::1], int64[::1], float64[::1], int64[::1], int64)"


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
