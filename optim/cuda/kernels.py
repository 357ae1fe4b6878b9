"""The dense kernels for CUDA, in Triton: one launch for a list of tensors of any sizes, or for one flat run.

The order of operations and every rounding are those of `kernels/dense.py`. Multiply-adds are fma where that file says
fma, and two instructions elsewhere (`launch` turns contraction off). Roots and quotients are correctly rounded.
One program takes one block of `BLOCK` elements. In a list, a table tells it which tensor and which block of it;
there is no loop. A full block is stepped without masks, so that its accesses are 16 bytes wide. Only a partial
block at the end of a tensor is stepped with masks.

Hyperparameters arrive in double and are rounded once. The learning rate, grad_scale and found_inf may be pointers,
which every program reads. So a step never waits for the host, and a CUDA graph can replay it. FLAGS says which options
are compiled in.
"""

# ruff: noqa: SIM102, SIM108
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# Triton's language has no types. It decides an `if` over constants when it compiles, so such an `if` stands alone.
from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from .arithmetic import (
    ADADELTA,
    COLUMNS,
    COPY,
    COUNT,
    COUNTER,
    DECOUPLED,
    EMA,
    EPS_INSIDE_ROOT,
    FACTOR_EACH,
    FIRST,
    FOUND_INF,
    GRAD,
    HAS_COPY,
    HAS_EMA,
    LR_EACH,
    LR_POINTER,
    PARAM,
    SCALE_POINTER,
    SECOND,
    UNSCALE,
    WRITE_GRAD,
    ZERO_GRAD,
    adadelta,
    count_up,
    divide,
    load,
    pointer_at,
    prepare,
    real,
    root,
    store,
)

BLOCK: Final = 1024
# Four elements per thread: every dtype gets one layout, so nothing passes through shared memory.
WARPS: Final = 8
ADVANCE_BLOCK: Final = 256


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
    one_minus_ema_momentum,
    REAL: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """Step the elements at `offsets`. lr and weight_decay are double, the other hyperparameters REAL."""
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
        store(ema, offsets, tl.fma(one_minus_ema_momentum, p - e, e), mask)
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
    one_minus_ema_momentum,
    REAL: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step elements [start, start + BLOCK) of one tensor, up to its size."""
    if SCALE_POINTER & FLAGS:
        scale = tl.load(grad_scale_pointer).to(REAL)
    else:
        scale = real(grad_scale, REAL)
    factor = factor.to(REAL)
    decay = real(weight_decay, tl.float64)
    rho, one_minus_rho, eps = real(rho, REAL), real(one_minus_rho, REAL), real(eps, REAL)
    bound, rest = real(bound, REAL), real(one_minus_ema_momentum, REAL)
    offsets = start + tl.arange(0, BLOCK)
    # fmt: off
    if start + BLOCK <= size:
        step_elements(param, grad, first, second, ema, copy, offsets, None, lr, factor, scale,
                      rho, one_minus_rho, eps, decay, bound, rest, REAL, FLAGS)
    else:
        step_elements(param, grad, first, second, ema, copy, offsets, offsets < size, lr, factor, scale,
                      rho, one_minus_rho, eps, decay, bound, rest, REAL, FLAGS)
    # fmt: on


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

    pointers: (tensors, COLUMNS) addresses. extents: (tensors, 2), the number of elements and the number of
    the first block. blocks: the tensor of each block. P, G, S, U, E, C, T: element types by column.
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
               grad_scale, rho, one_minus_rho, eps, weight_decay, bound, one_minus_ema_momentum,
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
    one_minus_ema_momentum: tl.float64,
    REAL: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step one flat run of memory: a large tensor, or an arena. It reads no table."""
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
               grad_scale_pointer, grad_scale, rho, one_minus_rho, eps, weight_decay, bound, one_minus_ema_momentum, REAL, FLAGS, BLOCK)
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
    """Add one to every counter and write lr / (1 + (step-1)*lr_decay); runs before a step whose lr decays.

    counters: one address per tensor. rates: one double per tensor. This is a launch of its own: every block of a tensor
    needs the counter, which one of them would be changing.
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
