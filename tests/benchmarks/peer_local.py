"""torch's own optimizer in the worker's process: what a step costs when nothing travels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from . import training_side
from .driver import Driver, Make, end_all
from .side import Side, side_of

Rule = Literal["adadelta", "adagrad"]


def optimizer_of(rule: Rule, parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
    """The fastest that torch has: Adagrad fused, Adadelta (which has no fused one) foreach."""
    if rule == "adagrad":
        return torch.optim.Adagrad([parameter], fused=True)
    return torch.optim.Adadelta([parameter], foreach=True)


def parameter_of(elements: int) -> torch.nn.Parameter:
    """A parameter with a gradient."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(elements))
    parameter.grad = torch.randn(elements)
    return parameter


class LocalWorker:
    """Steps a parameter of its own."""

    def __init__(self, rule: Rule, elements: int) -> None:
        self._optimizer = optimizer_of(rule, parameter_of(elements))

    def exchange(self) -> None:
        """Step."""
        self._optimizer.step()

    def close(self) -> None:
        """Nothing to give back."""


def _workers(rule: Rule, elements: int) -> Sequence[LocalWorker]:
    return [LocalWorker(rule, elements)]


class Local:
    """Owns one process."""

    def __init__(self) -> None:
        self._driver = Driver()
        self._driver.answer()

    def side(self, rule: Rule, elements: int) -> Side:
        """One worker that steps by itself."""
        return side_of("local torch.optim", _workers, [self._driver], [(rule, elements)])

    def of(self, name: str, make: Make, *arguments: object) -> Side:
        """One worker of another load."""
        return side_of(name, make, [self._driver], [arguments])

    def training(self, elements: int) -> Side:
        """One worker that trains a model, compute included."""
        return side_of("local torch.optim", training_side.local, [self._driver], [(elements,)])

    def close(self) -> None:
        """End the process."""
        end_all([self._driver])
