"""Which path takes a step, and what a path must offer.

A step is described once and handed to a backend: as a `Step` (dense gradients of any number of tensors) or a `RowStep`
(some rows of one table). `BACKENDS` maps a torch device type to a function that imports its backend's module. The first
step that needs the module imports it, so numba and triton cost nothing before that. A backend is a module with these
functions:

    refuses(param) -> str | None              why it cannot step this parameter, or None; cheap, no device sync
    step(step: Step) -> None                  does everything that `Step` describes, in the order of `kernels/dense.py`
    step_rows(step: RowStep) -> None          the same on rows
    plan(step), plan_rows(step) -> ()->None   prepare a step, which a call takes; what can fail fails before the call
    plan_tables(steps) -> ()->None            the same for rows of several tables; `step.one_by_one` does for most backends

To add one: write the module, add its import to `BACKENDS`. A backend advances `step.steps` (it skips that and
everything else when `found_inf` is 1), computes lr / (1 + (t-1)*lr_decay), and handles any layout, 0 elements, and
mixed dtypes within one list. It does not bump version counters: the callers in this package do that for every tensor of
`written()`. `step.memo` is a dict that lives as long as the list. A backend may keep there, under its own name, what it
finds out about the list, but must notice tensors that have moved.

Options of the kernels, all of them fields of `Step`: `maximize`, `weight_decay` with `decoupled`, `factor` (a
number, or one per tensor), `clip_value`, `grad_scale` and `found_inf` (tensors, read where the kernel runs),
`zero_grad`, `ema` with `ema_momentum`, `copy_out`, `eps_inside_root` (Keras's Adagrad), `multiply_first` (Keras's
Adadelta). A backend that lacks an option raises NotImplementedError with its name. The CPU backend has them all, except
beside row-wise states. Where no backend serves, the classes use torch's own functions, and the rules use plain torch
operations (`reference.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Final, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ..step.step import FUSED_DTYPES, RowStep, Step


def _cpu() -> Backend:
    from ..cpu import dense as cpu

    return cast("Backend", cpu)


def _cuda() -> Backend | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from ..cuda import steps as cuda

    return cast("Backend", cuda)


BACKENDS: Final[dict[str, Callable[[], Backend | None]]] = {"cpu": _cpu, "cuda": _cuda}


class Backend(Protocol):
    """The functions of a module in `BACKENDS`."""

    def refuses(self, param: Tensor) -> str | None:
        """Why this backend cannot step `param`, or None."""

    def step(self, step: Step) -> None:
        """Take a dense step."""

    def step_rows(self, step: RowStep) -> None:
        """Take a step on rows."""

    def plan(self, step: Step) -> Callable[[], None]:
        """Prepare a dense step. A call of the result takes it."""

    def plan_rows(self, step: RowStep) -> Callable[[], None]:
        """Prepare a step on rows. A call of the result takes it."""

    def plan_tables(self, steps: Sequence[RowStep]) -> Callable[[], None]:
        """Prepare steps on rows of several tables, no two of one table. A call of the result takes them."""


class Path(NamedTuple):
    """The path that takes a step, and why: `backend` is a device type of `BACKENDS`, or "torch"."""

    backend: str
    reason: str

    @property
    def fused(self) -> bool:
        """True if one of this package's kernels takes the step."""
        return self.backend != "torch"


def path_of(param: Tensor | None, group: Mapping[str, Any]) -> Path:
    """Which path steps `param` under the options of `group`, and why.

    Without `param` the group's options alone decide, and the backend is "" if they leave it open.
    """
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
    """The backend for a device type, imported now. None if there is none or its package is not installed."""
    make = BACKENDS.get(device_type)
    return None if make is None else make()
