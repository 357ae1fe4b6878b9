"""Adadelta (Zeiler 2012, arXiv 1212.5701), in torch's terms.

    v = rho*v + (1-rho)*g*g
    d = sqrt((u + eps) / (v + eps)) * g          u is the old one; torch takes two roots, an ulp apart at most
    u = rho*u + (1-rho)*d*d
    p = p - lr*d

v is torch's `square_avg`, u its `acc_delta`. lr scales what is applied, never what is accumulated. Weight decay
is coupled: g + weight_decay*p, added after `maximize` has negated g.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adadelta import adadelta
from torch.optim.optimizer import ParamsT

from .optimizer import StateDtype
from .rule import Hyperparameters, Rule
from .torch_terms import TorchTerms


class AdadeltaRule(Rule):
    """The equations above over tensors that somebody else owns."""

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
        """Adadelta has no decay of its own."""
        return float(hyperparameters["lr"])

    def arguments(self, hyperparameters: Hyperparameters) -> dict[str, Any]:
        """See `Rule.arguments`."""
        return {name: hyperparameters[name] for name in self.defaults}


class Adadelta(TorchTerms, torch.optim.Adadelta):
    """torch.optim.Adadelta with fused steps.

    All of torch's arguments, and:

    fused: None takes the kernels wherever they can step (real floating dtypes, no `differentiable`, no explicit
        `foreach`, no `torch.compile`) and torch's own functions elsewhere; True insists; False never does.
    state_dtype: None keeps float32 states for half parameters, "param" keeps them in the parameter's dtype as torch
        does. Plain torch loads our state dict and rounds such states to the parameter's dtype.
    row_wise: states of shape (rows, 1), fed by the mean over each row. A group may say so for itself.
    sparse: accept sparse gradients, which torch refuses: only the rows named move, and only their states decay.
    """

    rule = AdadeltaRule()
    _torch_takes_sparse = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: StateDtype = None,
        row_wise: bool = False,
        sparse: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        self._construct(params, defaults, state_dtype=state_dtype, row_wise=row_wise, sparse=sparse)

    def _check_sparse(self, group: dict[str, Any]) -> None:
        if not self._option(group, "sparse"):
            raise RuntimeError("Adadelta does not support sparse gradients")

    def _step_torch(self, params: Sequence[Tensor], group: dict[str, Any]) -> None:
        (some, grads, square_avgs, acc_deltas, steps), has_complex = self._torch_lists(params, group)
        adadelta(
            some,
            grads,
            square_avgs,
            acc_deltas,
            steps,
            capturable=group["capturable"],
            foreach=group["foreach"],
            differentiable=group["differentiable"],
            has_complex=has_complex,
            lr=group["lr"],
            rho=group["rho"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )
