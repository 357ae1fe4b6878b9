"""Hyperparameters as Python has them, numbers and flags by name, and as messages carry them."""

from __future__ import annotations

from collections.abc import Mapping

from .types_pb2 import Hyperparameter

Values = dict[str, float | bool]


def plain_values(values: Mapping[str, Hyperparameter]) -> Values:
    """Hyperparameters as Python numbers and flags."""
    return {
        name: value.flag if value.WhichOneof("value") == "flag" else value.number
        for name, value in values.items()
    }


def wire_values(values: Mapping[str, float | bool]) -> dict[str, Hyperparameter]:
    """Hyperparameters as messages. TypeError or ValueError for what is neither a number nor a flag."""
    return {
        name: Hyperparameter(flag=value) if isinstance(value, bool) else Hyperparameter(number=float(value))
        for name, value in values.items()
    }
