"""The kernel behind `samples`: digests of lines of 64 bytes, some of them or all.

A digest is a sum over lines, of which each is a sum over its words, each folded and multiplied by an odd number of its
own: any single word that changes changes it. It guards against mistakes, not against malice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from .intrinsics import LINE_FACTORS, WORD_SHIFT, fold_line, load_byte

LINE_BYTES: Final = 64
# Columns of a table of pieces; `spread` is a power of two: of so many neighbouring lines one is read.
ADDRESS: Final = 0
BYTES: Final = 1
SPREAD: Final = 2
COLUMNS: Final = 3
SIGNATURE: Final = "void(int64[:, ::1], int64, uint64[::1])"
# Which of `spread` lines is read at a turn: an odd number, so that all of them are in as many turns.
_TURN: Final = 0x9E3779B1
_HALF: Final = 32


def _digest() -> Callable[..., Any]:
    """`digest(address, number, size)`: of up to 64 bytes, or any number of lines from line `number` on."""
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
    """`kernel(table, turn, digests)`: the digest of each piece's lines of this turn."""
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
