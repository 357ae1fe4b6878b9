"""Checks on the tensors of an upload: buffers, optimizer state, dtypes."""

from __future__ import annotations

import torch

from pushstep.proto.errors import MalformedFrame, WrongDtype
from pushstep.proto.types_pb2 import Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Layout

from ..coordinator.groups import Group
from ..storage.tensor_file import tensors_in


def extras_in(content: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file in staging, each copied to memory of its own. MalformedFrame."""
    try:
        return {name: tensor.clone() for name, tensor in tensors_in(content).items()}
    except ValueError as error:
        raise MalformedFrame(problem=f"the extras are no safetensors file: {error}") from error


def check_exact(layout: Layout, segment: Segment) -> None:
    """Raise WrongDtype unless a segment has the dtype of the values that it replaces.

    MalformedFrame for rows, and for a state that the group's rule does not have.
    """
    slots = layout.slots_of(segment)
    if segment.HasField("rows"):
        raise MalformedFrame(problem="an upload carries whole parameters, not rows")
    got = dtypes.to_torch(segment.dtype, "segment")
    held = layout.arenas[segment.arena].dtype
    expected = dtypes.state_dtype(held) if segment.state else held
    if got != expected:
        name = slots[0].name if slots else f"arena {segment.arena}"
        raise WrongDtype(what=f"{segment.state or 'value'} of {name!r}", got=got, expected=expected)
    if segment.state:
        group = layout.manifest.groups[layout.arenas[segment.arena].group]
        rule = Group.make(group).rule
        if segment.state not in rule.state_names:
            raise MalformedFrame(
                problem=f"rule {rule.name!r} has no state {segment.state[:50]!r}; it has {', '.join(rule.state_names)}"
            )
