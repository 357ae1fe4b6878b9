"""Param groups of two optimizers, by their hyperparameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KEYS = ("lr", "eps", "rho", "lr_decay", "weight_decay", "maximize", "initial_lr")


def copy_group(source: dict[str, Any], target: dict[str, Any]) -> None:
    """Have one group the hyperparameters of another, in place where it holds a tensor.

    A tensor that is what a number becomes in its dtype says nothing of further digits: the number stays.
    """
    for key in KEYS[:-1]:
        value = source.get(key)
        if isinstance(value, Tensor):
            same = bool(value == torch.full_like(value, float(target[key])))
            value = target[key] if same else float(value)
        if value is not None and isinstance(target[key], Tensor):
            target[key].fill_(float(value))
        elif value is not None:
            target[key] = value


def check_group(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Equal hyperparameters, to the last digit of what holds them."""
    for key in KEYS:
        assert (key in mine) == (key in theirs), key
        if key in mine:
            assert float(mine[key]) == float(theirs[key]), key
