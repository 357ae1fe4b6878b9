"""Whole tensors on their way to the server: each kind of upload, as a header and a body.

A push carries gradients and makes a step; these carry values, and put them in the place of what the server holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from safetensors.torch import save
from torch import Tensor

from pushstep.proto import training_pb2 as pb
from pushstep.proto.frames import Piece
from pushstep.proto.layout import Layout, Slot
from pushstep.proto.types_pb2 import Manifest

from .gradients import values_body
from .membership import Member
from .transport import Body

Values = Mapping[tuple[Slot, str], Tensor]
Upload = tuple[pb.UploadHeader, Body]


def creation(
    model: str, ticket: pb.CreationTicket, layout: Layout, values: Values, steps: Sequence[int]
) -> Upload:
    """The model itself, from the worker that was given the ticket."""
    body = values_body(layout, values)
    header = pb.UploadHeader(
        model=model,
        kind=pb.UPLOAD_KIND_CREATE,
        ticket=ticket.ticket,
        manifest=ticket.manifest,
        segments=body.segments,
        steps=steps,
    )
    return header, body


def parameters(model: str, member: Member, values: Values) -> Upload:
    """Parameter values, which become a version of their own."""
    body = values_body(member.layout, values)
    header = pb.UploadHeader(
        model=model,
        kind=pb.UPLOAD_KIND_PARAMETERS,
        identity=member.next_identity(),
        segments=body.segments,
        manifest_hash=member.layout.manifest_hash,
    )
    return header, body


def group(
    model: str, member: Member, added: Manifest, layout: Layout, values: Mapping[str, Tensor]
) -> Upload:
    """One param group more, by name; `layout` is the model's with it."""
    body = values_body(layout, {(layout.slot(name, model), ""): value for name, value in values.items()})
    header = pb.UploadHeader(
        model=model,
        kind=pb.UPLOAD_KIND_GROUP,
        identity=member.next_identity(),
        manifest=added,
        segments=body.segments,
    )
    return header, body


def state(model: str, member: Member, header: pb.UploadHeader, values: Values) -> Upload:
    """The optimizer state; `header` lacks only who sends it and what it carries."""
    body = values_body(member.layout, values)
    header.model = model
    header.identity.CopyFrom(member.next_identity())
    header.manifest_hash = member.layout.manifest_hash
    del header.segments[:]  # it may be made again, of another membership
    header.segments.extend(body.segments)
    return header, body


def extras(model: str, member: Member, tensors: Mapping[str, Tensor]) -> Upload:
    """A module's buffers and frozen values, as safetensors."""
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    header = pb.UploadHeader(
        model=model,
        kind=pb.UPLOAD_KIND_EXTRAS,
        identity=member.next_identity(),
        extras_bytes=len(content),
    )
    piece = Piece(torch.frombuffer(bytearray(content), dtype=torch.uint8), torch.uint8)
    return header, Body((), [[piece]])
