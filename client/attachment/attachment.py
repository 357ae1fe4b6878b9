"""Checks what is to be attached, before anything is done, and refuses what cannot work.

After these checks only the server can still refuse to create the model, and the optimizers can be taken over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pushstep.optim import RULES
from pushstep.proto.errors import InvalidHyperparameter, UnsupportedModule, WrongShape
from pushstep.proto.types_pb2 import Manifest, Parameter
from pushstep.proto.wire.layout import Layout, Slot
from pushstep.proto.wire.names import check_parameter_name

from ..warn import warn
from .hyperparameters import Group
from .local_edits import same_bits
from .manifest import group_message, parameter_message
from .names import added_names, parameter_names
from .originals import check_distinct, rule_of, stepped_states
from .tensors import check_parameter, firsts

Names = Sequence[str] | Mapping[Tensor, str] | None


class Attachment:
    """Optimizers whose steps a server can take: owns their groups, their parameters' names and the manifest.

    The constructor raises UnsupportedModule, InvalidHyperparameter, InvalidManifest, WrongDtype or WrongShape.
    """

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], module: nn.Module | None, names: Names
    ) -> None:
        if not optimizers:
            raise UnsupportedModule(problem="attach needs at least one optimizer")
        self.optimizers = list(optimizers)
        self.rules = [rule_of(optimizer) for optimizer in optimizers for _ in optimizer.param_groups]
        self.optimizer_of = [n for n, optimizer in enumerate(optimizers) for _ in optimizer.param_groups]
        self.settings = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.lists: list[list[Tensor]] = [list(group["params"]) for group in self.settings]
        check_distinct(parameter for tensors in self.lists for parameter in tensors)
        found, aliases = parameter_names(optimizers, module, names)
        for group in self.groups():
            check_values(group)
        messages, self.names = describe(self.lists, found, aliases)
        self.manifest = Manifest(groups=map(group_message, self.groups()), parameters=messages)
        self.states = self._states_by_name()

    def groups(self) -> list[Group]:
        """Return the param groups, in the model's order."""
        return [Group(*each) for each in zip(self.settings, self.rules, self.optimizer_of, strict=True)]

    @property
    def stepped(self) -> set[str]:
        """All names of the parameters, including aliases."""
        return {name for p in self.manifest.parameters for name in (p.name, *p.aliases)}

    @property
    def steps(self) -> list[int]:
        """The number of steps of each parameter, in the manifest's order; empty if no parameter was stepped."""
        if not self.states:
            return []
        return [int(self.states.get(p.name, {}).get("step", 0)) for p in self.manifest.parameters]

    def values(self, layout: Layout) -> dict[tuple[Slot, str], Tensor]:
        """Return the model's initial values by (slot, state name): parameters, and states of those that were stepped."""
        first = {
            name: tensor
            for names, tensors in zip(self.names, self.lists, strict=True)
            for name, tensor in zip(reversed(names), reversed(tensors), strict=True)
        }
        found: dict[tuple[Slot, str], Tensor] = {}
        for slot in layout.slots:
            found[slot, ""] = first[slot.name]
            for name in RULES[self.rules[slot.group]].state_names if slot.name in self.states else ():
                found[slot, name] = self.states[slot.name][name]
        return found

    def _states_by_name(self) -> dict[str, Mapping[str, Any]]:
        known = stepped_states(self.optimizers)
        found: dict[str, Mapping[str, Any]] = {}
        for index, (tensors, names) in enumerate(zip(self.lists, self.names, strict=True)):
            for parameter, name in zip(tensors, names, strict=True):
                state = known.get(parameter, {})
                check_state(state, RULES[self.rules[index]].state_names, parameter, name)
                if name in found and not _are_equal(found[name], state):
                    raise UnsupportedModule(
                        problem=f"{name!r} is one memory under several names, and they have different optimizer states: "
                        "attach before they are stepped"
                    )
                found[name] = state
        return {name: state for name, state in found.items() if state}


def describe(
    lists: Sequence[Sequence[Tensor]],
    names: Sequence[str],
    aliases: Sequence[Sequence[str]],
    first_group: int = 0,
) -> tuple[list[Parameter], list[list[str]]]:
    """Return the parameters of a manifest, and its name for each tensor of each group.

    `names` and `aliases` are in the order of the groups. Tensors that are the same view of one memory are one parameter;
    a warning names them. Raises InvalidManifest, UnsupportedModule or WrongDtype.
    """
    tensors = [tensor for group in lists for tensor in group]
    groups = [number for number, group in enumerate(lists, first_group) for _ in group]
    others = [list(each) for each in aliases]
    for name, tensor, more in zip(names, tensors, others, strict=True):
        for each in (name, *more):
            check_parameter_name(each)
        check_parameter(tensor, name)
    first_of = firsts(list(zip(names, tensors, strict=True)))
    for place, first in enumerate(first_of):
        if first != place:
            _check_tied(names[first], names[place], same_group=groups[first] == groups[place])
            others[first] += [names[place], *others[place]]
    messages = [
        parameter_message(names[place], tensor, groups[place], others[place])
        for place, tensor in enumerate(tensors)
        if first_of[place] == place
    ]
    called = iter(names[first] for first in first_of)
    return messages, [[next(called) for _ in group] for group in lists]


def _check_tied(one: str, other: str, *, same_group: bool) -> None:
    if not same_group:
        raise UnsupportedModule(
            problem=f"parameters {one!r} and {other!r} are one memory in two param groups: put them into one, or give each "
            "memory of its own"
        )
    warn(
        f"parameters {one!r} and {other!r} are one memory: they are stepped as one, by the sum of their gradients, like tied "
        "weights (torch would step the memory once for each)"
    )


def added_group(
    group: Group, index: int, module: nn.Module | None, known: Sequence[tuple[str, Tensor]]
) -> tuple[Manifest, list[str]]:
    """Return the manifest of an added group and its parameters' names, after the same checks as an attachment's."""
    names, aliases = added_names(group.settings, index, module)
    check_values(group)
    tensors = list(group.settings["params"])
    messages, (called,) = describe([tensors], names, aliases, index)
    named = [*known, *zip(called, tensors, strict=True)]
    for place, first in enumerate(firsts(named)):
        if first < len(known) <= place:
            raise UnsupportedModule(
                problem=f"parameter {named[place][0]!r} lies over the memory of {named[first][0]!r}, which the model has: "
                "give it memory of its own"
            )
    return Manifest(groups=[group_message(group)], parameters=messages), called


def check_values(group: Group) -> None:
    """Raise InvalidHyperparameter for a hyperparameter that is no number."""
    try:
        group.values()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidHyperparameter(
            problem=f"a hyperparameter of a param group is no number: {error}"
        ) from error


def check_state(state: Mapping[str, Any], names: Sequence[str], parameter: Tensor, name: str) -> None:
    """Raise UnsupportedModule or WrongShape if no model can begin with this optimizer state of a parameter."""
    for kind in names if state else ():
        value = state.get(kind)
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_complex():
            raise UnsupportedModule(
                problem=f"the optimizer's state of {name!r} has no {kind!r} that could be sent"
            )
        if value.shape != parameter.shape:
            raise WrongShape(
                what=f"state {kind!r} of {name!r}", got=tuple(value.shape), expected=tuple(parameter.shape)
            )


def _are_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if one.keys() != other.keys():
        return False
    return all(_is_same(one[key], other[key]) for key in one)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return same_bits(one, other)
    return bool(float(one) == float(other))
