"""The kernels behind `ops/copies.py`: copies of whole cache lines, and half floats widened to float32.

A store that bypasses the cache does not read the line that it overwrites. So a copy moves two bytes per byte and not
three, and the cache keeps what it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from .intrinsics import FLOAT32, GRAD, PARAM, claim, copy_lines, load, store

LINE_BYTES: Final = 64
SIGNATURE: Final = "void(int64, int64, int64[::1], int64)"


def lines(past_cache: bool) -> Callable[..., None]:
    """Make `kernel(target, source, plan, worker)`, which copies 64-byte lines.

    target and source are addresses, and target is a multiple of 64. past_cache: stores bypass the cache.
    """

    def kernel(target: int, source: int, plan: Any, worker: int) -> None:
        piece = claim(plan, worker)
        while piece >= 0:
            start, stop = piece * plan[1], min((piece + 1) * plan[1], plan[2])
            at = start * LINE_BYTES
            copy_lines(target + at, source + at, stop - start, past_cache)
            piece = claim(plan, worker)

    return kernel


def widen(kind: int) -> Callable[..., None]:
    """Make `kernel(target, source, plan, worker)`, which writes elements of a half type as float32.

    kind: the element kind of source. target and source are addresses.
    """

    def kernel(target: int, source: int, plan: Any, worker: int) -> None:
        piece = claim(plan, worker)
        while piece >= 0:
            for j in range(piece * plan[1], min((piece + 1) * plan[1], plan[2])):
                store(target, j, load(source, j, kind, False, GRAD), FLOAT32, PARAM)
            piece = claim(plan, worker)

    return kernel
