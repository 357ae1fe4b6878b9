"""A module with everything that a module has: stepped parameters, frozen values and buffers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.support.trainings.network import Network


class Trainee(Network):
    """Network behind a frozen layer and a norm with statistics: parameters, frozen values and buffers."""

    def __init__(self, *, seed: int = 0, sparse: bool = False) -> None:
        super().__init__(seed=seed, sparse=sparse)
        self.norm = nn.BatchNorm1d(2, affine=False)
        torch.manual_seed(seed)
        self.fixed = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        """Network's, of numbers that went through both."""
        return super().forward(ids, self.norm(self.fixed(numbers)))

    def trained(self) -> nn.Module:
        """The part that is stepped, as a module of its own over the same parameters."""
        part = nn.Module()
        part.table, part.hidden, part.out = self.table, self.hidden, self.out
        return part


STEPPED = ("table.weight", "hidden.weight", "hidden.bias", "out.weight", "out.bias")


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Of the stepped parameters, copies."""
    return {name: model.get_parameter(name).detach().clone() for name in STEPPED}


def extras_of(model: nn.Module) -> dict[str, Tensor]:
    """Of everything else, copies."""
    return {name: value.clone() for name, value in model.state_dict().items() if name not in STEPPED}


@torch.no_grad()
def write(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Have these values in a module."""
    state = model.state_dict()
    for name, value in values.items():
        state[name].copy_(value)
