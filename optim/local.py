"""What the local optimizer classes share: walk torch's groups and hand each tensor to the rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .rows import coalesce

if TYPE_CHECKING:
    from .rules import Rule


def state_dtype(param: Tensor) -> torch.dtype:
    """Half parameters keep float32 state: bf16 accumulators stop growing at 256."""
    return torch.float32 if param.dtype in (torch.float16, torch.bfloat16) else param.dtype


class LocalRuleOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose step goes through a `Rule`."""

    rule: Rule

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._widen_state()  # torch loads state in the parameters' dtype

    def _widen_state(self) -> None:
        for param, state in self.state.items():
            for name in self.rule.state_names:
                if name in state:
                    state[name] = state[name].to(state_dtype(param))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            hyperparameters = {name: _number(group[name]) for name in self.rule.defaults}
            for param in group["params"]:
                if param.grad is not None:
                    self._step_one(param, param.grad, hyperparameters)
        return loss

    def _step_one(self, param: Tensor, grad: Tensor, hyperparameters: dict[str, Any]) -> None:
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
        for name in self.rule.state_names:
            if name not in state:
                value = self.rule.initial_value(name, hyperparameters)
                state[name] = torch.full_like(param, value, dtype=state_dtype(param))
        states = [state[name] for name in self.rule.state_names]
        state["step"] += 1
        step = int(state["step"].item())
        if grad.is_sparse:
            ids, rows = coalesce(grad._indices()[0], grad._values())
            self.rule.step_rows(param, ids, rows, states, hyperparameters, step=step)
        else:
            self.rule.step_dense(param, grad, states, hyperparameters, step=step)


def _number(value: Any) -> float | bool:
    return value.item() if isinstance(value, Tensor) else value
