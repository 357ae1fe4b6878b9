"""The kernel behind `ops/samples.py`: digests of lines of 64 bytes, of some lines or of all.

A digest is a sum over lines, and a line gives a sum over its words. Each word is folded and multiplied by an odd number
of its own, so a change of any single word changes the digest. A digest guards against mistakes, not against malice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from .intrinsics import LINE_FACTORS, WORD_SHIFT, fold_line, load_byte

LINE_BYTES: Final = 64
# Columns of a table of pieces. `spread` is a power of two: one line is read of so many neighbouring lines.
ADDRESS: Final = 0
BYTES: Final = 1
SPREAD: Final = 2
COLUMNS: Final = 3
SIGNATURE: Final = "void(int64[:, ::1], int64, uint64[::1])"
# Multiplied by the turn it gives the line that is read. It is odd, so `spread` turns read all of `spread` lines.
_TURN: Final = 0x9E3779B1
_HALF: Final = 32


def _digest() -> Callable[..., Any]:
    """Make `digest(address, number, size)`, the digest of `size` bytes at `address` as uint64.

    The bytes are lines, of which only the last may be shorter. The first line has number `number`.
    """
    factors = np.array(LINE_FACTORS, np.uint64)
    factor, one, half, shift = (
        np.uint64(LINE_FACTORS[0]),
        np.uint64(1),
        np.uint64(_HALF),
        np.uint64(WORD_SHIFT),
    )

    def digest(address: int, number: int, size: int) -> Any:
        total, at = np.uint64(0), 0
        line = np.uint64(number) * factor
        while at + LINE_BYTES <= size:
            found = fold_line(address + at)
            total += (found ^ (found >> half)) * (line | one)
            line += factor
            at += LINE_BYTES
        if at < size:
            found = np.uint64(0)
            for word in range((size - at + 7) >> 3):
                bits = np.uint64(0)
                for j in range(min(8, size - at - 8 * word)):
                    bits |= load_byte(address + at + 8 * word + j) << np.uint64(8 * j)
                found += (bits ^ (bits >> shift)) * factors[word]
            total += (found ^ (found >> half)) * (line | one)
        return total

    return digest


def pieces(_: None) -> Callable[..., None]:
    """Make `kernel(table, turn, digests)`, which digests the lines of each piece that are read at this turn."""
    from numba.extending import register_jitable

    digest: Any = register_jitable(_digest())

    def kernel(table: Any, turn: int, digests: Any) -> None:
        for k in range(len(digests)):
            address, size, spread = table[k, ADDRESS], table[k, BYTES], table[k, SPREAD]
            total = np.uint64(0)
            if spread == 1:
                total = digest(address, 0, size)
            else:
                number = ((turn + k) * _TURN) & (spread - 1)
                while number * LINE_BYTES < size:
                    at = number * LINE_BYTES
                    total += digest(address + at, number, min(LINE_BYTES, size - at))
                    number += spread
            digests[k] = total

    return kernel
