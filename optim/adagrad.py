"""Adagrad (Duchi, Hazan and Singer 2011), in torch's terms.

    clr = lr / (1 + (step-1)*lr_decay)           step counts from 1
    h = h + g*g
    p = p - clr*g / (sqrt(h) + eps)              eps is outside the root

h is torch's `sum`, filled with `initial_accumulator_value` at first. Weight decay is coupled and refused for
row-sparse gradients, as in torch. Duplicate rows are summed first, then squared.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from .arithmetic import in_dtype, prepared_gradient
from .local import LocalRuleOptimizer, state_dtype


class AdagradRule:
    """The equations above over tensors that somebody else owns."""

    name: Final = "adagrad"
    state_names: Final = ("sum",)
    defaults: Final[Mapping[str, float | bool]] = {
        "lr": 1e-2,
        "lr_decay": 0.0,
        "weight_decay": 0.0,
        "initial_accumulator_value": 0.0,
        "eps": 1e-10,
        "maximize": False,
    }

    def validate(self, hyperparameters: Mapping[str, float | bool]) -> None:
        """Raise torch's ValueError for a value out of range."""
        torch.optim.Adagrad([torch.zeros(1, requires_grad=True)], **hyperparameters)  # type: ignore[arg-type]

    def initial_value(self, state_name: str, hyperparameters: Mapping[str, float | bool]) -> float:
        """What a fresh `sum` holds."""
        return float(hyperparameters["initial_accumulator_value"])

    def effective_lr(self, hyperparameters: Mapping[str, float | bool], step: int) -> float:
        """clr of the equations."""
        return float(hyperparameters["lr"]) / (1 + (step - 1) * float(hyperparameters["lr_decay"]))

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
        (h,) = state
        clr = self.effective_lr(hyperparameters, step)
        eps = float(hyperparameters["eps"])

        def body(p: Tensor) -> None:
            g = prepared_gradient(
                grad,
                p,
                factor=factor,
                maximize=bool(hyperparameters["maximize"]),
                weight_decay=float(hyperparameters["weight_decay"]),
            )
            h.addcmul_(g, g, value=1)
            p.addcdiv_(g, h.sqrt().add_(eps), value=-clr)

        in_dtype(param, h.dtype, body)

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
        """The dense rule on the rows named; RuntimeError with weight decay, as torch."""
        if hyperparameters["weight_decay"] != 0:
            raise RuntimeError("weight_decay option is not compatible with sparse gradients")
        (table,) = state
        p = param.index_select(0, ids)
        h = table.index_select(0, ids)
        self.step_dense(p, rows, (h,), hyperparameters, step=step, factor=factor)
        param.index_copy_(0, ids, p)
        table.index_copy_(0, ids, h)


class Adagrad(LocalRuleOptimizer, torch.optim.Adagrad):
    """torch.optim.Adagrad, stepped by `AdagradRule`."""

    rule = AdagradRule()

    @functools.wraps(torch.optim.Adagrad.__init__)  # type: ignore[misc]  # mypy wants a plain def; this one keeps torch's signature
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        for group in self.param_groups:
            for param in group["params"]:
                if state_dtype(param) != param.dtype:
                    # torch has filled it in the parameter's dtype, where 0.1 is another number
                    value = group["initial_accumulator_value"]
                    self.state[param]["sum"] = torch.full_like(param, value, dtype=state_dtype(param))
