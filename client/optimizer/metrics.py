"""Metrics that travel with the next push, for the model's hooks and its operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor


class Metrics:
    """The metrics that were reported since the last step."""

    def __init__(self) -> None:
        self._reported: dict[str, float] = {}

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Add metrics to the next step. Raises TypeError for a value that is not one number."""
        numbers: dict[str, float] = {}
        for name, value in metrics.items():
            number = _number(value)
            if number is None:
                raise TypeError(f"a metric is one number, and {name} is {type(value).__name__}")
            numbers[name] = number
        self._reported.update(numbers)

    def take(self, loss: Any) -> dict[str, float]:
        """Return and clear the metrics of the current step, with its closure's loss if that is a number."""
        reported, self._reported = self._reported, {}
        number = _number(loss)
        return reported if number is None else {"loss": number, **reported}


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.detach())
    return float(value) if isinstance(value, (int, float, np.number)) else None
