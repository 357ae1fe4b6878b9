"""The optimizers that tests train a network with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from pushstep.optim import Adadelta, Adagrad
from tests.support.trainings.network import loss_of

Make = Callable[[nn.Module], torch.optim.Optimizer | Sequence[torch.optim.Optimizer]]
# sparse=True: torch's Adadelta refuses what the service takes
OPTIMIZERS = {"adadelta": functools.partial(Adadelta, sparse=True), "adagrad": Adagrad}


def adadelta(model: nn.Module) -> Adadelta:
    return Adadelta(model.parameters(), lr=0.7, sparse=True)


def adagrad(model: nn.Module) -> Adagrad:
    return Adagrad(model.parameters(), lr=0.1, lr_decay=0.01)


def both(model: nn.Module) -> list[torch.optim.Optimizer]:
    """The table under Adagrad, everything else under Adadelta: two optimizers that make one model."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    dense = [parameter for name, parameter in trained.items() if name != "table.weight"]
    return [Adagrad([model.get_parameter("table.weight")], lr=0.1), Adadelta(dense, lr=0.7)]


def made(make: Make, model: nn.Module) -> list[torch.optim.Optimizer]:
    """A model's optimizers, also if it is one."""
    found = make(model)
    return [found] if isinstance(found, torch.optim.Optimizer) else list(found)


def backward(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], seed: int) -> None:
    """Gradients of batch `seed`, and of nothing before it."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss_of(model, seed).backward()
