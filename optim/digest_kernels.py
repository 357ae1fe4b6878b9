"""The part of xxh3-64 that goes block after block; `device_digest` has the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

SIGNATURE: Final = "void(uint64[:, ::1], uint64[::1], uint64[::1])"


def fold(shift: int) -> Callable[..., None]:
    """`kernel(sums, secret, lanes)`: take the sums of one block after the other into the eight lanes."""
    bits, prime = np.uint64(shift), np.uint64(0x9E3779B1)

    def kernel(sums: Any, secret: Any, lanes: Any) -> None:
        for block in range(sums.shape[0]):
            for lane in range(8):
                mixed = lanes[lane] + sums[block, lane]
                mixed ^= mixed >> bits
                lanes[lane] = (mixed ^ secret[lane]) * prime

    return kernel
