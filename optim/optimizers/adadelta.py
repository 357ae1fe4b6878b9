"""Adadelta (Zeiler 2012, arXiv 1212.5701), in torch's terms.

The equations are in `rules/adadelta.py`. The class adds torch's arguments, state and hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adadelta import adadelta
from torch.optim.optimizer import ParamsT

from ..rules.adadelta import AdadeltaRule
from .base import StateDtype
from .torch_terms import TorchTerms


class Adadelta(TorchTerms, torch.optim.Adadelta):
    """torch.optim.Adadelta with fused steps.

    It takes all of torch's arguments, and:

    fused: None uses the kernels wherever they can step (real floating dtypes, no `differentiable`, no explicit
        `foreach`, no `torch.compile`) and torch's own functions elsewhere. True requires fused steps: RuntimeError for
        a device or a dtype that has none. False never uses the kernels.
    state_dtype: None keeps float32 states for half parameters, "param" keeps them in the parameter's dtype as torch
        does. Plain torch loads this class's state dict and rounds such states to the parameter's dtype.
    row_wise: states of shape (rows, 1), fed by the mean over each row. A group may set it for itself.
    sparse: accept sparse gradients, which torch refuses. Only the rows that are named move, and only their states
        decay. A group may set it for itself.
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
