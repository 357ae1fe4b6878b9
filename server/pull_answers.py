"""What pulls are answered with: which version, its header, and the messages that carry it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import torch

from pushstep.proto import dtypes
from pushstep.proto import training_pb2 as pb
from pushstep.proto.frames import Piece
from pushstep.proto.parts import header_messages
from pushstep.proto.types_pb2 import DType, Segment

from .arena import Arenas, ArenasCopy
from .extras import Extras
from .membership import fill_in
from .model import Model
from .publish import Published
from .shared_answer import SharedAnswer
from .staging import INLINE_BYTES
from .threads import INLINE_PARTS, PULLS


async def newest(
    model: Model, options: pb.PullOptions, timeline: int, shared: SharedAnswer | None = None
) -> Published:
    """The newest version, for a worker that is sent it or has a region of its own (`shared`)."""
    if shared is not None:
        return shared.published or await shared.newest()
    return await model.publisher.newest(timeline, have_version(options), wire_of(options.dtype))


def have_version(options: pb.PullOptions) -> int | None:
    """The version that the caller holds; None: none."""
    return options.have_version if options.HasField("have_version") else None


def wire_of(dtype: int) -> torch.dtype | None:
    """An enum's dtype; None for each parameter's own. UnsupportedFormat, WrongDtype."""
    return None if dtype == DType.DTYPE_UNSPECIFIED else dtypes.to_torch(dtype, "the answer asked for")


async def published_header(model: Model, published: Published, known_manifest: int) -> pb.PullHeader:
    """The header of an answer; with the manifest, unless the caller knows it."""
    header = header_of(model, published, published.segments)
    if header.manifest_hash != known_manifest:
        await fill_in(header, published.layout)
    header.unchanged = published.unchanged
    header.shared = published.shared
    return header


async def published_messages(published: Published, header: pb.PullHeader) -> AsyncIterator[bytes]:
    """An answer's messages: the header, and the frames as they are made."""
    *parts, first = await header_frames(header)
    for part in parts:
        yield part
    async for frame in published.frames():
        if first and len(frame) <= INLINE_BYTES:
            # one message instead of two: fields that follow each other are one message's
            frame = first + frame
            first = b""
        elif first:
            yield first
            first = b""
        yield frame
    if first:
        yield first


async def header_frames(header: pb.PullHeader) -> list[bytes]:
    """The messages that an answer's header goes in."""
    few = len(header.segments) + len(header.manifest.parameters) <= INLINE_PARTS
    return await PULLS.run_unless(few, lambda: list(header_messages(pb.PullResponse(header=header))))


def state_header(model: Model, copy: ArenasCopy, segments: list[Segment]) -> pb.PullHeader:
    """The header of a PullState's answer, but for the groups."""
    header = header_of(model, copy, segments)
    header.steps.extend(copy.steps)
    header.manifest.CopyFrom(copy.layout.manifest)
    return header


def header_of(model: Model, at: Arenas | ArenasCopy | Published, segments: list[Segment]) -> pb.PullHeader:
    """What every answer says: which version of which model it is, by the layout that it was read with."""
    return pb.PullHeader(
        model_uid=model.uid,
        timeline=at.timeline,
        version=at.version,
        segments=segments,
        manifest_hash=at.layout.manifest_hash,
    )


def extras_header(model: Model, extras: Extras, file_bytes: int) -> pb.PullHeader:
    """The header of what lies beside the parameters, in a file of this length."""
    return pb.PullHeader(
        model_uid=model.uid,
        timeline=model.timeline,
        version=model.version,
        extras_version=extras.version,
        extras_bytes=file_bytes,
    )


def state_bodies(copy: ArenasCopy) -> tuple[list[Segment], list[list[Piece]]]:
    """Parameters and optimizer state of a whole model: the segments, and what each is made of."""
    segments, bodies = [], []
    for arena in copy.layout.arenas:
        for state, flat in {"": copy.parameters[arena.index], **copy.states[arena.index]}.items():
            if arena.elements:
                dtype = dtypes.to_wire(flat.dtype, "segment")
                segments.append(
                    Segment(arena=arena.index, start=0, stop=arena.elements, dtype=dtype, state=state)
                )
                bodies.append([Piece(flat, flat.dtype)])
    return segments, bodies
