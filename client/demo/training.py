"""The training loop, the same for local optimizers and for a worker of the service.

The loop uses only `step`, `zero_grad` and `samples` of an optimizer, so it does not depend on where the step is taken.
Each epoch is one seeded shuffle, cut into batches; worker i of n takes every n-th batch from the i-th on. Together the
workers see exactly the batches that a single trainer sees, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from .data import Flights
from .model import FlightModel

BATCH: Final = 1024
SHUFFLE_SEED: Final = 13


class Stepper(Protocol):
    """The interface that the loop needs of an optimizer."""

    samples: float
    """The number of flights behind the next step's gradients. Where several pushes make one step, it is their weight."""

    def step(self) -> Any:
        """Take a step of the gradients."""

    def zero_grad(self) -> None:
        """Clear the gradients."""


class Together:
    """Steps several local optimizers as one, as the service steps the groups of one model."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self.samples: float = 0

    def step(self) -> None:
        """Step each of them."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Clear the gradients of each of them."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def batches(
    flights: Flights, epoch: int, *, index: int = 0, of: int = 1, batch: int = BATCH
) -> Iterator[Tensor]:
    """The int64 rows of each batch in this worker's share (`index` of `of`) of an epoch."""
    order = np.random.default_rng((SHUFFLE_SEED, epoch)).permutation(len(flights.train))
    shuffled = flights.train[torch.from_numpy(order)]
    for start in range(index * batch, len(shuffled), of * batch):
        yield shuffled[start : start + batch]


def batch_count(flights: Flights, epochs: int, *, batch: int = BATCH) -> int:
    """The number of steps that `train` takes with the same arguments."""
    return epochs * -(-len(flights.train) // batch)


def train(
    model: FlightModel,
    optimizer: Stepper,
    flights: Flights,
    *,
    epochs: int,
    report: Callable[[int, float], None],
    index: int = 0,
    of: int = 1,
    batch: int = BATCH,
) -> None:
    """Train for some epochs on this worker's share; `report(step, loss)` is called after each step."""
    step = 0
    for epoch in range(epochs):
        for rows in batches(flights, epoch, index=index, of=of, batch=batch):
            optimizer.zero_grad()
            logits = model(flights.codes[rows], flights.numbers[rows])
            loss = binary_cross_entropy_with_logits(logits, flights.late[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.samples = len(rows)
            optimizer.step()
            step += 1
            report(step, loss.item())
