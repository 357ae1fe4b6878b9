"""What learns: embedding tables for who flies where and when, and a small network over them and the weather.

The tables have sparse gradients and belong to Adagrad, which gives rare airframes and flight numbers long steps;
the network has dense ones and belongs to Adadelta. For the service these are two param groups of one model.
"""

from __future__ import annotations

from typing import Final

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
    """The logit of a late arrival from a flight's codes and numbers."""

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
        """One logit per flight."""
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
    """Adagrad over the tables, Adadelta over the network: ours, or torch's own where a comparison wants them."""
    return [
        adagrad(model.embeddings.parameters(), lr=EMBEDDING_LR),
        adadelta(model.network.parameters(), lr=NETWORK_LR),
    ]
