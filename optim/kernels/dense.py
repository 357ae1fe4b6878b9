"""The dense kernel: one pass over parameter, gradient and states takes the whole step, for both rules.

`dense(spec)` makes a Python function that closes over its flags, so numba compiles in only what a step uses: an
unused option costs neither an instruction nor a byte. The function walks slices of a list of tensors laid end to end.
The slices and the number of threads change no bit, because every element depends on itself alone and every
multiply-add is an explicit fma.

Order of operations (an option that is not set is skipped):

    g = g / grad_scale                  unscale; written back to the gradient, as torch's fused kernels do
    g = g * factor                      average and clip factor
    g = min(max(g, -clip), clip)
    g = -g                              maximize
    g = fma(weight_decay, p, g)         coupled decay, never negated
    p = p * (1 - lr*weight_decay)       decoupled decay
    v = fma((1-rho)*g, g, rho*v)        Adadelta
    d = sqrt((u + eps) / (v + eps)) * g
    u = fma((1-rho)*d, d, rho*u)
    v = fma(1-rho, g*g, rho*v)          Adadelta with multiply_first, Keras's order
    d = (sqrt(u + eps) * g) / sqrt(v + eps)
    u = fma(1-rho, d*d, rho*u)
    p = fma(-lr, d, p)
    h = fma(g, g, h)                    Adagrad
    p = p + (-lr * g) / (sqrt(h) + eps)              or sqrt(h + eps): eps_inside_root
    ema = fma(1 - ema_momentum, p - ema, ema)        weights of sum 1: rounded apart, they would shrink it
    copy = p                            rounded to the copy's dtype
    gradient = 0
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np

from .intrinsics import COPY, EMA, FIRST, GRAD, PARAM, SECOND, claim, fma, load, store, tensor_at

# Columns of `addresses`, which has one row per tensor. The first columns are the slots of `intrinsics.py`.
STEP_COLUMN: Final = 6
COLUMNS: Final = 7
# Columns of `scalars`.
RHO, ONE_MINUS_RHO, EPS, WEIGHT_DECAY, GRAD_SCALE, CLIP, EMA_MOMENTUM, ONE_MINUS_EMA_MOMENTUM = range(8)

# The root of the quotient rounds less often than torch's quotient of roots (largest relative error of d: 1.9e-7
# against 2.4e-7). This keeps every tensor as near to float64 as torch does. A float32 quotient leaves the normal range
# where its roots would not: scaling by a power of four moves that to gradients above 1e19.
QUOTIENT_SCALE: Final = 2.0**40

DENSE_SIGNATURE: Final = "void(int64[:, ::1], int64[::1], float64[:, ::1], float64[::1], int64[::1], int64)"
ADVANCE_SIGNATURE: Final = "void(int64[:, ::1], float64[:, ::1], float64, float64)"


class Spec(NamedTuple):
    """What a dense kernel is compiled for. The kind of an absent operand is -1."""

    adadelta: bool
    wide: bool
    param: int
    grad: int
    state: int
    ema: int = -1
    copy: int = -1
    unscale: bool = False
    scaled: bool = False
    clip: bool = False
    maximize: bool = False
    coupled: bool = False
    decoupled: bool = False
    write_grad: bool = False
    zero_grad: bool = False
    eps_inside_root: bool = False
    multiply_first: bool = False


def dense(spec: Spec) -> Callable[..., None]:
    """Make `kernel(addresses, starts, per_tensor, scalars, plan, worker)` for `spec`, as a Python function.

    addresses: (tensors, COLUMNS) byte addresses; starts: (tensors + 1,) first element of each tensor when all are
    laid end to end; per_tensor: (tensors, 2) lr and factor; scalars: by the columns named above, in double, so
    that 1-rho is rounded to float32 only once.
    """
    (adadelta, wide, P, G, S, E, C, unscale, scaled, clip, maximize, coupled, decoupled) = spec[:13]
    write_grad, zero_grad, eps_inside_root, multiply_first = spec[13:]
    has_ema, has_copy = E >= 0, C >= 0
    real: Any = np.float64 if wide else np.float32

    def kernel(addresses: Any, starts: Any, per_tensor: Any, scalars: Any, plan: Any, worker: int) -> None:
        rho, one_minus_rho = real(scalars[RHO]), real(scalars[ONE_MINUS_RHO])
        eps, weight_decay = real(scalars[EPS]), real(scalars[WEIGHT_DECAY])
        grad_scale, bound = real(scalars[GRAD_SCALE]), real(scalars[CLIP])
        rest = real(scalars[ONE_MINUS_EMA_MOMENTUM])
        zero, up, down = real(0.0), real(QUOTIENT_SCALE), real(QUOTIENT_SCALE**-0.5)
        k = claim(plan, worker)
        while k >= 0:
            start, stop = k * plan[1], min((k + 1) * plan[1], plan[2])
            for tensor in range(tensor_at(starts, start), len(starts) - 1):
                base = starts[tensor]
                if base >= stop:
                    break
                param, grad = addresses[tensor, PARAM], addresses[tensor, GRAD]
                first, second = addresses[tensor, FIRST], addresses[tensor, SECOND]
                ema, copy = addresses[tensor, EMA], addresses[tensor, COPY]
                lr = per_tensor[tensor, 0]
                minus_lr, factor = real(-lr), real(per_tensor[tensor, 1])
                keep = real(1.0 - lr * scalars[WEIGHT_DECAY])
                for i in range(max(start, base) - base, min(stop, starts[tensor + 1]) - base):
                    g = load(grad, i, G, wide, GRAD)
                    p = load(param, i, P, wide, PARAM)
                    if unscale:
                        g = g / grad_scale
                        if write_grad:
                            store(grad, i, g, G, GRAD)
                    if scaled:
                        g = g * factor
                    if clip:
                        g = bound if g > bound else (-bound if g < -bound else g)  # NaN passes
                    if maximize:
                        g = -g
                    if coupled:
                        g = fma(weight_decay, p, g)
                    if decoupled:
                        p = p * keep
                    if adadelta:
                        v = rho * load(first, i, S, wide, FIRST)
                        u = load(second, i, S, wide, SECOND)
                        if multiply_first:
                            v = fma(one_minus_rho, g * g, v)
                            d = math.sqrt(u + eps) * g / math.sqrt(v + eps)
                            u = fma(one_minus_rho, d * d, rho * u)
                        else:
                            v = fma(one_minus_rho * g, g, v)
                            d = math.sqrt((u + eps) * up / (v + eps)) * down * g
                            u = fma(one_minus_rho * d, d, rho * u)
                        store(first, i, v, S, FIRST)
                        store(second, i, u, S, SECOND)
                        p = fma(minus_lr, d, p)
                    else:
                        h = fma(g, g, load(first, i, S, wide, FIRST))
                        store(first, i, h, S, FIRST)
                        if eps_inside_root:
                            p = p + minus_lr * g / math.sqrt(h + eps)
                        else:
                            p = p + minus_lr * g / (math.sqrt(h) + eps)
                    store(param, i, p, P, PARAM)
                    if has_ema:
                        average = load(ema, i, E, wide, EMA)
                        store(ema, i, fma(rest, p - average, average), E, EMA)
                    if has_copy:
                        store(copy, i, p, C, COPY)
                    if zero_grad:
                        store(grad, i, zero, G, GRAD)
            k = claim(plan, worker)

    return kernel


def advance(step_kind: int) -> Callable[..., None]:
    """Make `kernel(addresses, per_tensor, lr, lr_decay)`, which runs before the dense kernel.

    It adds one to every step counter and writes each tensor's lr / (1 + (step-1)*lr_decay), in double, into
    `per_tensor`. step_kind: the element kind of the counters. A float32 counter stops at 2^24, as torch's does.
    """

    def kernel(addresses: Any, per_tensor: Any, lr: float, lr_decay: float) -> None:
        for tensor in range(len(per_tensor)):
            address = addresses[tensor, STEP_COLUMN]
            step = load(address, 0, step_kind, True, FIRST) + 1.0
            store(address, 0, step, step_kind, FIRST)
            per_tensor[tensor, 0] = lr / (1.0 + (step - 1.0) * lr_decay)

    return kernel
