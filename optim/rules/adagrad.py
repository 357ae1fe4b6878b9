"""Adagrad (Duchi, Hazan and Singer 2011), as a rule over tensors that the caller owns.

    clr = lr / (1 + (step-1)*lr_decay)           step counts from 1
    h = h + g*g
    p = p - clr*g / (sqrt(h) + eps)              eps is outside the root

h is torch's `sum`, filled with `initial_accumulator_value` at first. Weight decay is coupled. It is refused for
row-sparse gradients, as in torch. Duplicate rows are summed first, then squared.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from .rule import Beginning, Hyperparameters, Rule


class AdagradRule(Rule):
    """Adagrad by the equations of this module."""

    name = "adagrad"
    states_begin: ClassVar[Beginning] = "at once"
    state_names = ("sum",)
    defaults: ClassVar = {
        "lr": 1e-2,
        "lr_decay": 0.0,
        "weight_decay": 0.0,
        "initial_accumulator_value": 0.0,
        "eps": 1e-10,
        "maximize": False,
    }
    ranges: ClassVar = {
        "lr": ("learning rate", math.inf),
        "lr_decay": ("lr_decay value", math.inf),
        "weight_decay": ("weight_decay value", math.inf),
        "initial_accumulator_value": ("initial_accumulator_value value", math.inf),
        "eps": ("epsilon value", math.inf),
    }

    def initial_value(self, state_name: str, hyperparameters: Hyperparameters) -> float:
        """`initial_accumulator_value`, which fills a fresh `sum`."""
        return float(hyperparameters["initial_accumulator_value"])

    def effective_lr(self, hyperparameters: Hyperparameters, step: int) -> float:
        """clr of this module's equations; `step` counts from 1."""
        return float(hyperparameters["lr"]) / (1 + (step - 1) * float(hyperparameters["lr_decay"]))

    def arguments(self, hyperparameters: Hyperparameters) -> dict[str, Any]:
        """See `Rule.arguments`."""
        return {name: hyperparameters[name] for name in ("lr", "lr_decay", "weight_decay", "eps", "maximize")}

    def check_rows(self, hyperparameters: Hyperparameters) -> None:
        """Raise torch's RuntimeError if there is weight decay: it would have to touch every row."""
        if hyperparameters["weight_decay"] != 0:
            raise RuntimeError("weight_decay option is not compatible with sparse gradients")
