"""Builds uploads: whole tensors for the server, each kind as a header and a body.

A push carries gradients and makes a step. An upload carries values, which replace what the server holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from safetensors.torch import save
from torch import Tensor

from pushstep.proto import training_pb2 as pb
from pushstep.proto.types_pb2 import Manifest
from pushstep.proto.wire.frames import Piece
from pushstep.proto.wire.layout import Layout, Slot

from ..gradients.body import values_body
from ..transport.streams import Body
from .member import Member

Values = Mapping[tuple[Slot, str], Tensor]
# The layout is that of the segments.
Upload = tuple[pb.UploadHeader, Body, Layout | None]


def creation(
    model: str,
    ticket: pb.CreationTicket,
    layout: Layout,
    values: Values,
    steps: Sequence[int],
    extras: Mapping[str, Tensor] | None = None,
) -> Upload:
    """The upload that creates the model, from the worker that got the ticket."""
    body = values_body(layout, values)
    file = _file(extras) if extras else None
    if file is not None:
        body = Body(body.segments, [*body.pieces, [file]])
    header = pb.UploadHeader(
        model=model,
        kind=pb.UPLOAD_KIND_CREATE,
        ticket=ticket.ticket,
        manifest=ticket.manifest,
        segments=body.segments,
        steps=steps,
        extras_bytes=0 if file is None else file.nbytes,
    )
    return header, body, layout


def parameters(model: str, member: Member, values: Values, fresh: Sequence[str]) -> Upload:
    """Parameter values, which become a version of their own; the state of `fresh` names starts anew."""
    body = values_body(member.layout, values)
    header = pb.UploadHeader(
        model=model,
        kind=pb.UPLOAD_KIND_PARAMETERS,
        identity=member.next_identity(),
        segments=body.segments,
        manifest_hash=member.layout.manifest_hash,
        fresh=[member.layout.slot(name, model).index for name in fresh],
    )
    return header, body, member.layout


def group(
    model: str, member: Member, added: Manifest, layout: Layout, values: Mapping[str, Tensor]
) -> Upload:
    """One new param group, its values by name; `layout` is the model's with the group."""
    body = values_body(layout, {(layout.slot(name, model), ""): value for name, value in values.items()})
    header = pb.UploadHeader(
        model=model,
        kind=pb.UPLOAD_KIND_GROUP,
        identity=member.next_identity(),
        manifest=added,
        segments=body.segments,
    )
    return header, body, layout


def state(model: str, member: Member, header: pb.UploadHeader, values: Values) -> Upload:
    """The optimizer state. Sets the model, identity, hash and segments of `header`."""
    body = values_body(member.layout, values)
    header.model = model
    header.identity.CopyFrom(member.next_identity())
    header.manifest_hash = member.layout.manifest_hash
    del header.segments[:]  # after a rejoin the same header is filled in again
    header.segments.extend(body.segments)
    return header, body, member.layout


def extras(model: str, member: Member, tensors: Mapping[str, Tensor], *, are_all: bool) -> Upload:
    """A module's buffers and frozen values, in safetensors; `are_all`: the server drops any others."""
    file = _file(tensors)
    header = pb.UploadHeader(
        model=model,
        kind=pb.UPLOAD_KIND_EXTRAS,
        identity=member.next_identity(),
        extras_bytes=file.nbytes,
        extras_all=are_all,
    )
    return header, Body((), [[file]]), None


def _file(tensors: Mapping[str, Tensor]) -> Piece:
    content = save(_apart(tensors))
    return Piece(torch.frombuffer(bytearray(content), dtype=torch.uint8), torch.uint8)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each in its own memory: safetensors refuses tensors that share memory."""
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        found[name] = flat.clone() if flat.untyped_storage().data_ptr() in storages else flat
        storages.add(found[name].untyped_storage().data_ptr())
    return found
