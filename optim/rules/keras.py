"""Keras's Adadelta and Adagrad as rules over tensors that the caller owns.

The equations are in `keras/optimizers.py`. Weight decay is decoupled, and there are no row-sparse gradients. A rule is
one step of one element. What Keras's optimizers do beyond that (clipping, averages, accumulation, a schedule) is in
`keras/`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from .adadelta import AdadeltaRule
from .adagrad import AdagradRule
from .rule import Beginning, Hyperparameters


def _refuse_rows(name: str) -> None:
    raise RuntimeError(f"{name} does not support sparse gradients: Keras has none")


class KerasAdadeltaRule(AdadeltaRule):
    """The update of `keras.optimizers.Adadelta`."""

    name = "keras_adadelta"
    kernel = "adadelta"
    counter = "iterations"
    states_begin: ClassVar[Beginning] = "with any"
    state_names = ("accumulated_grad", "accumulated_delta_var")
    defaults: ClassVar = {"lr": 0.001, "rho": 0.95, "epsilon": 1e-7, "weight_decay": 0.0}
    ranges: ClassVar = {
        "lr": ("learning rate", math.inf),
        "rho": ("rho value", 1.0),
        "epsilon": ("epsilon value", math.inf),
        "weight_decay": ("weight_decay value", math.inf),
    }

    def arguments(self, hyperparameters: Hyperparameters) -> dict[str, Any]:
        """See `Rule.arguments`."""
        given = {name: hyperparameters[name] for name in ("lr", "rho", "weight_decay")}
        return {**given, "eps": hyperparameters["epsilon"], "decoupled": True, "multiply_first": True}

    def check_rows(self, hyperparameters: Hyperparameters) -> None:
        """Raise RuntimeError, always: Keras has no row-sparse gradients."""
        _refuse_rows(self.name)


class KerasAdagradRule(AdagradRule):
    """The update of `keras.optimizers.Adagrad`."""

    name = "keras_adagrad"
    kernel = "adagrad"
    counter = "iterations"
    states_begin: ClassVar[Beginning] = "with any"
    state_names = ("accumulator",)
    defaults: ClassVar = {"lr": 0.001, "initial_accumulator_value": 0.1, "epsilon": 1e-7, "weight_decay": 0.0}
    ranges: ClassVar = {
        "lr": ("learning rate", math.inf),
        "initial_accumulator_value": ("initial_accumulator_value value", math.inf),
        "epsilon": ("epsilon value", math.inf),
        "weight_decay": ("weight_decay value", math.inf),
    }

    def effective_lr(self, hyperparameters: Hyperparameters, step: int) -> float:
        """`lr`, at every step: Keras's Adagrad has no learning rate decay of its own."""
        return float(hyperparameters["lr"])

    def arguments(self, hyperparameters: Hyperparameters) -> dict[str, Any]:
        """See `Rule.arguments`."""
        given = {name: hyperparameters[name] for name in ("lr", "weight_decay")}
        return {**given, "eps": hyperparameters["epsilon"], "decoupled": True, "eps_inside_root": True}

    def check_rows(self, hyperparameters: Hyperparameters) -> None:
        """Raise RuntimeError, always: Keras has no row-sparse gradients."""
        _refuse_rows(self.name)
