"""Normal deviates from a counter: element number n of a key has the same deviate wherever and whenever it is asked for.

The uniform is the n-th output of SplitMix64 from the key, 52 bits of it and a half, so it is never 0 or 1. The deviate is
the inverse of the normal distribution there, by Wichura's algorithm AS 241 (1988), which is good to about 1e-16. It uses
additions, products, quotients and square roots in float64 only, each rounded on its own, and its own logarithm. So every
processor, compiler and vector width gives the same bits, which no library's log and cos promise.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numba.extending import register_jitable

GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
FIRST_FACTOR: Final = np.uint64(0xBF58476D1CE4E5B9)
SECOND_FACTOR: Final = np.uint64(0x94D049BB133111EB)
TO_UNIT: Final = 2.0**-52
CENTRE: Final = 0.425
CENTRE_SQUARED: Final = 0.180625
NEAR, NEAR_FROM, FAR_FROM = 5.0, 1.6, 5.0
ROOT_HALF: Final = 0.7071067811865476
LOG_2: Final = 0.6931471805599453
# Powers of two, by which the logarithm brings its argument to at least a half.
STEPS: Final = (32, 16, 8, 4, 2, 1)

# AS 241's coefficients, the highest power first: numerator and denominator in the centre, near it and in the tails.
A: Final = (
    2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
    1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0,
)  # fmt: skip
B: Final = (
    5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
    5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0,
)  # fmt: skip
C: Final = (
    7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
    3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0,
)  # fmt: skip
D: Final = (
    1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
    6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0,
)  # fmt: skip
E: Final = (
    2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
    2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0,
)  # fmt: skip
F: Final = (
    2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
    1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0,
)  # fmt: skip


def _mixed(word: Any) -> Any:
    word = (word ^ (word >> np.uint64(30))) * FIRST_FACTOR
    word = (word ^ (word >> np.uint64(27))) * SECOND_FACTOR
    return word ^ (word >> np.uint64(31))


mixed: Any = register_jitable(_mixed)
"""mixed(word): SplitMix64's finalizer over uint64, a permutation."""


def _ratio(over: Any, under: Any, x: float) -> float:
    top, bottom = over[0], under[0]
    for k in range(1, 8):
        top = top * x + over[k]
        bottom = bottom * x + under[k]
    return float(top / bottom)


ratio: Any = register_jitable(_ratio)
"""ratio(over, under, x): the quotient of two polynomials of degree 7."""


def _log(x: float) -> float:
    exponent = 0
    for step in STEPS:
        if x < 2.0**-step:
            x *= 2.0**step
            exponent -= step
    if x < ROOT_HALF:
        x *= 2.0
        exponent -= 1
    s = (x - 1.0) / (x + 1.0)
    z = s * s
    series = 1.0 / 21.0
    for k in range(19, 0, -2):
        series = series * z + 1.0 / k
    return exponent * LOG_2 + 2.0 * s * series


log: Any = register_jitable(_log)
"""log(x): the natural logarithm, for x from 2^-63 up to 1."""


def _normal(key: Any, number: Any) -> float:
    word = mixed(key + (np.uint64(number) + np.uint64(1)) * GOLDEN)
    uniform = (np.float64(word >> np.uint64(12)) + 0.5) * TO_UNIT
    q = uniform - 0.5
    if abs(q) <= CENTRE:
        return float(q * ratio(A, B, CENTRE_SQUARED - q * q))
    r = math.sqrt(-log(uniform if q < 0.0 else 1.0 - uniform))
    tail = ratio(C, D, r - NEAR_FROM) if r <= NEAR else ratio(E, F, r - FAR_FROM)
    return float(-tail if q < 0.0 else tail)


normal: Any = register_jitable(_normal)
"""normal(key, number): the deviate of element `number` under a uint64 key."""
