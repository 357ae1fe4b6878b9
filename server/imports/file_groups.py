"""The manifest of a new model that is made of a file: its param groups say which tensors are parameters.

A group names its parameters, in the order that its workers have them, by name or by a pattern such as `encoder.*`.
Without `params` it has every tensor of a floating type that no other group names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import translate
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from pushstep.proto.errors import InvalidFile, InvalidHyperparameter, InvalidSettings
from pushstep.proto.types_pb2 import Manifest, Parameter, ParamGroup
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.hyperparameters import wire_values
from pushstep.proto.wire.layout import MAX_GROUPS
from pushstep.proto.wire.tensor_names import state_of

from ..coordinator.settings import problems

# Each is tried on every tensor.
MOST_PATTERNS: Final = 100
PROBLEMS_SHOWN: Final = 3
SHOWN: Final = 100
_WILD: Final = re.compile(r"[*?\[]")
_Names = Annotated[list[str], Field(min_length=1)]


class _Group(BaseModel):
    """One param group. What is not named here is a hyperparameter."""

    model_config = ConfigDict(strict=True, extra="allow")

    rule: Annotated[str, Field(max_length=100)]
    optimizer: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    # a list is one tied weight's names
    params: list[str | _Names] | None = None


_GROUPS: Final = TypeAdapter(Annotated[list[_Group], Field(min_length=1, max_length=MAX_GROUPS)])


def manifest_of(tensors: Mapping[str, Tensor], groups: str) -> Manifest:
    """The manifest of these groups, which are JSON. InvalidSettings, InvalidFile, InvalidHyperparameter, WrongDtype."""
    try:
        parsed = _GROUPS.validate_python(json.loads(groups))
    except ValidationError as error:
        found = problems(error.errors(), "groups", PROBLEMS_SHOWN)
        raise InvalidSettings(problem=f"groups: {found}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidSettings(problem="groups: they are not JSON") from error
    manifest = Manifest()
    for index, (group, params) in enumerate(zip(parsed, _chosen(tensors, parsed), strict=True)):
        values = wire_values({name: plain(name, value) for name, value in (group.model_extra or {}).items()})
        manifest.groups.append(ParamGroup(rule=group.rule, optimizer=group.optimizer, values=values))
        for name, *aliases in params:
            tensor = tensors[name]
            dtype = dtypes.to_wire(tensor.dtype, f"parameter {name[:SHOWN]!r}")
            manifest.parameters.append(
                Parameter(name=name, shape=tensor.shape, dtype=dtype, group=index, aliases=aliases)
            )
    return manifest


def plain(name: str, value: Any) -> float | bool:
    """A hyperparameter's value. InvalidHyperparameter if it is no number and no flag."""
    try:
        if isinstance(value, (bool, int, float)):
            return value if isinstance(value, bool) else float(value)
    except OverflowError:
        pass
    raise InvalidHyperparameter(problem=f"{name[:SHOWN]} must be a number or true or false")


def _chosen(tensors: Mapping[str, Tensor], groups: Sequence[_Group]) -> list[list[list[str]]]:
    """The names of each parameter of each group."""
    left = dict.fromkeys(tensors)
    patterns = 0
    for group in groups:
        for entry in group.params or ():
            if _is_pattern(entry, tensors):
                patterns += 1
                continue
            for name in _names(entry):
                if name not in tensors:
                    raise InvalidFile(problem=f"it has no tensor {name[:SHOWN]!r}, which a group names")
                if name not in left:
                    raise InvalidFile(problem=f"{name[:SHOWN]!r} is named twice in its groups")
                del left[name]
    left = dict.fromkeys(name for name in left if not _is_state(name, tensors))
    if patterns > MOST_PATTERNS:
        raise InvalidSettings(problem=f"groups: at most {MOST_PATTERNS} patterns, not {patterns}")
    named = [[_found(entry, tensors, left) for entry in group.params or ()] for group in groups]
    rest = [[name] for name in left if tensors[name].dtype in dtypes.WIRE]
    chosen = []
    for group, found in zip(groups, named, strict=True):
        chosen.append(rest if group.params is None else [names for entry in found for names in entry])
        rest = [] if group.params is None else rest
    return chosen


def _found(entry: str | list[str], tensors: Mapping[str, Tensor], left: dict[str, None]) -> list[list[str]]:
    """The parameters that an entry stands for. Those of a pattern are taken from `left`."""
    if not isinstance(entry, str) or not _is_pattern(entry, tensors):
        return [_names(entry)]
    matches = re.compile(translate(entry)).match
    found = [name for name in left if matches(name)]
    if not found:
        raise InvalidFile(problem=f"{entry[:SHOWN]!r} matches no tensor that is left")
    for name in found:
        del left[name]
    return [[name] for name in found]


def _names(entry: str | list[str]) -> list[str]:
    return [entry] if isinstance(entry, str) else entry


def _is_pattern(entry: str | list[str], tensors: Mapping[str, Tensor]) -> bool:
    return isinstance(entry, str) and entry not in tensors and _WILD.search(entry) is not None


def _is_state(name: str, tensors: Mapping[str, Tensor]) -> bool:
    known = state_of(name)
    return known is not None and known[1] in tensors
