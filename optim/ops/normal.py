"""Normal deviates from a counter, as numpy arrays: the bits of `kernels/transforms/normal.py`, for what has no kernel."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

MASK: Final = 2**64 - 1
Doubles = np.ndarray[Any, np.dtype[np.float64]]


def noise_key(seed: int, version: int, parameter: int) -> int:
    """The key under which a parameter of a model gets its deviates in one version."""
    key = seed & MASK
    for word in (version, parameter):
        key = _mixed((key + (word + 1) * 0x9E3779B97F4A7C15) & MASK)
    return key


def _mixed(word: int) -> int:
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def normals(key: int, numbers: Any) -> Doubles:
    """The deviates of elements of these numbers."""
    from ..kernels.transforms import normal

    word = np.uint64(key) + (np.asarray(numbers).astype(np.uint64) + np.uint64(1)) * normal.GOLDEN
    word = (word ^ (word >> np.uint64(30))) * normal.FIRST_FACTOR
    word = (word ^ (word >> np.uint64(27))) * normal.SECOND_FACTOR
    word = word ^ (word >> np.uint64(31))
    uniform = ((word >> np.uint64(12)).astype(np.float64) + 0.5) * normal.TO_UNIT
    q = uniform - 0.5
    with np.errstate(all="ignore"):  # each branch is taken everywhere, and used where it holds
        centre = q * _ratio(normal.A, normal.B, normal.CENTRE_SQUARED - q * q)
        r = np.sqrt(-_log(np.where(q < 0.0, uniform, 1.0 - uniform)))
        near = _ratio(normal.C, normal.D, r - normal.NEAR_FROM)
        tail = np.where(r <= normal.NEAR, near, _ratio(normal.E, normal.F, r - normal.FAR_FROM))
    return np.where(np.abs(q) <= normal.CENTRE, centre, np.where(q < 0.0, -tail, tail))


def _ratio(over: tuple[float, ...], under: tuple[float, ...], x: Doubles) -> Doubles:
    top, bottom = np.full_like(x, over[0]), np.full_like(x, under[0])
    for a, b in zip(over[1:], under[1:], strict=True):
        top, bottom = top * x + a, bottom * x + b
    return top / bottom


def _log(x: Doubles) -> Doubles:
    from ..kernels.transforms import normal

    exponent = np.zeros_like(x)
    for step in normal.STEPS:
        small = x < 2.0**-step
        x = np.where(small, x * 2.0**step, x)
        exponent = np.where(small, exponent - step, exponent)
    small = x < normal.ROOT_HALF
    x, exponent = np.where(small, x * 2.0, x), np.where(small, exponent - 1, exponent)
    s = (x - 1.0) / (x + 1.0)
    z = s * s
    series = np.full_like(x, 1.0 / 21.0)
    for k in range(19, 0, -2):
        series = series * z + 1.0 / k
    return exponent * normal.LOG_2 + 2.0 * s * series
