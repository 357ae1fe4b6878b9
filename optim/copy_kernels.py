"""The kernels behind copies, for the threads of the pool: whole cache lines, past the cache if asked for; and half floats
as float32.

A store past the cache does not read the line that it overwrites, so a copy moves two bytes per byte and not three,
and leaves in the cache what is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from .intrinsics import FLOAT32, GRAD, PARAM, claim, copy_lines, load, store

LINE_BYTES: Final = 64
SIGNATURE: Final = "void(int64, int64, int64[::1], int64)"


def lines(past_cache: bool) -> Callable[..., None]:
    """`kernel(target, source, plan, worker)` over 64-byte lines; `target` lies on a line's border."""

    def kernel(target: int, source: int, plan: Any, worker: int) -> None:
        piece = claim(plan, worker)
        while piece >= 0:
            start, stop = piece * plan[1], min((piece + 1) * plan[1], plan[2])
            at = start * LINE_BYTES
            copy_lines(target + at, source + at, stop - start, past_cache)
            piece = claim(plan, worker)

    return kernel


def widen(kind: int) -> Callable[..., None]:
    """`kernel(target, source, plan, worker)` over elements: float32 of a half type."""

    def kernel(target: int, source: int, plan: Any, worker: int) -> None:
        piece = claim(plan, worker)
        while piece >= 0:
            for j in range(piece * plan[1], min((piece + 1) * plan[1], plan[2])):
                store(target, j, load(source, j, kind, False, GRAD), FLOAT32, PARAM)
            piece = claim(plan, worker)

    return kernel
