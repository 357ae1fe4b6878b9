"""The dense kernels for CUDA, in Triton: one launch for a list of tensors of any sizes, or for one flat run.

The order of operations is that of `kernels`, and so is every rounding: multiply-adds are fma where that file says
fma and two instructions elsewhere (`launch` turns contraction off), roots and quotients are correctly rounded.
One program takes one block of `BLOCK` elements. In a list, a table tells it which tensor and which block of it;
there is no loop. A full block is stepped without masks, so that its accesses are 16 bytes wide; the last
one of a tensor with them.

Numbers arrive in double and are rounded once. The learning rate, grad_scale and found_inf may be pointers, read by
every program: a step never waits for the host and can be replayed by a graph. FLAGS names what is compiled in.
"""

# ruff: noqa: SIM102, SIM108, RET505
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# Triton's language has no types, and an `if` over constants is decided when compiling: it stays an outer one.
from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

BLOCK: Final = 1024
WARPS: Final = (
    8  # four elements per thread: every dtype gets one layout, so nothing passes through shared memory
)
ADVANCE_BLOCK: Final = 256

# Columns of a pointer table, one row of int64 addresses per tensor. Kernels see globals as constexpr only.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
FIRST = tl.constexpr(2)
SECOND = tl.constexpr(3)
EMA = tl.constexpr(4)
COPY = tl.constexpr(5)
COUNTER = tl.constexpr(6)
COLUMNS = tl.constexpr(7)

# `kernels.QUOTIENT_SCALE`, and the root of its inverse; that module is not imported because it needs numba.
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
    """A number of the host as REAL, rounded once from double."""
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
    """Round to nearest even, to a half type by way of float32, as the CPU kernels do."""
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
    """The gradient that the rule sees, from the unscaled one."""
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
    """sqrt((u + eps) / (v + eps)), scaled as in `kernels` so that the quotient stays in range."""
    return root(divide((u + eps) * QUOTIENT_SCALE, v + eps)) * QUOTIENT_UNSCALE


@triton.jit
def adadelta(g, v, u, rho, one_minus_rho, eps, FLAGS: tl.constexpr):
    """The new v, d, and the new u."""
    v = tl.fma(one_minus_rho * g, g, rho * v)
    if MULTIPLY_FIRST & FLAGS:
        d = divide(root(u + eps) * g, root(v + eps))
    else:
        d = quotient_root(u, v, eps) * g
    return v, d, tl.fma(one_minus_rho * d, d, rho * u)


@triton.jit
def step_elements(
    param,
    grad,
    first,
    second,
    ema,
    copy,
    offsets,
    mask,
    lr,
    factor,
    grad_scale,
    rho,
    one_minus_rho,
    eps,
    weight_decay,
    bound,
    ema_momentum,
    one_minus_ema_momentum,
    REAL: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """Step the elements at `offsets`; lr and weight_decay are double, the other numbers REAL."""
    minus_lr = (-lr).to(REAL)
    g = load(grad, offsets, mask, REAL)
    p = load(param, offsets, mask, REAL)
    if UNSCALE & FLAGS:
        g = divide(g, grad_scale)
        if WRITE_GRAD & FLAGS:
            store(grad, offsets, g, mask)
    g = prepare(g, p, factor, bound, weight_decay.to(REAL), FLAGS)
    if DECOUPLED & FLAGS:
        p = p * (1.0 - lr * weight_decay).to(REAL)
    if ADADELTA & FLAGS:
        v = load(first, offsets, mask, REAL)
        u = load(second, offsets, mask, REAL)
        v, d, u = adadelta(g, v, u, rho, one_minus_rho, eps, FLAGS)
        store(first, offsets, v, mask)
        store(second, offsets, u, mask)
        p = tl.fma(minus_lr, d, p)
    else:
        h = tl.fma(g, g, load(first, offsets, mask, REAL))
        store(first, offsets, h, mask)
        if EPS_INSIDE_ROOT & FLAGS:
            p = p + divide(minus_lr * g, root(h + eps))
        else:
            p = p + divide(minus_lr * g, root(h) + eps)
    store(param, offsets, p, mask)
    if HAS_EMA & FLAGS:
        e = load(ema, offsets, mask, REAL)
        store(ema, offsets, tl.fma(ema_momentum, e, one_minus_ema_momentum * p), mask)
    if HAS_COPY & FLAGS:
        store(copy, offsets, p, mask)
    if ZERO_GRAD & FLAGS:
        store(grad, offsets, tl.zeros_like(g), mask)


@triton.jit
def step_block(
    param,
    grad,
    first,
    second,
    ema,
    copy,
    start,
    size,
    lr,
    factor,
    grad_scale_pointer,
    grad_scale,
    rho,
    one_minus_rho,
    eps,
    weight_decay,
    bound,
    ema_momentum,
    one_minus_ema_momentum,
    REAL: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step elements [start, start + BLOCK) of one tensor, as far as it has them."""
    if SCALE_POINTER & FLAGS:
        scale = tl.load(grad_scale_pointer).to(REAL)
    else:
        scale = real(grad_scale, REAL)
    factor = factor.to(REAL)
    decay = real(weight_decay, tl.float64)
    rho, one_minus_rho, eps = real(rho, REAL), real(one_minus_rho, REAL), real(eps, REAL)
    bound, momentum = real(bound, REAL), real(ema_momentum, REAL)
    rest = real(one_minus_ema_momentum, REAL)
    offsets = start + tl.arange(0, BLOCK)
    # fmt: off
    if start + BLOCK <= size:
        step_elements(param, grad, first, second, ema, copy, offsets, None, lr, factor, scale,
                      rho, one_minus_rho, eps, decay, bound, momentum, rest, REAL, FLAGS)
    else:
        step_elements(param, grad, first, second, ema, copy, offsets, offsets < size, lr, factor, scale,
                      rho, one_minus_rho, eps, decay, bound, momentum, rest, REAL, FLAGS)
    # fmt: on


@triton.jit
def pointer_at(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr, FLAGS: tl.constexpr):
    """The pointer in one column of a table's row."""
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED & FLAGS:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def count_up(counter):
    """Add one to a step counter; like torch's, a float32 one stops at 2^24."""
    tl.store(counter, (tl.load(counter).to(tl.float64) + 1.0).to(counter.dtype.element_ty))


@triton.jit
def step_list(
    pointers,
    extents,
    blocks,
    lr_pointer,
    factors,
    grad_scale_pointer,
    found_inf,
    lr: tl.float64,
    factor: tl.float64,
    grad_scale: tl.float64,
    rho: tl.float64,
    one_minus_rho: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    bound: tl.float64,
    ema_momentum: tl.float64,
    one_minus_ema_momentum: tl.float64,
    P: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    U: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    REAL: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step many tensors.

    pointers: (tensors, COLUMNS) addresses. extents: (tensors, 2), the number of elements and that of the first
    block. blocks: the tensor of each block. P, G, S, U, E, C, T: element types by column.
    """
    if FOUND_INF & FLAGS:
        if tl.load(found_inf) == 1.0:
            return
    program = tl.program_id(0)
    tensor = tl.load(blocks + program).to(tl.int64)
    size = tl.load(extents + 2 * tensor)
    block = program - tl.load(extents + 2 * tensor + 1)
    row = pointers + tensor * COLUMNS
    if COUNT & FLAGS:
        if block == 0:
            count_up(tl.load(row + COUNTER).to(tl.pointer_type(T)))
    if LR_EACH & FLAGS:
        own_lr = tl.load(lr_pointer + tensor)
    elif LR_POINTER & FLAGS:
        own_lr = tl.load(lr_pointer).to(tl.float64)
    else:
        own_lr = real(lr, tl.float64)
    if FACTOR_EACH & FLAGS:
        own_factor = tl.load(factors + tensor)
    else:
        own_factor = real(factor, tl.float64)
    param = pointer_at(row, PARAM, P, FLAGS)
    grad = pointer_at(row, GRAD, G, FLAGS)
    first = pointer_at(row, FIRST, S, FLAGS)
    second, ema, copy = first, first, first
    if ADADELTA & FLAGS:
        second = pointer_at(row, SECOND, U, FLAGS)
    if HAS_EMA & FLAGS:
        ema = pointer_at(row, EMA, E, FLAGS)
    if HAS_COPY & FLAGS:
        copy = pointer_at(row, COPY, C, FLAGS)
    # fmt: off
    step_block(param, grad, first, second, ema, copy, block * BLOCK, size, own_lr, own_factor, grad_scale_pointer,
               grad_scale, rho, one_minus_rho, eps, weight_decay, bound, ema_momentum, one_minus_ema_momentum,
               REAL, FLAGS, BLOCK)
    # fmt: on


@triton.jit(do_not_specialize=["size"])
def step_flat(
    param,
    grad,
    first,
    second,
    ema,
    copy,
    counter,
    lr_pointer,
    grad_scale_pointer,
    found_inf,
    size: tl.int64,
    lr: tl.float64,
    factor: tl.float64,
    grad_scale: tl.float64,
    rho: tl.float64,
    one_minus_rho: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    bound: tl.float64,
    ema_momentum: tl.float64,
    one_minus_ema_momentum: tl.float64,
    REAL: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step one flat run of memory: a large tensor, or an arena. Nothing is looked up."""
    if FOUND_INF & FLAGS:
        if tl.load(found_inf) == 1.0:
            return
    block = tl.program_id(0).to(tl.int64)
    if COUNT & FLAGS:
        if block == 0:
            count_up(counter)
    if LR_POINTER & FLAGS:
        own_lr = tl.load(lr_pointer).to(tl.float64)
    else:
        own_lr = real(lr, tl.float64)
    # fmt: off
    step_block(param, grad, first, second, ema, copy, block * BLOCK, size, own_lr, real(factor, tl.float64),
               grad_scale_pointer, grad_scale, rho, one_minus_rho, eps, weight_decay, bound, ema_momentum,
               one_minus_ema_momentum, REAL, FLAGS, BLOCK)
    # fmt: on


@triton.jit(do_not_specialize=["count"])
def advance(
    counters,
    rates,
    lr_pointer,
    found_inf,
    count: tl.int64,
    lr: tl.float64,
    lr_decay: tl.float64,
    T: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Runs before a step whose learning rate decays: add one to every counter and write lr / (1 + (step-1)*lr_decay).

    counters: one address per tensor. Its own launch, because each block of a tensor needs the counter that one of them would be changing.
    """
    if FOUND_INF & FLAGS:
        if tl.load(found_inf) == 1.0:
            return
    tensor = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = tensor < count
    counter = tl.load(counters + tensor, mask=mask, other=0).to(tl.pointer_type(T))
    step = tl.load(counter, mask=mask, other=0.0).to(tl.float64) + 1.0
    tl.store(counter, step.to(T), mask=mask)
    if LR_POINTER & FLAGS:
        given = tl.load(lr_pointer).to(tl.float64)
    else:
        given = real(lr, tl.float64)
    tl.store(rates + tensor, given / (1.0 + (step - 1.0) * real(lr_decay, tl.float64)), mask=mask)
