"""Gradients by name, dense and by rows: taken from a module, given to one, drawn from a number."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tests.support.trainings.network import ScaledNetwork, loss_of

Gradients = Mapping[str, Tensor]


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients by name; what has none is left out."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def set_gradients(module: nn.Module, gradients: Gradients) -> None:
    """Give each parameter its gradient, or None."""
    for name, parameter in module.named_parameters():
        gradient = gradients.get(name)
        parameter.grad = None if gradient is None else gradient.clone()


def drawn_gradients(number: int, *, sparse: bool = False) -> dict[str, Tensor]:
    """Gradients for a ScaledNetwork: the same for the same number, whatever its parameters are by then."""
    module = ScaledNetwork(sparse=sparse, seed=number)
    loss_of(module, number).backward()
    return gradients_of(module)


def square_sum(gradients: Gradients) -> float:
    """The sum of squares of all gradients in float64; rows that come twice are summed first."""
    dense = [merged(g)._values() if g.is_sparse else g for g in gradients.values()]
    return sum(float(g.double().square().sum()) for g in dense)


def scaled(gradient: Tensor, factor: float) -> Tensor:
    """A gradient times a factor; rows that come twice are summed first, as a push sums them before it is sent."""
    if factor == 1.0:
        return gradient
    return (merged(gradient) if gradient.is_sparse else gradient) * factor


def merged(gradient: Tensor) -> Tensor:
    """A row-sparse gradient whose rows come once, added one after the other: torch's `coalesce` adds in another order."""
    totals: dict[int, Tensor] = {}
    for row, values in zip(gradient._indices()[0].tolist(), gradient._values(), strict=True):
        totals[row] = totals[row] + values if row in totals else values
    ids = sorted(totals)
    rows = torch.stack([totals[row] for row in ids])
    return torch.sparse_coo_tensor(torch.tensor([ids]), rows, gradient.shape, check_invariants=True)
