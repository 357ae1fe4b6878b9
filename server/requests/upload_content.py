"""Checks on an upload: that it declares what its kind needs; its buffers, optimizer state, dtypes."""

from __future__ import annotations

import torch

from pushstep.proto.errors import InvalidManifest, MalformedFrame, WrongDtype, WrongLength
from pushstep.proto.training_pb2 import (
    UPLOAD_KIND_CREATE,
    UPLOAD_KIND_EXTRAS,
    UPLOAD_KIND_GROUP,
    UploadHeader,
)
from pushstep.proto.types_pb2 import Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.frames import Assembly
from pushstep.proto.wire.layout import Layout

from ..coordinator.groups import Group
from ..staging.inspect import is_accumulated, require_accumulated
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


def check_complete(layout: Layout, header: UploadHeader) -> None:
    """Raise a named error unless a header declares all that its kind needs, and nothing else."""
    kind = header.kind
    if header.steps and len(header.steps) != len(layout.slots):
        raise WrongLength(what="steps", got=len(header.steps), expected=len(layout.slots))
    covered = {slot.index for s in header.segments if not s.state for slot in layout.slots_of(s)}
    if kind == UPLOAD_KIND_CREATE:
        wanted = {slot.index for slot in layout.slots if slot.stop > slot.start}
        if covered != wanted:
            missing = [layout.slots[i].name for i in sorted(wanted - covered)][:5]
            raise InvalidManifest(problem=f"the upload lacks the values of {', '.join(missing)}")
    if kind == UPLOAD_KIND_GROUP:
        added = {s.index for s in layout.slots if s.group == len(layout.manifest.groups) - 1}
        held = {s.index for s in layout.slots if s.index in added and s.stop > s.start}
        if covered != held or any(segment.state for segment in header.segments):
            raise InvalidManifest(
                problem="the upload must carry the values of the added group, all and no others"
            )
    if kind == UPLOAD_KIND_EXTRAS and (header.segments or not header.extras_bytes):
        raise MalformedFrame(problem="an extras upload carries one safetensors file and no segments")
    if any(index >= len(layout.slots) for index in header.fresh):
        raise MalformedFrame(
            problem=f"there is no parameter {max(header.fresh)} whose state could begin anew"
        )


def check_state(layout: Layout, header: UploadHeader, body: Assembly) -> None:
    """Raise InvalidState unless steps can have left this state: all values finite, none negative.

    One NaN or -1 would spoil every later step.
    """
    for index, segment in enumerate(header.segments):
        if not segment.state:
            continue
        values = body.part(index, dtypes.to_torch(segment.dtype, "segment"))
        if is_accumulated(values):
            continue
        for slot in layout.slots_of(segment):
            own = values[slot.start - segment.start : slot.stop - segment.start]
            require_accumulated(own, segment.state, slot.name)
