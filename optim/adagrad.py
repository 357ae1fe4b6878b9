"""Adagrad (Duchi, Hazan and Singer 2011), in torch's terms.

    clr = lr / (1 + (step-1)*lr_decay)           step counts from 1
    h = h + g*g
    p = p - clr*g / (sqrt(h) + eps)              eps is outside the root

h is torch's `sum`, filled with `initial_accumulator_value` at first. Weight decay is coupled and refused for
row-sparse gradients, as in torch. Duplicate rows are summed first, then squared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad
from torch.optim.optimizer import ParamsT

from .optimizer import StateDtype
from .rule import Hyperparameters, Rule
from .torch_terms import TorchTerms


class AdagradRule(Rule):
    """The equations above over tensors that somebody else owns."""

    name = "adagrad"
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
        """What a fresh `sum` holds."""
        return float(hyperparameters["initial_accumulator_value"])

    def effective_lr(self, hyperparameters: Hyperparameters, step: int) -> float:
        """clr of the equations."""
        return float(hyperparameters["lr"]) / (1 + (step - 1) * float(hyperparameters["lr_decay"]))

    def arguments(self, hyperparameters: Hyperparameters) -> dict[str, Any]:
        """See `Rule.arguments`."""
        return {name: hyperparameters[name] for name in ("lr", "lr_decay", "weight_decay", "eps", "maximize")}

    def check_rows(self, hyperparameters: Hyperparameters) -> None:
        """torch's RuntimeError: decay would have to touch every row."""
        if hyperparameters["weight_decay"] != 0:
            raise RuntimeError("weight_decay option is not compatible with sparse gradients")


class Adagrad(TorchTerms, torch.optim.Adagrad):  # type: ignore[override]  # a property there, a flag here
    """torch.optim.Adagrad with fused steps.

    All of torch's arguments, and:

    fused: None takes the kernels wherever they can step (real floating dtypes, sparse gradients too, no
        `differentiable`, no explicit `foreach`, no `torch.compile`) and torch's own functions elsewhere; True insists
        and keeps the step counters on the device; False never does.
    state_dtype: None keeps float32 states for half parameters, "param" keeps them in the parameter's dtype as torch
        does. Plain torch loads our state dict and rounds such states to the parameter's dtype.
    row_wise: a `sum` of shape (rows, 1), fed by the mean over each row. A group may say so for itself.
    """

    rule = AdagradRule()
    _torch_takes_sparse = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: StateDtype = None,
        row_wise: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        self._construct(params, defaults, state_dtype=state_dtype, row_wise=row_wise, sparse=True)
        for group in self.param_groups:  # torch's Adagrad makes its states here
            for param in group["params"]:
                self._state_of(param, group)

    def _check_sparse(self, group: dict[str, Any]) -> None:
        self.rule.check_rows(group)

    def _step_torch(self, params: Sequence[Tensor], group: dict[str, Any]) -> None:
        (some, grads, sums, steps), has_complex = self._torch_lists(params, group)
        adagrad(
            some,
            grads,
            sums,
            steps,
            fused=bool(group["fused"]) and some[0].dtype == sums[0].dtype,
            has_sparse_grad=any(grad.is_sparse for grad in grads),
            foreach=group["foreach"],
            differentiable=group["differentiable"],
            has_complex=has_complex,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            lr_decay=group["lr_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
