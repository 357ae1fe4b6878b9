"""Which path takes a step, and what a path must offer.

A step is described once, as a `Step` (dense gradients of any number of tensors) or a `RowStep` (one table, some
of its rows), and handed to a backend. `BACKENDS` maps a torch device type to what imports the module that serves it; the
module is imported at the first step that needs it, so numba and triton cost nothing before. A backend is a module
with these functions:

    refuses(param) -> str | None           why it cannot step this parameter, or None; cheap, no device sync
    step(step: Step) -> None               does everything `Step` says, in the order that `Step` documents
    step_rows(step: RowStep) -> None       the same on rows
    plan(step), plan_rows(step) -> ()->None   the same, to be taken by a call: what can fail fails before that

To add one: write the module, add its import to `BACKENDS`. A backend owns: advancing `step.steps` (skipped with
everything else when `found_inf` is 1), lr / (1 + (t-1)*lr_decay), any layout, 0 elements, and mixed dtypes within one
list. It does not bump version counters: the callers in this package do that for every tensor of `written()`.
`step.memo` is a dict that lives as long as the list: a backend may keep there what it learned about it, under its
own name, but must notice tensors that have moved.

Options of the kernels, all of them fields of `Step`: `maximize`, `weight_decay` with `decoupled`, `factor` (a
number, or one per tensor), `clip_value`, `grad_scale` and `found_inf` (tensors, read where the kernel runs),
`zero_grad`, `ema` with `ema_momentum`, `copy_out`, `eps_inside_root` (Keras's Adagrad), `multiply_first` (Keras's
Adadelta). A backend that lacks one raises NotImplementedError naming it; the CPU backend has them all, row-wise
states excepted. Where no backend serves, the classes use torch's own functions and the rules plain torch operations (`eager`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from .step import FUSED_DTYPES, RowStep, Step


def _cpu() -> Backend:
    from . import cpu

    return cast("Backend", cpu)


def _cuda() -> Backend | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from . import cuda

    return cast("Backend", cuda)


BACKENDS: Final[dict[str, Callable[[], Backend | None]]] = {"cpu": _cpu, "cuda": _cuda}


class Backend(Protocol):
    """What a module in `BACKENDS` offers."""

    def refuses(self, param: Tensor) -> str | None:
        """Why this backend cannot step `param`, or None."""

    def step(self, step: Step) -> None:
        """Take a dense step."""

    def step_rows(self, step: RowStep) -> None:
        """Take a step on rows."""

    def plan(self, step: Step) -> Callable[[], None]:
        """A dense step that is ready to be taken."""

    def plan_rows(self, step: RowStep) -> Callable[[], None]:
        """A step on rows that is ready to be taken."""


class Path(NamedTuple):
    """The answer to "who takes this step": `backend` is a device type of `BACKENDS`, or "torch"."""

    backend: str
    reason: str

    @property
    def fused(self) -> bool:
        """Whether one of our kernels takes it."""
        return self.backend != "torch"


def path_of(param: Tensor | None, group: Mapping[str, Any]) -> Path:
    """Which path steps `param` under the options of `group`, and why; None for the group's options alone."""
    if torch.compiler.is_compiling():
        return Path("torch", "torch.compile traces torch's own operations")
    if group["fused"] is False:
        return Path("torch", "fused=False")
    if group["differentiable"]:
        return Path("torch", "differentiable=True")
    if group["foreach"] is not None and not group["fused"]:
        return Path("torch", f"foreach={group['foreach']} was set")
    if param is None:
        return Path("", "decided by each parameter")
    device_type = param.device.type
    if type(param) not in (Tensor, torch.nn.Parameter):
        return Path("torch", f"{type(param).__name__} is a subclass of Tensor")
    if param.grad is not None and type(param.grad) not in (Tensor, torch.nn.Parameter):
        return Path("torch", f"its gradient is a {type(param.grad).__name__}, a subclass of Tensor")
    if param.dtype not in FUSED_DTYPES:
        return Path("torch", f"{param.dtype} has no kernel")
    if param.is_inference():
        return Path("torch", "it is an inference tensor")
    if group.get("capturable", False) and device_type == "cpu":
        return Path("torch", "capturable=True on cpu")
    if param.grad is not None and param.grad.layout not in (torch.strided, torch.sparse_coo):
        return Path("torch", f"its gradient's layout is {param.grad.layout}")
    kernels = backend(device_type)
    if kernels is None:
        return Path("torch", f"no kernels for {device_type}")
    refusal = kernels.refuses(param)
    if refusal is not None:
        return Path("torch", refusal)
    return Path(device_type, f"{device_type} kernels")


@cache
def backend(device_type: str) -> Backend | None:
    """The backend for a device type, imported now; None if there is none, or what it needs is not installed."""
    make = BACKENDS.get(device_type)
    return None if make is None else make()
