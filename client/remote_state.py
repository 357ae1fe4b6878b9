"""torch's state_dict of optimizers whose state lies on the server: fetched from there, and loaded to there.

What torch does not keep in a group (a scheduler's `initial_lr`) the server does not know: it is this side's own, and
goes from the groups here into a dict that is fetched, and back from one that is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pushstep.optim import RULES
from pushstep.optim.state_dict import GroupState, ParameterState, parts_of, torch_state_dict
from pushstep.proto import dtypes
from pushstep.proto import training_pb2 as pb
from pushstep.proto.hyperparameters import plain_values, wire_values
from pushstep.proto.layout import Layout, Slot
from pushstep.proto.types_pb2 import GroupValues

from .hyperparameters import Group
from .transport import Pulled


def fetched(
    pulled: Pulled,
    groups: Sequence[Group],
    pending: Mapping[int, Mapping[str, float | bool]],
    optimizers: int,
) -> list[dict[str, Any]]:
    """The state_dict of each of so many optimizers, with the edits that are `pending` in the server's values."""
    steps = list(pulled.header.steps)
    tensors: dict[int, dict[str, Tensor]] = {slot.index: {} for slot in pulled.layout.slots}
    for slot, state, values in pulled.dense():
        if state:
            tensors[slot.index][state] = values
    states = [
        GroupState(group.rule, {**plain_values(held.values), **pending.get(index, {})})
        for index, (group, held) in enumerate(zip(groups, pulled.header.groups, strict=False))
    ]
    for slot in pulled.layout.slots:
        if slot.group < len(states):
            if slot.start == slot.stop:  # nothing of it is sent
                nothing = torch.empty(slot.shape, dtype=dtypes.state_dtype(slot.dtype), device="cpu")
                tensors[slot.index] = dict.fromkeys(RULES[groups[slot.group].rule].state_names, nothing)
            states[slot.group].parameters.append(ParameterState(steps[slot.index], tensors[slot.index]))
    dicts = []
    for number in range(optimizers):
        mine = _groups_of(number, groups)
        made = torch_state_dict([states[index] for index in mine])
        for entry, index in zip(made["param_groups"], mine, strict=True):
            _add_own_keys(entry, groups[index])
        dicts.append(made)
    return dicts


def _add_own_keys(entry: dict[str, Any], group: Group) -> None:
    for key, value in group.settings.items():
        if key in entry and key != "params" and isinstance(value, Tensor):
            entry[key] = torch.full_like(value, entry[key])
        elif key not in (*RULES[group.rule].defaults, RULES[group.rule].counter, "params"):
            entry[key] = value


def upload_of(
    dicts: Sequence[Mapping[str, Any]],
    groups: Sequence[Group],
    layout: Layout,
    slot_of: Callable[[Tensor], Slot],
    force: bool,
) -> tuple[pb.UploadHeader, dict[tuple[Slot, str], Tensor]]:
    """What replaces the server's state by each optimizer's state_dict. ValueError, in torch's words, if one does not fit."""
    header = pb.UploadHeader(kind=pb.UPLOAD_KIND_STATE, force=force)
    values: dict[tuple[Slot, str], Tensor] = {}
    steps = [0] * len(layout.slots)
    for number, entry in enumerate(dicts):
        mine = _groups_of(number, groups)
        parts = parts_of(entry, [groups[index].rule for index in mine])
        for index, part in zip(mine, parts, strict=True):
            parameters = groups[index].settings["params"]
            if len(parameters) != len(part.parameters):
                raise ValueError(
                    "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
                )
            header.groups.append(GroupValues(group=index, values=wire_values(part.values)))
            rule = RULES[groups[index].rule]
            for parameter, state in zip(parameters, part.parameters, strict=True):
                slot = slot_of(parameter)
                steps[slot.index] = state.steps
                for name in rule.state_names:
                    initial = rule.initial_value(name, {**rule.defaults, **part.values})
                    fresh = torch.full(
                        slot.shape, initial, dtype=dtypes.state_dtype(slot.dtype), device="cpu"
                    )
                    values[slot, name] = _shaped(state.tensors.get(name, fresh), slot, name)
    header.steps.extend(steps)
    return header, values


def keep_own_keys(dicts: Sequence[Mapping[str, Any]], groups: Sequence[Group]) -> None:
    """Take over from each loaded state_dict what the server does not keep."""
    for number, entry in enumerate(dicts):
        for index, saved in zip(_groups_of(number, groups), entry["param_groups"], strict=True):
            for key, value in saved.items():
                rule = RULES[groups[index].rule]
                if key not in (*rule.defaults, rule.counter, "params", "param_names"):
                    groups[index].settings[key] = value


def _groups_of(number: int, groups: Sequence[Group]) -> list[int]:
    return [index for index, group in enumerate(groups) if group.optimizer == number]


def equal(one: Any, other: Any) -> bool:
    """Whether two state_dicts, or lists of them, hold the same; wherever their tensors lie."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and bool(torch.equal(one.cpu(), other.cpu()))
        )
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def _shaped(value: Tensor, slot: Slot, name: str) -> Tensor:
    if tuple(value.shape) != slot.shape:
        raise ValueError(
            f"state {name!r} of {slot.name!r} has shape {tuple(value.shape)}, expected {slot.shape}"
        )
    return value
