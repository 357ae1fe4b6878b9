"""A network and its optimizers here, in local torch: what a service has to equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.support.trainings.bits import Bits, StateBits, parameter_bits, state_bits
from tests.support.trainings.gradients import Gradients, scaled, set_gradients
from tests.support.trainings.optimizers import Make, made


def plain_step(optimizer: torch.optim.Optimizer) -> object:
    """Step as usual."""
    return optimizer.step()


class LocalTraining:
    """Owns a model and its optimizers."""

    def __init__(self, model: nn.Module, make: Make) -> None:
        self.model = model
        self.optimizers = made(make, model)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The param groups, in the model's order."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, step: Callable[[torch.optim.Optimizer], object] = plain_step) -> None:
        """One step by the gradients that are there."""
        for optimizer in self.optimizers:
            step(optimizer)

    def zero_grad(self) -> None:
        """No gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state(self) -> list[StateBits]:
        """Every optimizer's state, in bytes."""
        return [state_bits(optimizer.state_dict()) for optimizer in self.optimizers]


class Replay(LocalTraining):
    """A training that is stepped push by push. `history[v]` is version v, in bytes."""

    def __init__(self, model: nn.Module, make: Make) -> None:
        super().__init__(model, make)
        self.history = [parameter_bits(model)]

    def push(self, gradients: Gradients, factor: float = 1.0) -> Bits:
        """The next version: one step with the gradients, which are first multiplied by `factor`."""
        set_gradients(self.model, {name: scaled(g, factor) for name, g in gradients.items()})
        self.step()
        self.history.append(parameter_bits(self.model))
        return self.history[-1]
