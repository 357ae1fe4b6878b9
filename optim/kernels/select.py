"""The kernels behind `ops/select.py`: count elements by magnitude, and take the largest ones out in order.

An element's key is the bits of its magnitude, which are ordered as magnitudes are. Every NaN has the same key, above
infinity's. Counts are kept per slice, not per thread. So each slice knows where its own elements go, and the result
does not depend on which thread takes which slice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from .intrinsics import FIRST, FLOAT32, FLOAT64, GRAD, PARAM, SECOND, claim, load, store

# Keys are compared by so many bits at a time: a slice's counts (16 KiB) stay in the L1 cache.
LEVEL_BITS: Final = 11
COUNT_SIGNATURE: Final = (
    "void(int64, int64, int64, int64, int64, int64[:, ::1], int64[::1], int64[::1], int64)"
)
TAKE_SIGNATURE: Final = (
    "void(int64, int64, int64, int64[::1], int64, int64[::1], int64[::1], int64[::1], int64)"
)
# The keys of so many elements are made together, in vector instructions.
_GROUP: Final = 1024
_BITS: Final = {FLOAT32: (np.float32, np.int32, 0x7F800000), FLOAT64: (np.float64, np.int64, 0x7FF << 52)}


def key_bits(kind: int) -> int:
    """How many bits a key has."""
    return 63 if kind == FLOAT64 else 31


def count(spec: tuple[int, int, bool, bool]) -> Callable[..., None]:
    """Make `kernel(source, residual, whole, shift, prefix, counts, above, plan, worker)`, which counts keys.

    A key's low `shift` bits are ignored. The LEVEL_BITS bits above them are the digit, and the rest is the beginning.
    counts[slice, digit]: the number of elements whose beginning is `prefix`, by digit. above[slice]: the number of
    elements whose beginning is larger. spec: the kinds of source and whole, whether whole = source (+ residual) is
    written first, and whether there is a residual. source, residual and whole are addresses.
    """
    kind, held, written, owed = spec
    real, word, infinity = _BITS[held]
    wide = held == FLOAT64
    mask, nan_key = (1 << key_bits(held)) - 1, infinity + 1
    low = (1 << LEVEL_BITS) - 1

    def kernel(
        source: int,
        residual: int,
        whole: int,
        shift: int,
        prefix: int,
        counts: Any,
        above: Any,
        plan: Any,
        worker: int,
    ) -> None:
        a = np.empty(_GROUP, real)
        bits = a.view(word)
        piece = claim(plan, worker)
        while piece >= 0:
            own = counts[piece]
            own[:] = 0
            more = 0
            stop = min((piece + 1) * plan[1], plan[2])
            for at in range(piece * plan[1], stop, _GROUP):
                members = min(_GROUP, stop - at)
                if written:
                    for j in range(members):
                        value = load(source, at + j, kind, wide, GRAD)
                        if owed:
                            value += load(residual, at + j, held, wide, SECOND)
                        a[j] = value
                        store(whole, at + j, value, held, FIRST)
                else:
                    for j in range(members):
                        a[j] = load(whole, at + j, held, wide, FIRST)
                for j in range(members):
                    key: Any = min(np.int64(bits[j]) & mask, nan_key)
                    key >>= shift
                    begins = key >> LEVEL_BITS
                    if begins == prefix:
                        own[key & low] += 1
                    elif begins > prefix:
                        more += 1
            above[piece] = more
            piece = claim(plan, worker)

    return kernel


def take(spec: tuple[int, int, bool]) -> Callable[..., None]:
    """Make `kernel(whole, residual, values, indices, threshold, places, ties, plan, worker)`.

    It takes each slice's elements whose key is above the threshold, and the first `ties[slice]` of those whose key
    equals it. It writes their indices, and their values in the wire's kind, from `places[slice]` on. `whole` keeps
    what was not written. Where that is not finite, `whole` gets the residual, or 0 without one. spec: the kinds of
    whole and wire, and whether there is a residual.
    """
    held, wire, owed = spec
    real, word, infinity = _BITS[held]
    wide = held == FLOAT64
    mask, nan_key = (1 << key_bits(held)) - 1, infinity + 1
    zero = real(0)

    def kernel(
        whole: int,
        residual: int,
        values: int,
        indices: Any,
        threshold: int,
        places: Any,
        ties: Any,
        plan: Any,
        worker: int,
    ) -> None:
        a = np.empty(_GROUP, real)
        bits = a.view(word)
        piece = claim(plan, worker)
        while piece >= 0:
            place, equals = places[piece], ties[piece]
            stop = min((piece + 1) * plan[1], plan[2])
            for at in range(piece * plan[1], stop, _GROUP):
                members = min(_GROUP, stop - at)
                for j in range(members):
                    a[j] = load(whole, at + j, held, wide, FIRST)
                for j in range(members):
                    key: Any = min(np.int64(bits[j]) & mask, nan_key)
                    taken = key > threshold
                    if key == threshold and equals > 0:
                        taken = True
                        equals -= 1
                    if taken:
                        indices[place] = at + j
                        store(values, place, a[j], wire, PARAM)
                        # a value that is not finite leaves a rest that is not finite either
                        rest = a[j] - load(values, place, wire, wide, PARAM)
                        place += 1
                        if not np.isfinite(rest):
                            rest = load(residual, at + j, held, wide, SECOND) if owed else zero
                        store(whole, at + j, rest, held, FIRST)
                    elif key >= infinity:
                        store(
                            whole,
                            at + j,
                            load(residual, at + j, held, wide, SECOND) if owed else zero,
                            held,
                            FIRST,
                        )
            piece = claim(plan, worker)

    return kernel
