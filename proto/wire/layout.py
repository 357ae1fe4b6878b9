"""Where each parameter of a model lies: its slot in a flat arena; and which segments are legal.

An arena holds the parameters of one param group and one dtype back to back, in manifest order and without
padding, so a whole group's gradient is one segment and one kernel call. The manifest hash covers what two workers
must agree on: names, shapes, dtypes, order, groups and their rules.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, cast

import torch
import xxhash

from ..errors import InvalidManifest, MalformedFrame, UnknownParameter
from ..types_pb2 import Arena, DType, Manifest, Parameter, ParamGroup, Segment
from . import dtypes
from .limits import limit_of
from .names import MAX_NAME_BYTES, check_names

ID_BYTES: Final = 8
INDEX_BYTES: Final = 4
# The .proto's limits, for code that makes a manifest.
MAX_PARAMETERS: Final = limit_of(Manifest, "parameters").count
MAX_GROUPS: Final = limit_of(Manifest, "groups").count
MAX_DIMENSIONS: Final = limit_of(Parameter, "shape").count
# Elements of all parameters together.
MAX_ELEMENTS: Final = 1 << 48
# The most elements of a segment whose indices are uint32.
MAX_INDEXED: Final = 1 << 32
INT8_UNPACKED: Final = torch.float32
# How many parameters of segments are cached, as a multiple of all parameters. Those of further segments are looked up each time.
COVERED_KEPT: Final = 8


@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter and its place: elements [start, stop) of its arena."""

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int
    arena: int
    start: int
    stop: int
    aliases: tuple[str, ...]
    # of a piece of a parameter (shards.py): the whole parameter's rows, and the piece's first row; whole_rows 0: no piece
    whole_rows: int = 0
    first_row: int = 0

    def __hash__(self) -> int:
        """The index alone: each push hashes its slots."""
        return self.index

    @property
    def rows(self) -> int:
        """Length of the first dimension. A scalar has no rows: 0."""
        return self.shape[0] if self.shape else 0

    @property
    def row_elements(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class ArenaSpec:
    """One arena's group, dtype, length in elements and the slots in it, in order."""

    index: int
    group: int
    dtype: torch.dtype
    elements: int
    slots: tuple[Slot, ...]


class Layout:
    """A manifest with every place filled in. Immutable; a changed manifest is another Layout."""

    def __init__(self, manifest: Manifest) -> None:
        """Arrange a copy of `manifest` and set its places. InvalidManifest if it contradicts itself."""
        self.manifest = Manifest()
        self.manifest.CopyFrom(manifest)
        self.slots, self.arenas = _arranged(self.manifest)
        self.by_name = {slot.name: slot for slot in self.slots}
        self._by_alias = {alias: slot for slot in self.slots if slot.aliases for alias in slot.aliases}
        self.manifest_hash = _hash(self.slots, self.manifest.groups)
        # length of the serialized manifest
        self.manifest_bytes = self.manifest.ByteSize()
        # what tied weights add to a checkpoint, which holds them under each of their names
        self.alias_bytes = sum(
            (slot.stop - slot.start) * slot.dtype.itemsize for slot in self._by_alias.values()
        )
        self.first_of_group = {slot.group: slot for slot in reversed(self.slots)}
        self.arenas_of_group = {group: list[ArenaSpec]() for group in range(len(self.manifest.groups))}
        for arena in self.arenas:
            self.arenas_of_group[arena.group].append(arena)
        self._whole: dict[torch.dtype | None, list[tuple[Segment, list[Slot]]]] = {}
        # by arena, start and stop; cached since every push of a worker has the same segments
        self._covered: dict[tuple[int, int, int], list[Slot]] = {}
        self._may_cover = COVERED_KEPT * len(self.slots)
        # by arena: the slots that have elements, and their borders (each start, and the last stop)
        self._held = [[slot for slot in arena.slots if slot.stop > slot.start] for arena in self.arenas]
        self._borders = [
            [*(slot.start for slot in held), held[-1].stop if held else 0] for held in self._held
        ]

    @cached_property
    def rows(self) -> int:
        """Rows of all parameters together."""
        return sum(slot.rows for slot in self.slots)

    def slot(self, name: str, model: str) -> Slot:
        """The slot of a parameter by name or alias. UnknownParameter if there is none."""
        found = self.by_name.get(name) or self._by_alias.get(name)
        if found is None:
            raise UnknownParameter(model=model, parameter=name)
        return found

    def slots_of(self, segment: Segment) -> list[Slot]:
        """The parameters that a segment covers whole. MalformedFrame if its borders are not theirs.

        A parameter without elements is covered only by a segment of its own, which names it.
        """
        if segment.HasField("parameter"):
            return [self._empty_slot(segment)]
        place = segment.arena, segment.start, segment.stop
        covered = self._covered.get(place)
        if covered is None:
            covered = self._cover(segment)
            if len(covered) <= self._may_cover:
                self._may_cover -= len(covered)
                self._covered[place] = covered
        if segment.HasField("rows") and (len(covered) != 1 or not covered[0].shape):
            raise MalformedFrame(problem="a row-sparse segment must be exactly one parameter that has rows")
        if segment.HasField("elements"):
            self._check_elements(segment)
        return covered

    def _cover(self, segment: Segment) -> list[Slot]:
        if segment.arena >= len(self.arenas):
            raise MalformedFrame(problem=f"segment names arena {segment.arena} of {len(self.arenas)}")
        borders = self._borders[segment.arena]
        places = [bisect_left(borders, border) for border in (segment.start, segment.stop)]
        are_borders = max(places) < len(borders) and [borders[at] for at in places] == [
            segment.start,
            segment.stop,
        ]
        covered = self._held[segment.arena][places[0] : places[1]] if are_borders else []
        if not covered:
            raise MalformedFrame(
                problem=f"segment [{segment.start}, {segment.stop}) of arena {segment.arena} does not lie on "
                "parameter borders"
            )
        return covered

    def _empty_slot(self, segment: Segment) -> Slot:
        slot = self.slots[segment.parameter] if segment.parameter < len(self.slots) else None
        place = segment.arena, segment.start, segment.stop
        if slot is None or slot.start != slot.stop or place != (slot.arena, slot.start, slot.stop):
            raise MalformedFrame(
                problem=f"a segment names parameter {segment.parameter}, and no parameter without elements has this "
                "index and place"
            )
        if segment.HasField("rows") or segment.HasField("elements"):
            raise MalformedFrame(
                problem=f"the segment of {slot.name!r}, which has no elements, must not be sparse"
            )
        return slot

    def _check_elements(self, segment: Segment) -> None:
        length = segment.stop - segment.start
        if segment.HasField("rows"):
            raise MalformedFrame(problem="a segment is row-sparse or element-sparse, not both")
        if length > MAX_INDEXED or segment.elements > length:
            raise MalformedFrame(
                problem=f"an element-sparse segment of {length} elements cannot name {segment.elements} of them; "
                f"it is at most {MAX_INDEXED} long"
            )
        dtypes.to_torch(segment.dtype, "values of an element-sparse segment")

    def segment_bytes(self, segment: Segment, covered: Sequence[Slot] | None = None) -> int:
        """Payload bytes of a legal segment. covered: what `slots_of` says of it, if that is known."""
        dtype = dtypes.of_push(segment.dtype, "segment")
        quantised = dtype is torch.int8
        if segment.HasField("elements"):
            return int(segment.elements) * (INDEX_BYTES + dtype.itemsize)
        if segment.HasField("rows"):
            width = (covered or self.slots_of(segment))[0].row_elements
            row_bytes = dtypes.int8_bytes(width) if quantised else width * dtype.itemsize
            return int(segment.rows) * (ID_BYTES + row_bytes)
        if quantised:
            return sum(
                dtypes.int8_bytes(slot.stop - slot.start) for slot in covered or self.slots_of(segment)
            )
        return int(segment.stop - segment.start) * dtype.itemsize

    def unpacked_bytes(self, segment: Segment) -> int:
        """Bytes that a legal segment of a push takes in memory beside its payload, once it is unpacked."""
        if segment.HasField("elements"):
            return int(segment.stop - segment.start) * dtypes.to_torch(segment.dtype, "segment").itemsize
        if segment.dtype != dtypes.INT8:
            return 0
        if segment.HasField("rows"):
            return int(segment.rows) * self.slots_of(segment)[0].row_elements * INT8_UNPACKED.itemsize
        return int(segment.stop - segment.start) * INT8_UNPACKED.itemsize

    def whole(self, wire: torch.dtype | None) -> list[tuple[Segment, list[Slot]]]:
        """The dense segments of all parameters, made once per wire dtype. Callers must not change them."""
        if wire not in self._whole:
            self._whole[wire] = self.dense_segments(self.slots, wire)
        return self._whole[wire]

    def dense_segments(
        self,
        slots: Iterable[Slot],
        wire: torch.dtype | None = None,
        state: str = "",
        *,
        of_push: bool = False,
    ) -> list[tuple[Segment, list[Slot]]]:
        """The fewest dense segments that cover exactly `slots` (in manifest order), each with its slots.

        `wire` None sends each parameter in its own dtype, and each state in the state's. In a push, parameters without
        elements have segments of their own behind the others. Elsewhere they have none.
        """
        runs: list[list[Slot]] = []
        empty: list[Slot] = []
        for slot in sorted(slots, key=lambda slot: (slot.arena, slot.start, slot.index)):
            if slot.start == slot.stop:
                empty.append(slot)
                continue
            if runs and runs[-1][-1].arena == slot.arena and runs[-1][-1].stop == slot.start:
                runs[-1].append(slot)
            else:
                runs.append([slot])
        return [
            (
                Segment(
                    arena=run[0].arena,
                    start=run[0].start,
                    stop=run[-1].stop,
                    dtype=dtypes.to_push(
                        wire or (dtypes.state_dtype(run[0].dtype) if state else run[0].dtype), "segment"
                    ),
                    state=state,
                    parameter=run[0].index if run[0].start == run[0].stop else None,
                ),
                run,
            )
            for run in [*runs, *([slot] for slot in empty if of_push)]
        ]


def with_group(layout: Layout, added: Manifest) -> Layout:
    """The layout with one more group, or unchanged if its last group is that one already. InvalidManifest."""
    if len(added.groups) != 1 or not added.parameters:
        raise InvalidManifest(problem="add one param group with its parameters at a time")
    check_names(added)
    names = [parameter.name for parameter in added.parameters]
    last = len(layout.manifest.groups) - 1
    if [slot.name for slot in layout.slots if slot.group == last] == names:
        return layout
    manifest = Manifest()
    manifest.CopyFrom(layout.manifest)
    manifest.groups.append(added.groups[0])
    for parameter in added.parameters:
        manifest.parameters.append(parameter)
        manifest.parameters[-1].group = last + 1
    return Layout(manifest)


def _arranged(manifest: Manifest) -> tuple[tuple[Slot, ...], tuple[ArenaSpec, ...]]:
    """Every parameter's slot, and the arenas. Both are entered into the manifest, too.

    InvalidManifest if it contradicts itself. It takes one pass over the parameters: there may be a million.
    """
    del manifest.arenas[:]
    names: set[str] = set()
    slots: list[Slot] = []
    # by group and dtype: the arena's index, and the slots in it
    places: dict[tuple[int, int], tuple[int, list[Slot]]] = {}
    ends: list[int] = []
    total = 0
    groups = len(manifest.groups)
    _require_count(len(manifest.parameters), MAX_PARAMETERS, "parameters")
    _require_count(groups, MAX_GROUPS, "param groups")
    for index, parameter in enumerate(manifest.parameters):
        name, group, dtype = parameter.name, parameter.group, parameter.dtype
        aliases, shape = tuple(parameter.aliases), tuple(parameter.shape)
        _take_names(names, name, aliases)
        if group >= groups:
            raise InvalidManifest(problem=f"{name!r} is in group {group}, which does not exist")
        total += _room(shape, name)
        if total >= MAX_ELEMENTS:
            raise InvalidManifest(problem=f"{name!r} has an impossible shape")
        arena, inside = places.setdefault((group, dtype), (len(places), []))
        if not inside:
            dtypes.to_torch(dtype, f"parameter {name!r}")
            ends.append(0)
        start = ends[arena]
        ends[arena] = start + math.prod(shape)
        parameter.arena, parameter.offset = arena, start
        rows, first = parameter.whole_rows, parameter.first_row
        if (rows or first) and (not shape or first + shape[0] > rows):
            raise InvalidManifest(
                problem=f"the rows of {name!r} do not lie within the {rows} rows of the whole parameter"
            )
        slot = Slot(
            index, name, shape, dtypes.TORCH[dtype], group, arena, start, ends[arena], aliases, rows, first
        )
        inside.append(slot)
        slots.append(slot)
    arenas = []
    for (group, wire), (index, inside) in places.items():
        manifest.arenas.append(Arena(group=group, dtype=cast("DType", wire), elements=ends[index]))
        arenas.append(ArenaSpec(index, group, dtypes.TORCH[wire], ends[index], tuple(inside)))
    return tuple(slots), tuple(arenas)


def _require_count(got: int, most: int, what: str) -> None:
    if not got:
        raise InvalidManifest(problem=f"no {what}")
    if got > most:
        raise InvalidManifest(problem=f"more than {most} {what}")


def _take_names(names: set[str], name: str, aliases: tuple[str, ...]) -> None:
    for each in (name, *aliases):
        if not each or len(each) > MAX_NAME_BYTES or each in names:
            raise InvalidManifest(problem=f"parameter name {each[:100]!r} is empty, over-long or used twice")
        names.add(each)


def _room(shape: tuple[int, ...], name: str) -> int:
    """A parameter's elements, for the limit. A dimension of 0 counts as 1, because strides are made of the other lengths."""
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidManifest(problem=f"{name!r} has more than {MAX_DIMENSIONS} dimensions")
    return math.prod(shape) or math.prod(max(1, length) for length in shape)


def _hash(slots: Sequence[Slot], groups: Iterable[ParamGroup]) -> int:
    wire = {dtype: int(number) for dtype, number in dtypes.WIRE.items()}
    agreed = [
        [
            [
                s.name,
                s.shape,
                wire[s.dtype],
                s.group,
                s.aliases,
                *([s.whole_rows, s.first_row] if s.whole_rows else ()),
            ]
            for s in slots
        ],
        [[group.rule, group.optimizer] for group in groups],
    ]
    return xxhash.xxh3_64_intdigest(json.dumps(agreed, separators=(",", ":")).encode())
