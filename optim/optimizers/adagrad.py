"""Adagrad (Duchi, Hazan and Singer 2011), in torch's terms.

The equations are in `rules/adagrad.py`. The class adds torch's arguments, state and hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad
from torch.optim.optimizer import ParamsT

from ..rules.adagrad import AdagradRule
from .base import StateDtype
from .torch_terms import TorchTerms


class Adagrad(TorchTerms, torch.optim.Adagrad):  # type: ignore[override]  # a property in torch, a flag here
    """torch.optim.Adagrad with fused steps.

    It takes all of torch's arguments, and:

    fused: None uses the kernels wherever they can step (real floating dtypes, sparse gradients too, no
        `differentiable`, no explicit `foreach`, no `torch.compile`) and torch's own functions elsewhere. True requires
        fused steps (RuntimeError for a device or a dtype that has none) and keeps the step counters on the device.
        False never uses the kernels.
    state_dtype: None keeps float32 states for half parameters, "param" keeps them in the parameter's dtype as torch
        does. Plain torch loads this class's state dict and rounds such states to the parameter's dtype.
    row_wise: a `sum` of shape (rows, 1), fed by the mean over each row. A group may set it for itself.
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
        for group in self.param_groups:  # torch's Adagrad makes its states in the constructor, too
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
