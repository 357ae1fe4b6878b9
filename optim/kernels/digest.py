"""The part of xxh3-64 that takes one block after the other; `ops/digest.py` has the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

SIGNATURE: Final = "void(uint64[:, ::1], uint64[::1], uint64[::1])"


def fold(shift: int) -> Callable[..., None]:
    """Make `kernel(sums, secret, lanes)`, which folds each block's sums into the eight lanes, in block order.

    sums: (blocks, 8). secret and lanes: (8,). shift: the right shift with which a lane is mixed.
    """
    bits, prime = np.uint64(shift), np.uint64(0x9E3779B1)

    def kernel(sums: Any, secret: Any, lanes: Any) -> None:
        for block in range(sums.shape[0]):
            for lane in range(8):
                mixed = lanes[lane] + sums[block, lane]
                mixed ^= mixed >> bits
                lanes[lane] = (mixed ^ secret[lane]) * prime

    return kernel
