"""The arguments of a launch besides its tensors: flags, hyperparameters, and pointers to those on the device.

A hyperparameter that is a tensor on the step's device is passed as a pointer. The kernel reads it, and the host never
waits for it. Step counters on the device are advanced there: in the step's own launch, or just before it if the
learning rate decays. Counters on the host (torch keeps them there unless told otherwise) are advanced here. They do
not move when a CUDA graph is replayed, so capturing such a step raises RuntimeError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from ..step.step import RowStep, Step, number
from . import arithmetic, kernels
from .tables import capturing, pointers, upload

DTYPE: Final = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
COUNTED_DTYPES: Final = (torch.float32, torch.float64)


class Inputs(NamedTuple):
    """The arguments of a launch that all its tensors share."""

    flags: int
    lr: float
    lr_pointer: Tensor | None
    grad_scale: float
    grad_scale_pointer: Tensor | None
    found_inf: Tensor | None


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **constants: Any) -> None:
    """Queue one kernel on the device's current stream.

    Contraction is off: a multiply and an add keep their two roundings, except in an explicit fma.
    """
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[grid](*args, **constants, enable_fp_fusion=False)


def skipped(step: Step | RowStep, device: torch.device) -> bool:
    """Whether the host can already tell that found_inf is 1, so that nothing is launched.

    It reads a found_inf on the device, and waits for it, only if step counters are on the host.
    """
    found = step.found_inf
    if found is None:
        return False
    if isinstance(found, Tensor) and found.device.type == device.type:
        counters = (
            step.steps if isinstance(step.steps, Sequence) else [step.steps] if step.steps is not None else []
        )
        if all(counter.device.type == device.type for counter in counters):
            return False
    return number(found) == 1.0


def inputs(
    step: Step | RowStep,
    counters: Sequence[Tensor] | None,
    device: torch.device,
) -> Inputs:
    """Advance the counters of one launch, or leave that to its kernel (COUNT); return the shared arguments.

    RuntimeError if counters are on the host and the stream is being captured.
    """
    flags = 0
    scale_pointer = on_device(step.grad_scale, device)
    found_inf = on_device(step.found_inf, device)
    lr_pointer = on_device(step.lr, device)
    lr = 0.0 if lr_pointer is not None else number(step.lr)
    if scale_pointer is not None:
        flags |= arithmetic.SCALE_POINTER.value
    if found_inf is not None:
        flags |= arithmetic.FOUND_INF.value
    if counters is None:
        lr, lr_pointer = _divided(lr, lr_pointer, 1 + (step.step - 1) * step.lr_decay)
    elif counters[0].device == device and counters[0].dtype in COUNTED_DTYPES:
        if step.lr_decay == 0:
            flags |= arithmetic.COUNT.value
        else:
            lr_pointer = _advance_by_kernel(counters, lr, lr_pointer, found_inf, device, step.lr_decay)
            flags |= arithmetic.LR_EACH.value
    elif counters[0].device.type == device.type:
        divisors = _advance_by_torch(counters, found_inf, device, step.lr_decay)
        if divisors is not None:
            lr_pointer = (lr if lr_pointer is None else lr_pointer.double()) / divisors
            flags |= arithmetic.LR_EACH.value
    else:
        divisors = _advance_on_host(counters, device, step.lr_decay)
        each, lr, lr_pointer = _rates_of(divisors, lr, lr_pointer, device)
        flags |= each
    if lr_pointer is not None:
        flags |= arithmetic.LR_POINTER.value
    return Inputs(flags, lr, lr_pointer, _number(step.grad_scale, scale_pointer), scale_pointer, found_inf)


def scalars(step: Step | RowStep, known: Inputs, factor: float) -> tuple[float, ...]:
    """lr, factor, grad_scale, rho, 1-rho, eps, weight_decay, in the kernels' order. 1-rho is taken in double."""
    return (
        known.lr,
        factor,
        known.grad_scale,
        float(step.rho),
        1 - step.rho,
        float(step.eps),
        float(step.weight_decay),
    )


def dense_flags(step: Step) -> int:
    """The FLAGS for the options of a dense step."""
    decays, unscales = step.weight_decay != 0, step.grad_scale is not None
    return (
        row_flags(step)
        | _bit(arithmetic.CLIP, step.clip_value is not None)
        | _bit(arithmetic.DECOUPLED, decays and step.decoupled)
        | _bit(arithmetic.WRITE_GRAD, unscales and not step.zero_grad)
        | _bit(arithmetic.ZERO_GRAD, step.zero_grad)
        | _bit(arithmetic.HAS_EMA, step.ema is not None)
        | _bit(arithmetic.HAS_COPY, step.copy_out is not None)
        | _bit(arithmetic.EPS_INSIDE_ROOT, step.eps_inside_root)
        | _bit(arithmetic.MULTIPLY_FIRST, step.multiply_first)
    )


def row_flags(step: Step | RowStep) -> int:
    """The FLAGS for the options that dense steps and steps over rows share."""
    decoupled = isinstance(step, Step) and step.decoupled
    return (
        _bit(arithmetic.ADADELTA, step.rule == "adadelta")
        | _bit(arithmetic.UNSCALE, step.grad_scale is not None)
        | _bit(arithmetic.MAXIMIZE, step.maximize)
        | _bit(arithmetic.COUPLED, step.weight_decay != 0 and not decoupled)
    )


def _bit(flag: Any, asked: bool) -> int:
    return int(flag.value) if asked else 0


def on_device(value: Tensor | float | None, device: torch.device) -> Tensor | None:
    """The value as a tensor on the step's device, or None if the value is on the host.

    A tensor on another device of the same type is copied to the step's device without waiting.
    """
    if not isinstance(value, Tensor) or value.device.type != device.type:
        return None
    return value if value.device == device else value.to(device, non_blocking=True)


def _number(value: Tensor | float | None, pointer: Tensor | None) -> float:
    return 1.0 if value is None or pointer is not None else number(value)


def _divided(lr: float, lr_pointer: Tensor | None, divisor: float) -> tuple[float, Tensor | None]:
    if lr_pointer is not None and divisor != 1:
        lr_pointer = lr_pointer.double() / divisor
    return lr / divisor, lr_pointer


def _advance_by_kernel(
    counters: Sequence[Tensor],
    lr: float,
    lr_pointer: Tensor | None,
    found_inf: Tensor | None,
    device: torch.device,
    lr_decay: float,
) -> Tensor:
    count = len(counters)
    rates = torch.empty(count, dtype=torch.float64, device=device)
    table = pointers(np.array([t.data_ptr() for t in counters], np.int64), device)
    flags = _bit(arithmetic.LR_POINTER, lr_pointer is not None) | _bit(
        arithmetic.FOUND_INF, found_inf is not None
    )
    launch(
        kernels.advance, (-(-count // kernels.ADVANCE_BLOCK),), device, table, rates, lr_pointer, found_inf,
        count, lr, float(lr_decay), T=DTYPE[counters[0].dtype], FLAGS=flags, BLOCK=kernels.ADVANCE_BLOCK,
        num_warps=kernels.WARPS,
    )  # fmt: skip
    return rates


def _advance_by_torch(
    counters: Sequence[Tensor], found_inf: Tensor | None, device: torch.device, lr_decay: float
) -> Tensor | None:
    """Advance counters of a dtype that the kernels cannot count in, or on another device of the same type.

    Returns 1 + (step-1)*lr_decay of each counter in float64, or None without decay.
    """
    for counter in counters:
        counter += (
            1 if found_inf is None else (found_inf.to(counter.device, non_blocking=True) != 1).reshape(())
        )
    if lr_decay == 0:
        return None
    return torch.stack(
        [1 + (c.reshape(()).to(device, torch.float64, non_blocking=True) - 1) * lr_decay for c in counters]
    )


def _advance_on_host(counters: Sequence[Tensor], device: torch.device, lr_decay: float) -> Any:
    if capturing(device):
        raise RuntimeError(
            "step counters on the CPU do not advance when a CUDA graph is replayed: "
            "pass fused=True (or capturable=True) so that they live on the device"
        )
    torch._foreach_add_(list(counters), 1)
    if lr_decay == 0:
        return np.ones(1)
    return 1 + (torch.stack(list(counters)).to(torch.float64).numpy() - 1) * lr_decay


def _rates_of(
    divisors: Any, lr: float, lr_pointer: Tensor | None, device: torch.device
) -> tuple[int, float, Tensor | None]:
    """LR_EACH or 0, and the learning rate divided by the host's divisors: one rate if all divisors are equal."""
    if (divisors == divisors[0]).all():
        return 0, *_divided(lr, lr_pointer, float(divisors[0]))
    rates = upload(lr / divisors if lr_pointer is None else divisors, device)
    return _bit(arithmetic.LR_EACH, True), lr, rates if lr_pointer is None else lr_pointer.double() / rates
