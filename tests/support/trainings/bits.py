"""Tensors, parameters and optimizer states as bytes: equal only if every element is, the sign of a zero included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Bits = dict[str, bytes]
StateBits = dict[tuple[int, str], tuple[torch.dtype, tuple[int, ...], bytes]]
# what only says how torch executes a step
_EXECUTION = frozenset({"foreach", "capturable", "differentiable", "fused"})


def bits(tensor: Tensor) -> bytes:
    """A tensor's bytes."""
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def parameter_bits(module: nn.Module) -> Bits:
    """Every parameter's bytes by name."""
    return {name: bits(parameter) for name, parameter in module.named_parameters()}


def array_bits(arrays: Mapping[str, Any]) -> Bits:
    """The same of arrays, as a session's pull returns them."""
    return {name: np.ascontiguousarray(array).tobytes() for name, array in arrays.items()}


def state_bits(state_dict: Mapping[str, Any]) -> StateBits:
    """An optimizer's whole state, `step` included, by (parameter number, name)."""
    return {
        (number, name): (value.dtype, tuple(value.shape), bits(value))
        for number, state in state_dict["state"].items()
        for name, value in state.items()
    }


def hyperparameters(state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of a state_dict without the keys that only say how torch executes a step."""
    groups = state_dict["param_groups"]
    return [{key: value for key, value in group.items() if key not in _EXECUTION} for group in groups]


def check_state_dict(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """torch's format: the same keys, numbers and kinds of numbers, and tensors of the same dtype and bits."""
    assert got.keys() == expected.keys() == {"state", "param_groups"}
    assert len(got["param_groups"]) == len(expected["param_groups"])
    for one, other in zip(got["param_groups"], expected["param_groups"], strict=True):
        # fused: torch.optim.Adagrad has it; None, which Adadelta ignores
        assert {**one, "fused": None} == {**other, "fused": None}
        for kind in (bool, Tensor):  # whether a number is an int or a float is nobody's business
            assert [isinstance(one[key], kind) for key in other] == [
                isinstance(value, kind) for value in other.values()
            ]
    assert got["state"].keys() == expected["state"].keys()
    mine, theirs = state_bits(got), state_bits(expected)
    assert mine.keys() == theirs.keys()
    for place, value in theirs.items():
        assert mine[place] == value, place
