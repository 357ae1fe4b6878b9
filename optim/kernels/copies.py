"""The kernels behind `ops/copies.py`: copies of whole cache lines, of lists of runs, and half floats widened to float32.

A store that bypasses the cache does not read the line that it overwrites. So a copy moves two bytes per byte and not
three, and the cache keeps what it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from numba.extending import register_jitable

from .intrinsics import FLOAT32, GRAD, PARAM, claim, copy_bytes, copy_lines, load, prefetch, store, tensor_at

LINE_BYTES: Final = 64
SIGNATURE: Final = "void(int64, int64, int64[::1], int64)"
RUNS_SIGNATURE: Final = "void(int64[::1], int64[::1], int64[::1], int64, int64[::1], int64)"
# From this size on a run is copied by whole lines.
LINES_FROM_BYTES: Final = 4096
# Small runs lie anywhere: those ahead are fetched. 20,000 of 32 bytes take 0.3 ms, and 0.9 without.
RUNS_AHEAD: Final = 8


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


def runs(past_cache: bool) -> Callable[..., None]:
    """Make `kernel(targets, sources, starts, begin, plan, worker)`, which copies runs of memory.

    Run k is at address sources[k] and goes to targets[k]. starts: (runs + 1,) the byte at which each begins when all are
    laid end to end. The plan's slices are of those bytes, counted from `begin`. past_cache: long runs bypass the cache.
    """

    def span(target: int, source: int, count: int) -> None:
        if count < LINES_FROM_BYTES:
            copy_bytes(target, source, count)
            return
        head = -target & (LINE_BYTES - 1)
        whole = (count - head) // LINE_BYTES
        copy_bytes(target, source, head)
        copy_lines(target + head, source + head, whole, past_cache)
        done = head + whole * LINE_BYTES
        copy_bytes(target + done, source + done, count - done)

    copy_span: Any = register_jitable(span)

    def kernel(targets: Any, sources: Any, starts: Any, begin: int, plan: Any, worker: int) -> None:
        last = len(targets) - 1
        piece = claim(plan, worker)
        while piece >= 0:
            at = begin + piece * plan[1]
            stop = begin + min((piece + 1) * plan[1], plan[2])
            run = tensor_at(starts, at)
            while at < stop:
                ahead = min(run + RUNS_AHEAD, last)
                prefetch(sources[ahead])
                prefetch(targets[ahead])
                end = min(starts[run + 1], stop)
                if end > at:
                    within = at - starts[run]
                    copy_span(targets[run] + within, sources[run] + within, end - at)
                    at = end
                run += 1
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
