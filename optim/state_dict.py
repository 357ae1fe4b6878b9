"""Builds torch's state_dict of an optimizer from parts, and splits one into parts.

Both ends of the wire use it: the export that plain torch loads, and the state_dict that a remote optimizer fetches.
Nothing here aliases memory that a step will write to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from .rules.catalogue import RULES

# torch's group keys that choose how a step runs and do not change its numbers, with torch's defaults
EXECUTION_KEYS: Final[Mapping[str, Mapping[str, Any]]] = {
    "adadelta": {"foreach": None, "capturable": False, "differentiable": False, "fused": None},
    "adagrad": {"foreach": None, "differentiable": False, "fused": None},
    "keras_adadelta": {"gradient_accumulation_steps": None, "fused": None},
    "keras_adagrad": {"gradient_accumulation_steps": None, "fused": None},
    "mlx_adadelta": {"fused": None},
    "mlx_adagrad": {"fused": None},
}


@dataclass(slots=True)
class ParameterState:
    """One parameter: the steps it has taken, and its states by torch's names, in the parameter's shape."""

    steps: int
    tensors: Mapping[str, Tensor]


@dataclass(slots=True)
class GroupState:
    """One param group: its rule, its hyperparameters, and its parameters in order."""

    rule: str
    values: Mapping[str, float | bool]
    parameters: list[ParameterState] = field(default_factory=list)


def torch_state_dict(
    groups: Sequence[GroupState], take: Callable[[Tensor], Tensor] = torch.clone
) -> dict[str, Any]:
    """What torch.optim's `state_dict()` returns for an optimizer of these groups.

    `take` makes each tensor of the result from the group's tensor (a copy by default). A parameter that Adadelta has
    not stepped yet has no entry, as in torch; Adagrad's parameters always have one. `step` is a float32 scalar on the
    CPU, as in torch. In Keras's and MLX's terms the group has the counter. In Keras's its parameters have state from the
    first step on.
    """
    state: dict[int, dict[str, Tensor]] = {}
    param_groups: list[dict[str, Any]] = []
    number = 0
    for group in groups:
        ids = list(range(number, number + len(group.parameters)))
        rule, count = RULES[group.rule], max((p.steps for p in group.parameters), default=0)
        for parameter_id, parameter in zip(ids, group.parameters, strict=True):
            tensors = {n: take(t) for n, t in parameter.tensors.items()}
            if not {"at once": True, "with any": count, "with its own": parameter.steps}[rule.states_begin]:
                continue
            if rule.counter:
                state[parameter_id] = tensors
            else:
                step = torch.tensor(float(parameter.steps), dtype=torch.float32, device="cpu")
                state[parameter_id] = {"step": step, **tensors}
        values = {name: group.values[name] for name in rule.defaults if name in group.values}
        counted = {rule.counter: count} if rule.counter else {}
        param_groups.append({**values, **EXECUTION_KEYS.get(group.rule, {}), **counted, "params": ids})
        number += len(ids)
    return {"state": state, "param_groups": param_groups}


def parts_of(state_dict: Mapping[str, Any], rules: Sequence[str]) -> list[GroupState]:
    """The parts of a torch state_dict, one group per entry of `rules`.

    Keys that are not hyperparameters of the rule are left out: they are the caller's. ValueError if the number of
    groups differs (in torch's words), or if a parameter's state lacks one of the rule's states.
    """
    saved = state_dict["param_groups"]
    if len(saved) != len(rules):
        raise ValueError("loaded state dict has a different number of parameter groups")
    groups = []
    for entry, rule_name in zip(saved, rules, strict=True):
        rule = RULES[rule_name]
        values = {name: _plain(entry[name]) for name in rule.defaults if name in entry}
        if values.get("weight_decay", 0.0) is None:  # Keras writes a decay of 0 as None
            values["weight_decay"] = 0.0
        group = GroupState(rule_name, values)
        for parameter_id in entry["params"]:
            state = state_dict["state"].get(parameter_id, {})
            tensors = {name: tensor_of(state[name]) for name in rule.state_names if name in state}
            if state and set(tensors) != set(rule.state_names):
                raise ValueError(
                    f"state of parameter {parameter_id} lacks {set(rule.state_names) - set(tensors)}"
                )
            steps = entry.get(rule.counter, 0) if rule.counter else state.get("step", 0)
            group.parameters.append(ParameterState(int(_plain(steps)), tensors))
        groups.append(group)
    return groups


def tensor_of(value: Any) -> Tensor:
    """A tensor unchanged, an array in its own dtype, a Python float as float32.

    torch's default dtype makes no difference.
    """
    if isinstance(value, Tensor):
        return value
    array = np.asarray(value)
    if array.dtype == np.float64 and not hasattr(value, "dtype"):
        array = array.astype(np.float32)
    return torch.from_numpy(array)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
