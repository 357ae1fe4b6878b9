"""Adadelta (Zeiler 2012, arXiv 1212.5701), as a rule over tensors that the caller owns.

    v = rho*v + (1-rho)*g*g
    d = sqrt((u + eps) / (v + eps)) * g          u is the old one; torch takes two roots, an ulp apart at most
    u = rho*u + (1-rho)*d*d
    p = p - lr*d

v is torch's `square_avg`, u its `acc_delta`. lr scales the applied step, never the accumulated one. Weight decay
is coupled: g + weight_decay*p, added after `maximize` has negated g.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from .rule import Hyperparameters, Rule


class AdadeltaRule(Rule):
    """Adadelta by the equations of this module."""

    name = "adadelta"
    state_names = ("square_avg", "acc_delta")
    defaults: ClassVar = {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.0, "maximize": False}
    ranges: ClassVar = {
        "lr": ("learning rate", math.inf),
        "rho": ("rho value", 1.0),
        "eps": ("epsilon value", math.inf),
        "weight_decay": ("weight_decay value", math.inf),
    }

    def initial_value(self, state_name: str, hyperparameters: Hyperparameters) -> float:
        """Both averages start at zero."""
        return 0.0

    def effective_lr(self, hyperparameters: Hyperparameters, step: int) -> float:
        """`lr`, at every step: Adadelta has no learning rate decay of its own."""
        return float(hyperparameters["lr"])

    def arguments(self, hyperparameters: Hyperparameters) -> dict[str, Any]:
        """See `Rule.arguments`."""
        return {name: hyperparameters[name] for name in self.defaults}
