"""What the dense and the row kernels for CUDA share: columns, flags, loads, stores and arithmetic.

Hyperparameters arrive in double and are rounded once. Roots and quotients are correctly rounded, and stores to half
types round to nearest even by way of float32, as on the CPU.
"""

# ruff: noqa: SIM108, RET505
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# Triton's language has no types. It decides an `if` over constants when it compiles, so such an `if` stands alone.
from __future__ import annotations

import triton
import triton.language as tl

# Columns of a pointer table, one row of int64 addresses per tensor. A kernel can read a global only if it is constexpr.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
FIRST = tl.constexpr(2)
SECOND = tl.constexpr(3)
EMA = tl.constexpr(4)
COPY = tl.constexpr(5)
COUNTER = tl.constexpr(6)
COLUMNS = tl.constexpr(7)

# QUOTIENT_SCALE of `kernels/dense.py`, and the root of its inverse. That module needs numba, so it is not imported.
QUOTIENT_SCALE = tl.constexpr(2.0**40)
QUOTIENT_UNSCALE = tl.constexpr(2.0**-20)

# Bits of FLAGS.
ADADELTA = tl.constexpr(1 << 0)
UNSCALE = tl.constexpr(1 << 1)
SCALED = tl.constexpr(1 << 2)
CLIP = tl.constexpr(1 << 3)
MAXIMIZE = tl.constexpr(1 << 4)
COUPLED = tl.constexpr(1 << 5)
DECOUPLED = tl.constexpr(1 << 6)
WRITE_GRAD = tl.constexpr(1 << 7)
ZERO_GRAD = tl.constexpr(1 << 8)
HAS_EMA = tl.constexpr(1 << 9)
HAS_COPY = tl.constexpr(1 << 10)
EPS_INSIDE_ROOT = tl.constexpr(1 << 11)
MULTIPLY_FIRST = tl.constexpr(1 << 12)
COUNT = tl.constexpr(1 << 13)  # the first block of a tensor advances its counter
LR_POINTER = tl.constexpr(1 << 14)
LR_EACH = tl.constexpr(1 << 15)  # one learning rate per tensor, behind the pointer
FACTOR_EACH = tl.constexpr(1 << 16)
SCALE_POINTER = tl.constexpr(1 << 17)
FOUND_INF = tl.constexpr(1 << 18)
ALIGNED = tl.constexpr(1 << 19)  # every address in the table is a multiple of 16


@triton.jit
def real(value, REAL: tl.constexpr):
    """A double from the host as REAL, rounded once."""
    return tl.full([], value, tl.float64).to(REAL)


@triton.jit
def load(pointer, offsets, mask, REAL: tl.constexpr):
    """Elements as REAL; 0 where masked out."""
    if mask is None:
        value = tl.load(pointer + offsets)
    else:
        value = tl.load(pointer + offsets, mask=mask, other=0.0)
    if pointer.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(REAL)


@triton.jit
def store(pointer, offsets, value, mask):
    """Store, rounded to nearest even; to a half type by way of float32, as the CPU kernels do."""
    if pointer.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def divide(a, b):
    """a / b, correctly rounded: the plain operator is approximate in float32, and exact in float64."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def root(x):
    """sqrt(x), correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def prepare(g, p, factor, bound, weight_decay, FLAGS: tl.constexpr):
    """The gradient for the rule, made from the unscaled gradient."""
    if SCALED & FLAGS:
        g = g * factor
    if CLIP & FLAGS:
        g = tl.where(g > bound, bound, tl.where(g < -bound, -bound, g))  # NaN passes
    if MAXIMIZE & FLAGS:
        g = -g
    if COUPLED & FLAGS:
        g = tl.fma(weight_decay, p, g)
    return g


@triton.jit
def quotient_root(u, v, eps):
    """sqrt((u + eps) / (v + eps)), scaled as in `kernels/dense.py`: the quotient stays in range."""
    return root(divide((u + eps) * QUOTIENT_SCALE, v + eps)) * QUOTIENT_UNSCALE


@triton.jit
def adadelta(g, v, u, rho, one_minus_rho, eps, FLAGS: tl.constexpr):
    """The new v, d, and the new u."""
    if MULTIPLY_FIRST & FLAGS:
        v = tl.fma(one_minus_rho, g * g, rho * v)
        d = divide(root(u + eps) * g, root(v + eps))
        u = tl.fma(one_minus_rho, d * d, rho * u)
    else:
        v = tl.fma(one_minus_rho * g, g, rho * v)
        d = quotient_root(u, v, eps) * g
        u = tl.fma(one_minus_rho * d, d, rho * u)
    return v, d, u


@triton.jit
def pointer_at(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr, FLAGS: tl.constexpr):
    """The pointer in one column of a table's row."""
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED & FLAGS:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def count_up(counter):
    """Add one to a step counter. A float32 counter stops at 2^24, as torch's does."""
    tl.store(counter, (tl.load(counter).to(tl.float64) + 1.0).to(counter.dtype.element_ty))
