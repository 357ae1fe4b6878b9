"""How good the predictions are: the area under the ROC curve on flights that no one trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .data import Flights
from .model import FlightModel


def auc(scores: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """The chance that a late flight outscores a punctual one, ties counted half; exact, by ranks.

    The sum of the late flights' ranks, less what it would be if they all came last, counts the pairs that are in
    order; tied scores share the mean of their ranks.
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
