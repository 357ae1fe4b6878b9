"""AdaDelta and Adagrad in MLX's terms, for torch parameters.

The arguments, defaults, states and errors are those of `mlx.optimizers`; the classes are torch optimizers, with param
groups, hooks, `state_dict` and torch's LR schedulers:

    AdaDelta    v = rho*v + (1-rho)*g*g
                d = sqrt(u + eps) / sqrt(v + eps) * g        u is the old one
                u = rho*u + (1-rho)*d*d
                p = p - lr*d

    Adagrad     v = v + g*g
                p = p - lr*g / (sqrt(v) + eps)               eps outside the root

lr is rounded to float32 and then to the gradient's dtype, as in MLX. A float64 gradient takes lr unrounded: MLX has no
float64 learning rates.
The states are `v` and `u`, float32 for half-precision parameters unless `state_dtype="param"`. There is one step counter, in
every param group as `step`. A callable learning rate is evaluated on the counter before the counter advances, so first
on 0. A step counts even if no parameter has a gradient, as in MLX. Parameters without a gradient do not change.

One thing is stricter than in MLX: if the learning rate is a callable, assigning a number raises TypeError. MLX
accepts the number and puts the callable's value back at the next step. Source: mlx/python/mlx/optimizers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizers.base import StateDtype
from .optimizers.counted import SharedCounterOptimizer, dense
from .optimizers.schedule import Schedule
from .rules.mlx import MlxAdaDeltaRule, MlxAdagradRule, rounded
from .step.step import number

__all__ = ["AdaDelta", "Adagrad"]


class MlxOptimizer(SharedCounterOptimizer):
    """Base of AdaDelta and Adagrad: the step, the counter and the learning rate in MLX's terms."""

    counter = "step"
    peer = "MLX"

    def _construct_mlx(
        self,
        params: ParamsT,
        learning_rate: float | Schedule,
        own: dict[str, Any],
        fused: bool | None,
        state_dtype: StateDtype,
    ) -> None:
        schedule = learning_rate if callable(learning_rate) else None
        lr = number(learning_rate if schedule is None else schedule(0))
        self._construct_counted(
            params, {"lr": lr, **own}, schedule=schedule, fused=fused, state_dtype=state_dtype
        )

    @property
    def steps(self) -> int:
        """Number of steps taken: MLX's `step`. In torch that name is the method."""
        return self._count

    @property
    def learning_rate(self) -> float:
        """The first group's `lr`: what the last step applied or, before the first step, what it will apply.

        Assignment sets every group's `lr`. It raises TypeError if the learning rate is a callable.
        """
        return number(self.param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, learning_rate: float) -> None:
        if self._schedule is not None:
            raise TypeError(
                "the learning rate is a callable, which would put its own value back at the next step"
            )
        for group in self.param_groups:
            group["lr"] = number(learning_rate)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        closure: reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._write_lr()
        self._advance()
        for group in self.param_groups:
            alike: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    self._state_of(param, group)
                    params, grads = alike.setdefault(param.grad.dtype, ([], []))
                    params.append(param)
                    grads.append(dense(param.grad))
            for dtype, (params, grads) in alike.items():
                lr = rounded(number(group["lr"]), dtype)
                self._run(
                    group,
                    params,
                    grads,
                    list_name=str(dtype),
                    lr=lr,
                    rho=group.get("rho", 0.0),
                    eps=group["eps"],
                )
        return loss


class AdaDelta(MlxOptimizer):
    """mlx.optimizers.AdaDelta for torch parameters.

    params: parameters, named parameters or param groups, as for any torch optimizer. A group may have its own `lr`
        (unless the learning rate is a callable), `rho` and `eps`. Real floating dtypes.
    learning_rate: a number, or a callable that takes the number of steps taken so far.
    rho: at least 0. eps: more than 0.
    fused: None uses the kernels wherever they can step. True raises RuntimeError at a step that no kernel takes. False
        never uses them.
    state_dtype: None keeps float32 states for half-precision parameters; "param" keeps them in the parameter's dtype, as MLX.
    """

    rule = MlxAdaDeltaRule()

    def __init__(
        self,
        params: ParamsT,
        learning_rate: float | Schedule,
        rho: float = 0.9,
        eps: float = 1e-6,
        *,
        fused: bool | None = None,
        state_dtype: StateDtype = None,
    ) -> None:
        if rho < 0.0:
            raise ValueError(f"AdaDelta rho should be >=0, {rho} was provided instead")
        if eps <= 0.0:
            raise ValueError(f"AdaDelta epsilon should be >0, {eps} was provided instead")
        self._construct_mlx(params, learning_rate, {"rho": rho, "eps": eps}, fused, state_dtype)


class Adagrad(MlxOptimizer):
    """mlx.optimizers.Adagrad for torch parameters; the arguments are AdaDelta's, without `rho`."""

    rule = MlxAdagradRule()

    def __init__(
        self,
        params: ParamsT,
        learning_rate: float | Schedule,
        eps: float = 1e-8,
        *,
        fused: bool | None = None,
        state_dtype: StateDtype = None,
    ) -> None:
        if eps <= 0.0:
            raise ValueError(f"Adagrad epsilon should be >0, {eps} was provided instead")
        self._construct_mlx(params, learning_rate, {"eps": eps}, fused, state_dtype)
