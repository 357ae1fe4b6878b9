"""The model: embedding tables for the categories of a flight, and a small network over them and the numbers.

The tables have sparse gradients and use Adagrad, which gives rare airframes and flight numbers long steps. The network
has dense gradients and uses Adadelta. For the service these are two param groups of one model.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from pushstep.optim import Adadelta, Adagrad

from .data import CATEGORIES, Flights

EMBEDDING_WIDTH: Final = 16
HIDDEN_WIDTHS: Final = (128, 64)
EMBEDDING_LR: Final = 0.02
NETWORK_LR: Final = 0.5
MODEL_SEED: Final = 7


class FlightModel(nn.Module):
    """Computes the logit of a late arrival from a flight's codes and numbers."""

    def __init__(self, vocabulary: dict[str, int], features: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {name: nn.Embedding(vocabulary[name], EMBEDDING_WIDTH, sparse=True) for name in CATEGORIES}
        )
        for table in self.embeddings.parameters():
            nn.init.normal_(table, std=0.05)
        layers: list[nn.Module] = []
        width = EMBEDDING_WIDTH * len(CATEGORIES) + features
        for hidden in HIDDEN_WIDTHS:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        self.network = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, codes: Tensor, numbers: Tensor) -> Tensor:
        """One logit per flight: codes int64 (flights, categories), numbers float32 (flights, features)."""
        looked_up = [table(codes[:, column]) for column, table in enumerate(self.embeddings.values())]
        logits: Tensor = self.network(torch.cat([*looked_up, numbers], dim=1))
        return logits.squeeze(1)


def flight_model(flights: Flights) -> FlightModel:
    """A fresh model, with the same values in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(MODEL_SEED)
        return FlightModel(flights.vocabulary, flights.numbers.shape[1])


def optimizers(
    model: FlightModel,
    *,
    adagrad: type[torch.optim.Adagrad] = Adagrad,
    adadelta: type[torch.optim.Adadelta] = Adadelta,
) -> list[torch.optim.Optimizer]:
    """Adagrad for the tables and Adadelta for the network: pushstep's, or torch's own for the comparison."""
    return [
        adagrad(model.embeddings.parameters(), lr=EMBEDDING_LR),
        adadelta(model.network.parameters(), lr=NETWORK_LR),
    ]


def auc(scores: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """The AUC: the probability that a late flight scores above a punctual one, ties counted half. Exact.

    Computed as the Mann-Whitney U: the sum of the late flights' ranks, minus its value if they had the lowest scores,
    is the number of pairs in order. Tied scores share the mean of their ranks. ValueError if a class is empty.
    """
    positive = labels.astype(bool)
    late, punctual = int(positive.sum()), int((~positive).sum())
    if late == 0 or punctual == 0:
        raise ValueError("an AUC needs at least one late and one punctual flight")
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2
    pairs_in_order = float(rank[place[positive]].sum()) - late * (late + 1) / 2
    return pairs_in_order / (late * punctual)


@torch.no_grad()
def held_out_auc(model: FlightModel, flights: Flights) -> float:
    """The model's AUC on the held-out flights."""
    rows = flights.held_out
    scores = model(flights.codes[rows], flights.numbers[rows])
    return auc(scores.numpy(), flights.late[rows].numpy())
