"""What a rank has of a model, as one run of bytes: both sides work out from the whole layout what lies where in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import torch
import xxhash
from torch import Tensor

from pushstep.proto.shards_pb2 import RankContent
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Layout
from pushstep.proto.wire.shards import Part

from ..arenas.arenas_copy import ArenasCopy
from ..arenas.rules import rule_of

STEP_BYTES: Final = 8
CHUNK_BYTES: Final = 1 << 20


class Wanted(NamedTuple):
    """What is sent beside the parameters."""

    state: bool
    # by hook, the groups that it averages
    averages: Mapping[str, Sequence[int]]


class Run(NamedTuple):
    """Neighbouring elements of a part, which are neighbours in the whole, too."""

    arena: int
    start: int
    whole_arena: int
    whole_start: int
    elements: int


class Kind(NamedTuple):
    """One of the tensors that an arena has: the parameters, one of their states, or a hook's average."""

    state: str
    average: str
    dtype: torch.dtype


def runs_of(part: Part, whole: Layout) -> list[Run]:
    """All elements of a part, arena by arena."""
    runs: dict[int, list[Run]] = {}
    for piece, slot in zip(part.pieces, part.layout.slots, strict=True):
        there = whole.slots[piece.whole]
        run = Run(slot.arena, slot.start, there.arena, there.start + piece.start, piece.stop - piece.start)
        known = runs.setdefault(slot.arena, [])
        before = known[-1] if known else None
        if before is not None and before.whole_start + before.elements == run.whole_start:
            known[-1] = before._replace(elements=before.elements + run.elements)
        else:
            known.append(run)
    return [run for arena in sorted(runs) for run in runs[arena] if run.elements]


def kinds_of(layout: Layout, arena: int, wanted: Wanted) -> list[Kind]:
    """The tensors of an arena, in the order in which they are sent."""
    spec = layout.arenas[arena]
    state = dtypes.state_dtype(spec.dtype)
    return [
        Kind("", "", spec.dtype),
        *(Kind(name, "", state) for name in rule_of(layout, spec.group).state_names if wanted.state),
        *(Kind("", hook, state) for hook, groups in wanted.averages.items() if spec.group in groups),
    ]


def tensors_of(copy: ArenasCopy, part: Part, whole: Layout, wanted: Wanted) -> Iterator[Tensor]:
    """All that a part has, in the order in which it is sent."""
    yield torch.tensor(copy.steps, dtype=torch.int64, device="cpu")
    for run in runs_of(part, whole):
        for kind in kinds_of(whole, run.whole_arena, wanted):
            parameters = copy.parameters[run.arena]
            if kind.state:
                flat = copy.states[run.arena][kind.state]
            elif kind.average:
                # until the next ticket only rank 0 may know of a new hook, whose average begins with the parameters
                flat = copy.averages.get(kind.average, {}).get(run.arena, parameters)
            else:
                flat = parameters
            yield flat[run.start : run.start + run.elements].to(kind.dtype)


class Content(NamedTuple):
    """What a rank sends, all of one version."""

    timeline: int
    version: int
    tensors: Iterable[Tensor]


def messages_of(rank: int, order: int, content: Content) -> Iterator[bytes]:
    """The messages that carry it, with its digest in the last one."""
    digest = xxhash.xxh3_64()
    message = RankContent(rank=rank, order=order, timeline=content.timeline, version=content.version)
    for chunk in _chunks(content.tensors):
        digest.update(chunk)
        message.content = chunk
        yield message.SerializeToString()
        message = RankContent()
    message.digest = digest_of(digest)
    yield message.SerializeToString()


def digest_of(content: xxhash.xxh3_64) -> int:
    """The digest of what was sent. 0 stands for none."""
    return content.intdigest() or 1


def _chunks(tensors: Iterable[Tensor]) -> Iterator[bytes]:
    """Their bytes in chunks, of which all but the last are equally long."""
    waiting = bytearray()
    for tensor in tensors:
        rest = tensor.view(torch.uint8).numpy().data
        while len(rest):
            room = CHUNK_BYTES - len(waiting)
            waiting += rest[:room]
            rest = rest[room:]
            if len(waiting) == CHUNK_BYTES:
                yield bytes(waiting)
                waiting.clear()
    if waiting:
        yield bytes(waiting)
