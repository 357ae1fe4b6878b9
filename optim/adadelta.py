"""Adadelta (Zeiler 2012, arXiv 1212.5701), in torch's terms.

    v = rho*v + (1-rho)*g*g
    d = sqrt(u + eps) / sqrt(v + eps) * g        u is the old one
    u = rho*u + (1-rho)*d*d
    p = p - lr*d

v is torch's `square_avg`, u its `acc_delta`. lr scales what is applied, never what is accumulated. Weight decay
is coupled: g + weight_decay*p, added after `maximize` has negated g.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from .arithmetic import in_dtype, prepared_gradient
from .local import LocalRuleOptimizer


class AdadeltaRule:
    """The equations above over tensors that somebody else owns."""

    name: Final = "adadelta"
    state_names: Final = ("square_avg", "acc_delta")
    defaults: Final[Mapping[str, float | bool]] = {
        "lr": 1.0,
        "rho": 0.9,
        "eps": 1e-6,
        "weight_decay": 0.0,
        "maximize": False,
    }

    def validate(self, hyperparameters: Mapping[str, float | bool]) -> None:
        """Raise torch's ValueError for a value out of range."""
        torch.optim.Adadelta([torch.zeros(1, requires_grad=True)], **hyperparameters)  # type: ignore[arg-type]

    def initial_value(self, state_name: str, hyperparameters: Mapping[str, float | bool]) -> float:
        """Both averages start at zero."""
        return 0.0

    def effective_lr(self, hyperparameters: Mapping[str, float | bool], step: int) -> float:
        """Adadelta has no decay of its own."""
        return float(hyperparameters["lr"])

    def step_dense(
        self,
        param: Tensor,
        grad: Tensor,
        state: Sequence[Tensor],
        hyperparameters: Mapping[str, float | bool],
        *,
        step: int,
        factor: float = 1.0,
    ) -> None:
        """See `Rule.step_dense`."""
        v, u = state
        lr, rho, eps = (float(hyperparameters[name]) for name in ("lr", "rho", "eps"))

        def body(p: Tensor) -> None:
            g = prepared_gradient(
                grad,
                p,
                factor=factor,
                maximize=bool(hyperparameters["maximize"]),
                weight_decay=float(hyperparameters["weight_decay"]),
            )
            v.mul_(rho).addcmul_(g, g, value=1 - rho)
            d = u.add(eps).sqrt_().div_(v.add(eps).sqrt_()).mul_(g)
            u.mul_(rho).addcmul_(d, d, value=1 - rho)
            p.add_(d, alpha=-lr)

        in_dtype(param, v.dtype, body)

    def step_rows(
        self,
        param: Tensor,
        ids: Tensor,
        rows: Tensor,
        state: Sequence[Tensor],
        hyperparameters: Mapping[str, float | bool],
        *,
        step: int,
        factor: float = 1.0,
    ) -> None:
        """An extension of torch's (which refuses sparse gradients): the dense rule on the rows named, no others."""
        p = param.index_select(0, ids)
        v, u = (table.index_select(0, ids) for table in state)
        self.step_dense(p, rows, (v, u), hyperparameters, step=step, factor=factor)
        param.index_copy_(0, ids, p)
        for table, touched in zip(state, (v, u), strict=True):
            table.index_copy_(0, ids, touched)


class Adadelta(LocalRuleOptimizer, torch.optim.Adadelta):
    """torch.optim.Adadelta, stepped by `AdadeltaRule`."""

    rule = AdadeltaRule()
