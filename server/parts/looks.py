"""A look at one parameter: what is looked at of it, here, or of its pieces in all ranks, in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from pushstep.proto.errors import MalformedFrame
from pushstep.proto.shards_pb2 import RankContent
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Slot
from pushstep.proto.wire.shards import Part

from ..arenas.arena import Arenas
from ..arenas.rules import rule_of
from ..process.memory import copy_of
from .content import Content
from .gathered import Taking, require_version
from .shard import ModelShard

# A look copies them in the writer thread: 16 MB of each float32 state, some milliseconds.
LOOK_ELEMENTS: Final = 4 << 20
# Ranks' borders lie at multiples of it.
LOOK_BLOCK: Final = 1024
VALUE: Final = "value"


class Look(NamedTuple):
    """What was looked at of a parameter, or of a piece of it, at one version."""

    timeline: int
    version: int
    steps: int
    row_sparse: bool
    # the values and the states, flat
    tensors: dict[str, Tensor]


class _Places(NamedTuple):
    """Blocks of LOOK_BLOCK elements that lie `step` apart; with a step of 0, all elements."""

    begin: int
    blocks: int
    step: int

    @property
    def elements(self) -> int:
        return self.blocks * (LOOK_BLOCK if self.step else 1)


def _looked_at(start: int, stop: int, elements: int) -> _Places:
    """What is looked at of elements [start, stop) of a parameter with so many. `begin` counts from `start`."""
    every = -(-elements // LOOK_ELEMENTS)
    if every <= 1:
        return _Places(0, stop - start, 0)
    step = every * LOOK_BLOCK
    first, last = -(-start // step), min(elements // step, -(-stop // step))
    return _Places(first * step - start, max(0, last - first), step)


def look(arenas: Arenas, slot: Slot, start: int, elements: int) -> Look:
    """Copy what is looked at of a parameter here, which are the elements from `start` on of one with so many. OutOfMemory."""
    places = _looked_at(start, start + slot.stop - slot.start, elements)
    views = {VALUE: arenas.view(slot), **{name: arenas.view(slot, name) for name in arenas.state_names(slot)}}
    tensors = {}
    for name, view in views.items():
        flat = view.reshape(-1)
        if places.step and places.blocks:
            place = flat.storage_offset() + places.begin
            flat = flat.as_strided((places.blocks, LOOK_BLOCK), (places.step, 1), place)
        elif places.step:
            flat = flat[:0]
        tensors[name] = copy_of(flat, f"a look at {slot.name!r}").reshape(-1)
    steps, row_sparse = int(arenas.steps[slot.index]), slot.index in arenas.row_changes.versions
    return Look(arenas.timeline, arenas.version, steps, row_sparse, tensors)


def look_at_piece(arenas: Arenas, part: Part, whole: Slot) -> Look | None:
    """The same of a piece; None without one."""
    piece = part.by_whole.get(whole.index)
    if piece is None:
        return None
    return look(arenas, part.layout.slots[piece.index], piece.start, whole.stop - whole.start)


def content_of(found: Look | None, timeline: int, version: int) -> Content:
    """What a rank sends of it."""
    if found is None:
        return Content(timeline, version, ())
    facts = torch.tensor([found.steps, found.row_sparse], dtype=torch.int64, device="cpu")
    return Content(found.timeline, found.version, (facts, *found.tensors.values()))


class Looking:
    """A look at a parameter in all ranks."""

    def __init__(self, shard: ModelShard, slot: Slot) -> None:
        """`slot`: of the whole."""
        self._shard = shard
        self._slot = slot
        self._names = (VALUE, *rule_of(shard.whole, slot.group).state_names)
        self._memory: dict[int, _Memory] = {}
        self._taken: dict[int, Taking] = {}

    def taking(self, first: RankContent) -> Taking:
        """Take what a rank sends, of which this is the first message. MalformedFrame."""
        rank = int(first.rank)
        if rank not in self._shard.others or rank in self._taken:
            raise MalformedFrame(problem=f"rank {rank} has no part of this model, or sends it twice")
        memory = self._memory[rank] = _Memory(sum(self._lengths(rank)))
        self._taken[rank] = Taking(memory, _room_of(memory), (int(first.timeline), int(first.version)))
        return self._taken[rank]

    def _dtype(self, name: str) -> torch.dtype:
        return self._slot.dtype if name == VALUE else dtypes.state_dtype(self._slot.dtype)

    def _lengths(self, rank: int) -> list[int]:
        """The bytes of each tensor that a rank sends."""
        part = self._shard.parts[rank]
        piece = None if part is None else part.by_whole.get(self._slot.index)
        if piece is None:
            return []
        elements = _looked_at(piece.start, piece.stop, self._slot.stop - self._slot.start).elements
        return [2 * 8, *(elements * self._dtype(name).itemsize for name in self._names)]

    def whole(self, own: Look | None, at: tuple[int, int]) -> Look:
        """All of it, once all ranks have sent theirs. `own`: rank 0's piece. `at`: its timeline and version. VersionGone."""
        looks = [] if own is None else [own]
        for rank in self._shard.others:
            require_version(rank, self._taken.get(rank), at)
            content, lengths = self._memory[rank].content, self._lengths(rank)
            if lengths:
                facts, *tensors = torch.split(content, lengths)
                steps, row_sparse = facts.view(torch.int64).tolist()
                found = {
                    name: tensor.view(self._dtype(name))
                    for name, tensor in zip(self._names, tensors, strict=True)
                }
                looks.append(Look(*at, steps, bool(row_sparse), found))
        joined = {name: torch.cat([each.tensors[name] for each in looks]) for name in self._names}
        return Look(*at, looks[0].steps, any(each.row_sparse for each in looks), joined)


class _Memory:
    """Where what one rank sends of a look goes."""

    def __init__(self, size_bytes: int) -> None:
        self.content = torch.empty(size_bytes, dtype=torch.uint8, device="cpu")

    def write(self, content: memoryview, offset: int) -> None:
        """Take a stretch."""
        self.content.numpy().data[offset : offset + len(content)] = content


def _room_of(memory: _Memory) -> Iterator[tuple[int, int]]:
    if memory.content.numel():
        yield 0, memory.content.numel()
