"""Builds a model's manifest, its groups and parameters, from what a worker holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pushstep.optim import RULES
from pushstep.optim.state_dict import tensor_of
from pushstep.proto.errors import InvalidManifest
from pushstep.proto.types_pb2 import Manifest, Parameter, ParamGroup
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.hyperparameters import wire_values
from pushstep.proto.wire.names import check_parameter_name

from .hyperparameters import Group


def parameter_message(name: str, parameter: Tensor, group: int, aliases: Sequence[str] = ()) -> Parameter:
    """Return a parameter's message, without its values. Raises WrongDtype for a dtype that has no place on the wire."""
    dtype = dtypes.to_wire(parameter.dtype, f"parameter {name!r}")
    return Parameter(name=name, shape=parameter.shape, dtype=dtype, group=group, aliases=aliases)


def group_message(group: Group) -> ParamGroup:
    """Return a param group's message, without its parameters."""
    values = wire_values(group.values())
    return ParamGroup(rule=group.rule, optimizer=group.optimizer, values=values)


def of_arrays(
    parameters: Mapping[str, Any], groups: Sequence[Mapping[str, Any]] | None
) -> tuple[Manifest, dict[str, Tensor]]:
    """Return the manifest of `Session.create`'s arguments, and the values as tensors by name.

    Raises InvalidManifest for a group without a known rule, a name that is not allowed, or a parameter that is not in
    exactly one group.
    """
    if groups is None:
        groups = [{"rule": "adadelta", "params": list(parameters)}]
    manifest = Manifest()
    values: dict[str, Tensor] = {}
    grouped = [name for group in groups for name in group.get("params", ())]
    if sorted(grouped) != sorted(parameters):
        differing = sorted(set(grouped) ^ set(parameters)) or sorted(grouped)
        raise InvalidManifest(
            problem=f"each parameter belongs to exactly one group; look at {', '.join(differing[:5])}"
        )
    for index, group in enumerate(groups):
        if group.get("rule") not in RULES:
            raise InvalidManifest(problem=f"group {index} needs a rule, one of {', '.join(RULES)}")
        settings = wire_values({k: v for k, v in group.items() if k not in ("rule", "params")})
        manifest.groups.append(ParamGroup(rule=group["rule"], optimizer=0, values=settings))
        for name in map(check_parameter_name, group["params"]):
            values[name] = tensor_of(parameters[name])
            manifest.parameters.append(parameter_message(name, values[name], index))
    return manifest, values
