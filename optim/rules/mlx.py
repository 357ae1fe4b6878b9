"""MLX's AdaDelta and Adagrad as rules over tensors that the caller owns.

The equations are in `optim/mlx.py`. lr is held in float32 and applied in the parameter's dtype. MLX has no default
learning rate; torch's stands here. There are no row-sparse gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .adadelta import AdadeltaRule
from .adagrad import AdagradRule
from .rule import Beginning, Hyperparameters, Rule


def rounded(lr: float, dtype: torch.dtype) -> float:
    """lr as MLX applies it: held in float32, then cast to the gradient's dtype; unrounded for float64."""
    return (
        lr if dtype == torch.float64 else torch.tensor(lr, dtype=torch.float32, device="cpu").to(dtype).item()
    )


class _MlxRule(Rule):
    """What both rules have in common."""

    counter = "step"
    states_begin: ClassVar[Beginning] = "with its own"

    def validate(self, hyperparameters: Hyperparameters) -> None:
        """Raise ValueError for a value out of MLX's range or NaN, and KeyError for an unknown name."""
        super().validate(hyperparameters)
        if hyperparameters.get("eps") == 0.0:
            raise ValueError("Invalid epsilon value: 0.0")

    def arguments(self, hyperparameters: Hyperparameters) -> dict[str, Any]:
        """See `Rule.arguments`."""
        return {name: hyperparameters[name] for name in self.defaults}

    def effective_lr(self, hyperparameters: Hyperparameters, step: int) -> float:
        """`lr`, at every step: a schedule is the worker's or a hook's."""
        return float(hyperparameters["lr"])

    def plan_dense(
        self,
        param: Tensor,
        grad: Tensor,
        state: Sequence[Tensor],
        hyperparameters: Hyperparameters,
        **options: Any,
    ) -> Callable[[], None]:
        """See `Rule.plan_dense`. lr is rounded to the parameter's dtype: gradients may come in a narrower one."""
        lr = rounded(float(hyperparameters["lr"]), param.dtype)
        return super().plan_dense(param, grad, state, {**hyperparameters, "lr": lr}, **options)

    def check_rows(self, hyperparameters: Hyperparameters) -> None:
        """Raise RuntimeError, always: MLX has no row-sparse gradients."""
        raise RuntimeError(f"{self.name} does not support sparse gradients: MLX has none")


class MlxAdaDeltaRule(_MlxRule, AdadeltaRule):
    """The update of `mlx.optimizers.AdaDelta`."""

    name = "mlx_adadelta"
    kernel = "adadelta"
    state_names = ("v", "u")
    defaults: ClassVar = {"lr": 1.0, "rho": 0.9, "eps": 1e-6}
    ranges: ClassVar = {
        "lr": ("learning rate", math.inf),
        "rho": ("rho value", 1.0),
        "eps": ("epsilon value", math.inf),
    }


class MlxAdagradRule(_MlxRule, AdagradRule):
    """The update of `mlx.optimizers.Adagrad`."""

    name = "mlx_adagrad"
    kernel = "adagrad"
    state_names = ("v",)
    defaults: ClassVar = {"lr": 1e-2, "eps": 1e-8}
    ranges: ClassVar = {"lr": ("learning rate", math.inf), "eps": ("epsilon value", math.inf)}

    def initial_value(self, state_name: str, hyperparameters: Hyperparameters) -> float:
        """The sum of squares starts at zero."""
        return 0.0
