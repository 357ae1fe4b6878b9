"""Hyperparameters as Python values, numbers and flags by name, and as messages: conversion both ways."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from ..training_pb2 import GroupEdit
from ..types_pb2 import GroupValues, Hyperparameter

Values = dict[str, float | bool]


def plain_values(values: Mapping[str, Hyperparameter]) -> Values:
    """Hyperparameters as Python numbers and flags."""
    return {
        name: value.flag if value.WhichOneof("value") == "flag" else value.number
        for name, value in values.items()
    }


def values_of(group: GroupValues) -> Values:
    """A group's hyperparameters as Python numbers and flags. They seldom change: the last 64 are cached."""
    return dict(_parsed(group.SerializeToString(deterministic=True)))


@lru_cache(maxsize=64)
def _parsed(group: bytes) -> Values:
    return plain_values(GroupValues.FromString(group).values)


def wire_values(values: Mapping[str, float | bool]) -> dict[str, Hyperparameter]:
    """Hyperparameters as messages. TypeError or ValueError for one that is neither number nor flag."""
    return {
        name: Hyperparameter(flag=value) if isinstance(value, bool) else Hyperparameter(number=float(value))
        for name, value in values.items()
    }


def group_edits(edits: Mapping[int, Mapping[str, float | bool]]) -> list[GroupEdit]:
    """Edits by group and name, as messages."""
    return [GroupEdit(group=group, values=wire_values(values)) for group, values in edits.items()]
