"""Where each parameter of a model lies: its slot in a flat arena, and which segments are therefore legal.

An arena holds the parameters of one param group and one dtype back to back, in manifest order and without
padding, so a whole group's gradient is one segment and one kernel call. The manifest hash covers what two workers
must agree on: names, shapes, dtypes, order, groups and their rules.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import xxhash

from . import dtypes
from .errors import InvalidManifest, MalformedFrame, UnknownParameter, WrongDtype, WrongLength
from .names import MAX_NAME, check_name
from .types_pb2 import Arena, Manifest, Segment

ID_BYTES: Final = 8
INDEX_BYTES: Final = 4
MAX_PARAMETERS: Final = 1_000_000
MAX_DIMENSIONS: Final = 16
MAX_ELEMENTS: Final = 1 << 48
# The most elements of a segment whose indices are uint32.
MAX_INDEXED: Final = 1 << 32
INT8_UNPACKED: Final = torch.float32
# Which parameters a segment covers is remembered of so many different ones; the others are looked up each time.
PLACES_KEPT: Final = 4096


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

    @property
    def rows(self) -> int:
        """Length of the first dimension; 0 for a scalar, which has no rows."""
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
        """Arrange `manifest` (a copy is kept, with arenas and offsets set). InvalidManifest if it contradicts itself."""
        self.manifest = Manifest()
        self.manifest.CopyFrom(manifest)
        _check(self.manifest)
        _arrange(self.manifest)
        self.slots = tuple(_slot(index, self.manifest) for index in range(len(self.manifest.parameters)))
        self.arenas = tuple(
            ArenaSpec(
                index,
                arena.group,
                dtypes.to_torch(arena.dtype, f"arena {index}"),
                arena.elements,
                tuple(slot for slot in self.slots if slot.arena == index),
            )
            for index, arena in enumerate(self.manifest.arenas)
        )
        self.by_name = {slot.name: slot for slot in self.slots}
        self.manifest_hash = _hash(self.manifest)
        self.first_of_group = {slot.group: slot for slot in reversed(self.slots)}
        self._whole: dict[torch.dtype | None, list[tuple[Segment, list[Slot]]]] = {}
        # by arena, start and stop: every push of a worker has the same segments
        self._covered: dict[tuple[int, int, int], list[Slot]] = {}
        self._borders = [
            {slot.start: slot for slot in arena.slots if slot.stop > slot.start} for arena in self.arenas
        ]

    def slot(self, name: str, model: str) -> Slot:
        """The slot of a parameter by name or alias; UnknownParameter otherwise."""
        found = self.by_name.get(name) or next((s for s in self.slots if name in s.aliases), None)
        if found is None:
            raise UnknownParameter(model=model, parameter=name)
        return found

    def slots_of(self, segment: Segment) -> list[Slot]:
        """The parameters that a segment covers, whole. MalformedFrame if its borders are not theirs.

        Those without elements are in none but their own segment, which names them.
        """
        if segment.HasField("parameter"):
            return [self._empty_slot(segment)]
        place = segment.arena, segment.start, segment.stop
        covered = self._covered.get(place)
        if covered is None:
            covered = self._cover(segment)
            if len(self._covered) < PLACES_KEPT:
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
        covered = []
        at = segment.start
        while at < segment.stop and at in borders:
            covered.append(borders[at])
            at = borders[at].stop
        if at != segment.stop or not covered:
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
                problem=f"a segment names parameter {segment.parameter}, which is none without elements at its place"
            )
        if segment.HasField("rows") or segment.HasField("elements"):
            raise MalformedFrame(
                problem=f"the segment of {slot.name!r}, which has no elements, is not sparse"
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

    def segment_bytes(self, segment: Segment) -> int:
        """Payload bytes of a legal segment."""
        dtype = dtypes.of_push(segment.dtype, "segment")
        quantised = dtype == torch.int8
        if segment.HasField("elements"):
            return int(segment.elements) * (INDEX_BYTES + dtype.itemsize)
        if segment.HasField("rows"):
            width = self.slots_of(segment)[0].row_elements
            row_bytes = dtypes.int8_bytes(width) if quantised else width * dtype.itemsize
            return int(segment.rows) * (ID_BYTES + row_bytes)
        if quantised:
            return sum(dtypes.int8_bytes(slot.stop - slot.start) for slot in self.slots_of(segment))
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
        """The dense segments of all parameters, made once for each wire dtype: not to be written to."""
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

        `wire` None sends each parameter in its own dtype, and each state in the state's. Of a push, parameters
        without elements come behind the others; elsewhere there is nothing to say of them.
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


def check_body(
    layout: Layout, segments: Sequence[Segment], limit_bytes: int, *, of_push: bool = False
) -> list[int]:
    """The byte length of each segment; refuses overlaps and bodies over `limit_bytes` before anything is read.

    The limit is for what a push is unpacked to, too. int8 and element-sparse segments are pushes' alone.
    """
    seen: set[tuple[str, int]] = set()
    lengths = []
    for segment in segments:
        if not of_push:
            _check_plain(segment)
        for slot in layout.slots_of(segment):
            if (segment.state, slot.index) in seen:
                raise MalformedFrame(problem=f"parameter {slot.name!r} appears in two segments")
            seen.add((segment.state, slot.index))
        lengths.append(layout.segment_bytes(segment))
    total = sum(lengths) + (sum(map(layout.unpacked_bytes, segments)) if of_push else 0)
    if total > limit_bytes:
        raise WrongLength(what="the declared body", got=total, expected=f"at most {limit_bytes}")
    return lengths


def _check_plain(segment: Segment) -> None:
    if segment.HasField("elements") or segment.HasField("parameter"):
        raise MalformedFrame(problem="only a push may carry element-sparse or empty segments")
    if segment.dtype == dtypes.INT8:
        raise WrongDtype(
            what="segment", got="int8, which is for pushes", expected=", ".join(dtypes.NAMES.values())
        )


def with_group(layout: Layout, added: Manifest) -> Layout:
    """The layout with one further group, or unchanged if its last group is that one already."""
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


def check_names(manifest: Manifest) -> None:
    """InvalidManifest unless a new model may have these names; what is held already keeps its own."""
    for parameter in manifest.parameters:
        for name in (parameter.name, *parameter.aliases):
            check_name(name)


def _check(manifest: Manifest) -> None:
    names: set[str] = set()
    total = 0
    if not manifest.parameters:
        raise InvalidManifest(problem="no parameters")
    if len(manifest.parameters) > MAX_PARAMETERS:
        raise InvalidManifest(problem=f"more than {MAX_PARAMETERS} parameters")
    for parameter in manifest.parameters:
        for name in (parameter.name, *parameter.aliases):
            if not name or len(name) > MAX_NAME or name in names:
                raise InvalidManifest(
                    problem=f"parameter name {name[:100]!r} is empty, over-long or used twice"
                )
            names.add(name)
        if parameter.group >= len(manifest.groups):
            raise InvalidManifest(
                problem=f"{parameter.name!r} is in group {parameter.group}, which does not exist"
            )
        # a length of 0 does not make the others harmless: they are somebody's strides
        total += math.prod(max(1, length) for length in parameter.shape)
        if len(parameter.shape) > MAX_DIMENSIONS or total >= MAX_ELEMENTS:
            raise InvalidManifest(problem=f"{parameter.name!r} has an impossible shape")
        dtypes.to_torch(parameter.dtype, f"parameter {parameter.name!r}")


def _arrange(manifest: Manifest) -> None:
    del manifest.arenas[:]
    index_of: dict[tuple[int, int], int] = {}
    for parameter in manifest.parameters:
        key = (parameter.group, parameter.dtype)
        if key not in index_of:
            index_of[key] = len(manifest.arenas)
            manifest.arenas.append(Arena(group=parameter.group, dtype=parameter.dtype, elements=0))
        parameter.arena = index_of[key]
        arena = manifest.arenas[parameter.arena]
        parameter.offset = arena.elements
        arena.elements += math.prod(parameter.shape)


def _slot(index: int, manifest: Manifest) -> Slot:
    parameter = manifest.parameters[index]
    shape = tuple(int(length) for length in parameter.shape)
    start = int(parameter.offset)
    return Slot(
        index,
        parameter.name,
        shape,
        dtypes.to_torch(parameter.dtype, f"parameter {parameter.name!r}"),
        int(parameter.group),
        int(parameter.arena),
        start,
        start + math.prod(shape),
        tuple(parameter.aliases),
    )


def _hash(manifest: Manifest) -> int:
    agreed = [
        [[p.name, list(p.shape), int(p.dtype), p.group, list(p.aliases)] for p in manifest.parameters],
        [[group.rule, group.optimizer] for group in manifest.groups],
    ]
    return xxhash.xxh3_64_intdigest(json.dumps(agreed, separators=(",", ":")).encode())
