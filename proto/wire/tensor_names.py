"""What the tensors of a safetensors file are called, and what its metadata says of a model.

A parameter has its name; a tied weight has each of its names; buffers and frozen values have theirs. With the optimizer's
state, `optimizer.sum.weight` is the state `sum` of the parameter `weight`, and `optimizer.step.weight` its count of steps,
one int64. The metadata `pushstep.groups` holds the param groups as JSON, in order: `rule`, `optimizer`, the
hyperparameters, and `params`: names, or [name, alias, ...] for a tied weight. From such a file a server makes the same
model.
"""

from __future__ import annotations

from typing import Final

GROUPS: Final = "pushstep.groups"
STEP: Final = "step"
_PREFIX: Final = "optimizer."


def state_name(state: str, parameter: str) -> str:
    """The name of a parameter's state, or of its count of steps, in a file."""
    return f"{_PREFIX}{state}.{parameter}"


def state_of(name: str) -> tuple[str, str] | None:
    """The state and the parameter that a name in a file may stand for."""
    state, _, parameter = name.removeprefix(_PREFIX).partition(".")
    return (state, parameter) if name.startswith(_PREFIX) and parameter else None
