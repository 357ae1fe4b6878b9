"""The dense step and the row step in numpy, one operation and one rounding at a time: no fma anywhere.

It is what Triton's interpreter computes, bit for bit, because the interpreter's fma is a product and a sum. On a
device the CPU kernels are the reference instead.
"""

from __future__ import annotations

import numpy as np
import torch

from pushstep.optim.dispatch import number


def step(step):
    """Take a `dispatch.Step` of contiguous CPU tensors."""
    if step.found_inf is not None and number(step.found_inf) == 1.0:
        return
    for k, (param, grad) in enumerate(zip(step.params, step.grads, strict=True)):
        states = [state[k] for state in step.states]
        real = _real(param, states[0])
        lr = _lr(step, None if step.steps is None else step.steps[k])
        g, p = _array(grad, real), _array(param, real)
        if step.grad_scale is not None:
            g = g / real(number(step.grad_scale))
            if not step.zero_grad:
                _put(grad, g)
        factor = step.factor if isinstance(step.factor, float) else step.factor[k]
        if factor != 1.0:
            g = g * real(factor)
        if step.clip_value is not None:
            g = np.clip(g, -real(step.clip_value), real(step.clip_value))
        g = -g if step.maximize else g
        if step.weight_decay != 0 and not step.decoupled:
            g = real(step.weight_decay) * p + g
        if step.weight_decay != 0 and step.decoupled:
            p = p * real(1 - lr * step.weight_decay)
        p = _rule(step, p, g, states, lr, real, dense=True)
        _put(param, p)
        if step.ema is not None:
            keep, rest = real(step.ema_momentum), real(1 - step.ema_momentum)
            _put(step.ema[k], keep * _array(step.ema[k], real) + rest * p)
        if step.copy_out is not None:
            _put(step.copy_out[k], p)
        if step.zero_grad:
            grad.zero_()


def step_rows(step):
    """Take a `dispatch.RowStep` of contiguous CPU tensors."""
    if step.found_inf is not None and number(step.found_inf) == 1.0:
        return
    real = _real(step.param, step.states[0])
    lr = _lr(step, step.steps)
    merged = {}
    for row, grad in zip(step.ids.tolist(), step.rows, strict=True):
        merged.setdefault(row, []).append(_array(grad, real))
    for row, grads in merged.items():
        g = grads[0]
        for other in grads[1:]:
            g = g + other
        g = _array(torch.from_numpy(g).to(step.rows.dtype), real) if step.rows.element_size() == 2 else g
        p = _array(step.param[row], real)
        if step.grad_scale is not None:
            g = g / real(number(step.grad_scale))
        if step.factor != 1.0:
            g = g * real(step.factor)
        g = -g if step.maximize else g
        if step.weight_decay != 0:
            g = real(step.weight_decay) * p + g
        states = [state[row] for state in step.states]
        _put(step.param[row], _rule(step, p, g, states, lr, real, dense=False))


def _rule(step, p, g, states, lr, real, *, dense):
    eps, minus_lr = real(step.eps), real(-lr)
    row_wise = not dense and states[0].numel() != g.size
    mean = real((g.astype(np.float64) ** 2).sum() / max(1, g.size)) if row_wise else None
    first = _array(states[0], real)
    if step.rule == "adagrad":
        h = first + (mean if row_wise else g * g)
        _put(states[0], h)
        if dense:
            inside = step.eps_inside_root
            return p + (minus_lr * g) / (np.sqrt(h + eps) if inside else np.sqrt(h) + eps)
        if row_wise:
            return (minus_lr / (np.sqrt(h) + eps)) * g + p
        return p + minus_lr * (g / (np.sqrt(h) + eps))
    rho, rest = real(step.rho), real(1 - step.rho)
    v = rest * mean + rho * first if row_wise else (rest * g) * g + rho * first
    u = _array(states[1], real)
    if dense and step.multiply_first:
        d = np.sqrt(u + eps) * g / np.sqrt(v + eps)
    else:
        d = np.sqrt((u + eps) * real(2.0**40) / (v + eps)) * real(2.0**-20) * g
    _put(states[0], v)
    if row_wise:
        _put(states[1], rest * real((d.astype(np.float64) ** 2).sum() / max(1, d.size)) + rho * u)
    else:
        _put(states[1], (rest * d) * d + rho * u)
    return minus_lr * d + p


def square_sum(tensor):
    """The sum of squares in the order of `norm_kernels`."""
    flat, total = tensor.reshape(-1).to(torch.float64).numpy(), 0.0
    for start in range(0, len(flat), 4096):
        block = np.zeros(4096)
        block[: len(flat[start : start + 4096])] = flat[start : start + 4096]
        lanes = np.zeros(256)
        for chunk in (block * block).reshape(16, 256):
            lanes = lanes + chunk
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        total += float(lanes[0])
    return total


def _real(param, state):
    return np.float64 if torch.float64 in (param.dtype, state.dtype) else np.float32


def _lr(step, counter):
    t = step.step
    if counter is not None:
        counter += 1
        t = counter.item()
    return number(step.lr) / (1 + (t - 1) * step.lr_decay)


def _array(tensor, real):
    wide = torch.float64 if real is np.float64 else torch.float32
    return (
        tensor.detach()
        .to(torch.float32 if tensor.element_size() == 2 else tensor.dtype)
        .to(wide)
        .numpy()
        .copy()
    )


def _put(tensor, array):
    values = torch.from_numpy(np.asarray(array))
    tensor.copy_(values.to(torch.float32) if tensor.element_size() == 2 else values)
