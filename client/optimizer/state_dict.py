"""torch's state_dict for optimizers whose state lies on the server: fetched from there, and loaded to there.

The server does not know keys that a script adds to a group (a scheduler's `initial_lr`). They belong to this side: they
are copied from the local groups into a fetched dict, and from a loaded dict into the local groups.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pushstep.optim import RULES, Rule
from pushstep.optim.state_dict import EXECUTION_KEYS, GroupState, ParameterState, parts_of, torch_state_dict
from pushstep.proto import training_pb2 as pb
from pushstep.proto.types_pb2 import GroupValues
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.hyperparameters import plain_values, wire_values
from pushstep.proto.wire.layout import Layout, Slot

from ..attachment.hyperparameters import Group
from ..attachment.local_edits import same_bits
from ..transport.streams import Pulled


def fetched(
    pulled: Pulled,
    groups: Sequence[Group],
    pending: Mapping[int, Mapping[str, float | bool]],
    optimizers: int,
    name_of: Callable[[Tensor], str],
) -> list[dict[str, Any]]:
    """Return one state_dict per optimizer: the server's values, overlaid with the `pending` edits by group index."""
    steps, tensors = list(pulled.header.steps), _states(pulled)
    states = []
    for index, (group, held) in enumerate(zip(groups, pulled.header.groups, strict=False)):
        state = GroupState(group.rule, {**plain_values(held.values), **pending.get(index, {})})
        for parameter in group.settings["params"]:
            slot = pulled.layout.by_name[name_of(parameter)]
            own = {name: tensors[slot.index, name] for name in RULES[group.rule].state_names}
            state.parameters.append(ParameterState(steps[slot.index], own))
        states.append(state)
    dicts = []
    for number in range(optimizers):
        mine = _groups_of(number, groups)
        made = torch_state_dict([states[index] for index in mine])
        for entry, index in zip(made["param_groups"], mine, strict=True):
            _add_own_keys(entry, groups[index])
        dicts.append(made)
    return dicts


def _states(pulled: Pulled) -> dict[tuple[int, str], Tensor]:
    """Return the state tensors by (slot index, state name); empty parameters get empty states."""
    found = {(slot.index, state): values for slot, state, values in pulled.dense() if state}
    for slot in pulled.layout.slots:
        if slot.start == slot.stop:  # an empty parameter is not sent
            nothing = torch.empty(slot.shape, dtype=dtypes.state_dtype(slot.dtype), device="cpu")
            rule = RULES[pulled.layout.manifest.groups[slot.group].rule]
            found.update({(slot.index, name): nothing for name in rule.state_names})
    return found


def _add_own_keys(entry: dict[str, Any], group: Group) -> None:
    for key, value in group.settings.items():
        if key in entry and key != "params" and isinstance(value, Tensor):
            entry[key] = torch.full_like(value, entry[key])
        elif key not in (*RULES[group.rule].defaults, RULES[group.rule].counter, "params"):
            entry[key] = value


class Loading:
    """The optimizers' state_dicts as one upload. Raises ValueError, in torch's words, if one does not fit."""

    def __init__(
        self,
        dicts: Sequence[Mapping[str, Any]],
        groups: Sequence[Group],
        layout: Layout,
        slot_of: Callable[[Tensor], Slot],
    ) -> None:
        self.values: dict[tuple[Slot, str], Tensor] = {}
        self._steps = [0] * len(layout.slots)
        self._groups: list[GroupValues] = []
        self._slots: set[int] = set()
        for number, entry in enumerate(dicts):
            mine = _groups_of(number, groups)
            parts = parts_of(entry, [groups[index].rule for index in mine])
            for index, part in zip(mine, parts, strict=True):
                if len(groups[index].settings["params"]) != len(part.parameters):
                    raise ValueError(
                        "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
                    )
                self._groups.append(GroupValues(group=index, values=wire_values(part.values)))
                slots = map(slot_of, groups[index].settings["params"])
                for slot, state in zip(slots, part.parameters, strict=True):
                    self._take(slot, state, RULES[groups[index].rule], part.values)

    def _take(self, slot: Slot, state: ParameterState, rule: Rule, group: Mapping[str, float | bool]) -> None:
        found = {}
        for name in rule.state_names:
            initial = rule.initial_value(name, {**rule.defaults, **group})
            fresh = torch.full(slot.shape, initial, dtype=dtypes.state_dtype(slot.dtype), device="cpu")
            found[slot, name] = _shaped(state.tensors.get(name, fresh), slot, name)
        if slot.index in self._slots:  # one memory under several names
            same = all(same_bits(self.values[place], value) for place, value in found.items())
            if self._steps[slot.index] != state.steps or not same:
                raise ValueError(
                    f"loaded state dict has different states of {slot.name!r}, which is one parameter"
                )
        self._slots.add(slot.index)
        self._steps[slot.index] = state.steps
        self.values.update(found)

    def header(self, force: bool) -> pb.UploadHeader:
        """Return the upload's header, without the sender's identity."""
        return pb.UploadHeader(kind=pb.UPLOAD_KIND_STATE, force=force, steps=self._steps, groups=self._groups)

    def is_held(self, pulled: Pulled) -> bool:
        """True if the server holds this state, hyperparameters apart.

        Values are equal if their bits are equal after rounding to the narrower of the two dtypes.
        """
        states = _states(pulled)
        return list(pulled.header.steps) == self._steps and all(
            same_bits(
                states[slot.index, name].to(value.dtype),
                value.to(states[slot.index, name].dtype).to(value.dtype),
            )
            for (slot, name), value in self.values.items()
        )


def write_groups(
    dicts: Sequence[Mapping[str, Any]], groups: Sequence[Group], *, hyperparameters: bool = True
) -> None:
    """Write the loaded state_dicts into the groups, as torch does. `hyperparameters`: also the rule's own values."""
    for number, entry in enumerate(dicts):
        for index, saved in zip(_groups_of(number, groups), entry["param_groups"], strict=True):
            _write_group(groups[index], saved, hyperparameters)


def _write_group(group: Group, saved: Mapping[str, Any], hyperparameters: bool) -> None:
    rule, settings = RULES[group.rule], group.settings
    kept = {"params", "param_names", rule.counter, *rule.defaults, *EXECUTION_KEYS[group.rule]}
    for key in settings.keys() - saved.keys() - kept:
        del settings[key]  # a scheduler has written it since the save
    for key, value in saved.items():
        if key in ("params", "param_names", rule.counter):
            continue
        if hyperparameters or key not in rule.defaults:
            with torch.inference_mode(False):  # else the tensor can be written only in inference mode
                settings[key] = copy.deepcopy(value)


def _groups_of(number: int, groups: Sequence[Group]) -> list[int]:
    return [index for index, group in enumerate(groups) if group.optimizer == number]


def _shaped(value: Tensor, slot: Slot, name: str) -> Tensor:
    if tuple(value.shape) != slot.shape:
        raise ValueError(
            f"state {name!r} of {slot.name!r} has shape {tuple(value.shape)}, expected {slot.shape}"
        )
    return value
