"""Answers to pulls: the version that is sent, its header, and the messages that carry it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import torch

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import MapChanged
from pushstep.proto.types_pb2 import DType, Identity, Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.frames import Piece
from pushstep.proto.wire.parts import header_messages

from ..arenas.arena import Arenas
from ..arenas.arenas_copy import ArenasCopy
from ..arenas.extras import Extras
from ..arenas.publisher import Published
from ..journal.journal import Level
from ..models.model import Model
from ..parts.exact import ExactAnswer
from ..process.inline import INLINE_BYTES, INLINE_PARTS
from ..process.threads import PULLS
from ..shared_memory.answer import SharedAnswer
from ..shared_memory.regions import SharedMemory
from .join import fill_in


async def newest(
    model: Model, options: pb.PullOptions, timeline: int, shared: SharedAnswer | None = None
) -> Published:
    """The newest version: as frames, or in the worker's region if there is `shared`.

    The step of an exchange may have written it into the region already.
    """
    if shared is not None:
        published = shared.published or await shared.newest()
    else:
        published = await model.publisher.newest(
            timeline, have_version(options), wire_of(options.dtype), joined=options.joined_chunks
        )
    await model.recorder.until_shown(published.version)
    return published


def exact_answer(model: Model, options: pb.PullOptions, timeline: int) -> ExactAnswer:
    """The answer to an Exchange of a model in several ranks: the version that its own step makes."""
    wire = wire_of(options.dtype)
    return ExactAnswer(model.publisher, model.arenas, timeline, have_version(options), wire)


async def exactly_stepped(
    model: Model, answer: ExactAnswer, known_manifest: int
) -> tuple[Published, pb.PullHeader]:
    """What an Exchange is answered with once its push is resolved: its own step's version, or nothing, if it made none."""
    published = answer.published
    if published is None:
        nothing = Published(model.timeline, model.version, model.layout, False, [], None, None)
        header = header_of(model, nothing, [])
        header.apart = True
        return nothing, header
    return published, await published_header(model, published, known_manifest)


async def led(model: Model, options: pb.PullOptions, timeline: int) -> Published:
    """The newest version in rank 0, which the other ranks keep, too, for the same caller. OverBudget."""
    wire, have, leader = wire_of(options.dtype), have_version(options), model.executor.leader
    if leader is None:
        return await newest(model, options, timeline)
    loop, publisher, version = asyncio.get_running_loop(), model.publisher, model.version
    # both are queued in this turn of the event loop: behind the same ticket, here and there
    job = model.writer.submit(lambda: publisher.this_version(timeline, have, wire, loop))
    if not (have == version and timeline == model.timeline):
        leader.publish(timeline, version, options)
    published = await job
    if published is None:
        raise publisher.over()
    await model.recorder.until_shown(published.version)
    await leader.until(published.version, safe=model.recorder.level is Level.DURABLE)
    return published


def require_map(model: Model, version: int) -> None:
    """MapChanged if a caller knows other ranks than a model lies in; 0: it knows of none."""
    known = 0 if model.shard is None else model.shard.map.version
    if version != known:
        raise MapChanged(model=model.name)


def shared_answer(
    model: Model, memory: SharedMemory, options: pb.PullOptions, identity: Identity
) -> SharedAnswer | None:
    """The answer in the caller's region, if it names one that is its own."""
    region = memory.of(identity, options.region)
    if region is None:
        return None
    have = have_version(options)
    return SharedAnswer(model.name, model.arenas, model.writer, region, identity.timeline, have)


def have_version(options: pb.PullOptions) -> int | None:
    """The version that the caller holds; None if it holds none."""
    return options.have_version if options.HasField("have_version") else None


def wire_of(dtype: int) -> torch.dtype | None:
    """The torch dtype of an enum value; None means each parameter's own. UnsupportedFormat or WrongDtype."""
    return None if dtype == DType.DTYPE_UNSPECIFIED else dtypes.to_torch(dtype, "the answer asked for")


async def published_header(model: Model, published: Published, known_manifest: int) -> pb.PullHeader:
    """The header of an answer. It has the manifest unless its hash is `known_manifest`, the caller's."""
    header = header_of(model, published, published.segments)
    if header.manifest_hash != known_manifest:
        shard = model.shard
        await fill_in(header, published.layout if shard is None or shard.leader is None else shard.whole)
        if shard is not None:
            header.shards.CopyFrom(shard.map)
    header.unchanged = published.unchanged
    header.shared = published.shared
    return header


async def published_messages(published: Published, header: pb.PullHeader) -> AsyncGenerator[bytes, None]:
    """An answer's messages: the header, then the frames as they are encoded."""
    ready = await ready_messages(published, header)
    for message in ready:
        yield message
    if not ready:
        *parts, first = await header_frames(header)
        for part in parts:
            yield part
        async for frame in published.frames():
            for message in joined(first, frame):
                yield message
            first = b""
        if first:
            yield first


async def ready_messages(published: Published, header: pb.PullHeader) -> Sequence[bytes]:
    """The same at once, if nothing of it is still to be encoded; nothing otherwise."""
    frames = published.made()
    if frames is None:
        return ()
    *parts, first = await header_frames(header)
    return [*parts, *joined(first, frames[0]), *frames[1:]] if frames else [*parts, first]


def joined(header: bytes, frame: bytes) -> Sequence[bytes]:
    """A header and the frame behind it: one message if the frame is small.

    Two serialised protobuf messages, one after the other, parse as one.
    """
    if not header or len(frame) <= INLINE_BYTES:
        return (header + frame,)
    return header, frame


async def header_frames(header: pb.PullHeader) -> list[bytes]:
    """The messages that carry an answer's header."""
    if len(header.segments) + len(header.manifest.parameters) <= INLINE_PARTS:
        return list(header_messages(pb.PullResponse(header=header)))
    return await PULLS.run(lambda: list(header_messages(pb.PullResponse(header=header))))


def state_header(model: Model, copy: ArenasCopy, segments: list[Segment]) -> pb.PullHeader:
    """The header of a PullState answer, without the groups."""
    header = header_of(model, copy, segments)
    header.steps.extend(copy.steps)
    shard = model.shard
    if shard is None:
        header.manifest.CopyFrom(copy.layout.manifest)
    elif shard.leader is not None:  # the others' parts are asked for by this map
        header.manifest.CopyFrom(shard.whole.manifest)
        header.shards.CopyFrom(shard.map)
    return header


def header_of(model: Model, at: Arenas | ArenasCopy | Published, segments: list[Segment]) -> pb.PullHeader:
    """What every answer says: model, timeline, version, segments, and the layout that `at` was read with."""
    return pb.PullHeader(
        model_uid=model.uid,
        timeline=at.timeline,
        version=at.version,
        segments=segments,
        manifest_hash=at.layout.manifest_hash,
    )


def extras_header(model: Model, extras: Extras, file_bytes: int) -> pb.PullHeader:
    """The header of a PullExtras answer: the buffers, in a safetensors file of `file_bytes` bytes."""
    return pb.PullHeader(
        model_uid=model.uid,
        timeline=model.timeline,
        version=model.version,
        extras_version=extras.version,
        extras_bytes=file_bytes,
    )


def state_bodies(copy: ArenasCopy) -> tuple[list[Segment], list[list[Piece]]]:
    """Parameters and optimizer state of a whole model: the segments, and the pieces of each."""
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
