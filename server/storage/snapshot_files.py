"""The files of a snapshot: whole arenas, or what has changed since another snapshot.

A link is an incremental snapshot. It holds all dense parameters with their states. Of each table (a parameter with
row-sparse gradients) it holds the changed rows and their ids. A reader lays it over the snapshot before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from pushstep.proto.wire.layout import ID_BYTES, Layout

from ..arenas.arenas_copy import ArenasCopy
from ..captures.capture import Capture
from ..pacing.pace import Pace
from ..pacing.slices import PAGE_BYTES, SLICE_BYTES, SlicedFile
from .snapshot_manifest import arena_file, rows_file
from .tensor_file import DIGEST, aligned_first, header_of

IDS: Final = "ids"
# The ids of the changed rows of tables, by slot.
Rows = Mapping[int, Tensor]


def whole_bytes(content: Capture) -> int:
    """About how many bytes a whole snapshot takes."""
    held = (arena.elements * content.element_bytes(arena.index) for arena in content.layout.arenas)
    return sum(held) + content.extras_bytes


def link_bytes(content: Capture, rows: Rows) -> int:
    """About how many bytes a link takes."""
    arenas = range(len(content.layout.arenas))
    total = sum(content.dense_elements(index) * content.element_bytes(index) for index in arenas)
    for index, ids in rows.items():
        slot = content.layout.slots[index]
        total += ids.numel() * (ID_BYTES + slot.row_elements * content.element_bytes(slot.arena))
    return total + content.extras_bytes


def write_arenas(folder: Path, content: Capture, rows: Rows | None, pace: Pace) -> list[dict[str, Any]]:
    """Write the arenas' files, of a whole snapshot if `rows` is None, else of a link.

    Returns their entries in the manifest. Raises OSError.
    """
    written, of_rows = [], []
    for arena in content.layout.arenas:
        index = arena.index
        place = {"arena": index, "group": arena.group, "start": 0, "stop": arena.elements}
        path = folder / arena_file(index)
        written.append({**place, **_write_arena(path, content, index, pace, whole=rows is None)})
        here = {slot: ids for slot, ids in (rows or {}).items() if content.layout.slots[slot].arena == index}
        if here:
            of_rows.append({**place, **_write_rows(folder / rows_file(index), content, here, pace)})
    return written + of_rows


def _write_arena(path: Path, content: Capture, index: int, pace: Pace, *, whole: bool) -> dict[str, Any]:
    elements = content.layout.arenas[index].elements if whole else content.dense_elements(index)
    read = content.whole if whole else content.dense
    tensors = {
        name: _Part(content.dtype(index, name), (elements,), partial(read, index, name))
        for name in content.names(index)
    }
    return _write(path, tensors, pace)


def _write_rows(path: Path, content: Capture, rows: Rows, pace: Pace) -> dict[str, Any]:
    tensors = {}
    for index, ids in rows.items():
        tensors[f"{index}.{IDS}"] = _Part(torch.int64, (ids.numel(),), partial(_one, ids))
    for index, ids in rows.items():
        slot = content.layout.slots[index]
        for name in content.names(slot.arena):
            shape = (ids.numel(), slot.row_elements)
            read = partial(content.rows, index, name, ids)
            tensors[f"{index}.{name}"] = _Part(content.dtype(slot.arena, name), shape, read)
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    return _write(path, {name: tensors[name] for name in order}, pace)


def write_extras(path: Path, extras: Mapping[str, Tensor], pace: Pace) -> dict[str, Any]:
    """Write the buffers and frozen values. Returns the file's entry in the manifest. OSError."""
    tensors = {name: extras[name] for name in aligned_first(extras)}
    parts = {name: _Part(t.dtype, tuple(t.shape), partial(_one, t)) for name, t in tensors.items()}
    return _write(path, parts, pace)


class _Part(NamedTuple):
    """A tensor of a file that is to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Iterator[Tensor]]


def _one(tensor: Tensor) -> Iterator[Tensor]:
    yield tensor


def _write(path: Path, parts: Mapping[str, _Part], pace: Pace) -> dict[str, Any]:
    shapes = {name: (part.dtype, part.shape) for name, part in parts.items()}
    header, size_bytes = header_of(shapes)
    if size_bytes >= SLICE_BYTES:
        header, size_bytes = header_of(shapes, alignment=PAGE_BYTES)
    with SlicedFile(path, size_bytes, pace) as file:
        file.append(header)
        for part in parts.values():
            for tensor in part.read():
                file.append(tensor)
        return {"file": path.name, "bytes": size_bytes, DIGEST: file.finish()}


def dense_spans(layout: Layout, index: int, tables: list[int]) -> list[tuple[int, int]]:
    """The elements of an arena that are of none of these tables, in order."""
    spans, at = [], 0
    for slot in sorted((layout.slots[table] for table in tables), key=lambda slot: slot.start):
        if slot.arena == index and slot.start < slot.stop:
            spans.append((at, slot.start))
            at = slot.stop
    return [*((a, b) for a, b in spans if a < b), *_last(at, layout.arenas[index].elements)]


def _last(at: int, end: int) -> list[tuple[int, int]]:
    return [(at, end)] if at < end else []


def lay_dense(copy: ArenasCopy, index: int, tables: list[int], tensors: Mapping[str, Tensor]) -> None:
    """Lay a link's dense part of an arena over a copy. ValueError if names, dtypes or sizes differ."""
    flats = copy.flats(index)
    spans = dense_spans(copy.layout, index, tables)
    wanted = {name: (flat.dtype, (sum(b - a for a, b in spans),)) for name, flat in flats.items()}
    _require(tensors, wanted)
    for name, flat in flats.items():
        at = 0
        for start, stop in spans:
            flat[start:stop] = tensors[name][at : at + stop - start]
            at += stop - start


def lay_rows(copy: ArenasCopy, index: int, tables: list[int], tensors: Mapping[str, Tensor]) -> None:
    """Lay a link's rows of an arena's tables over a copy. ValueError if they do not fit."""
    flats = copy.flats(index)
    slots = [copy.layout.slots[table] for table in tables if copy.layout.slots[table].arena == index]
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for slot in slots:
        ids = tensors.get(f"{slot.index}.{IDS}")
        count = ids.numel() if ids is not None else 0
        if ids is not None and count and not 0 <= int(ids.min()) <= int(ids.max()) < slot.rows:
            raise ValueError(f"ids of rows are out of range for {slot.name[:100]!r}")
        wanted[f"{slot.index}.{IDS}"] = (torch.int64, (count,))
        for name, flat in flats.items():
            wanted[f"{slot.index}.{name}"] = (flat.dtype, (count, slot.row_elements))
    _require(tensors, wanted)
    for slot in slots:
        for name, flat in flats.items():
            table = flat[slot.start : slot.stop].view(slot.rows, -1)
            table[tensors[f"{slot.index}.{IDS}"]] = tensors[f"{slot.index}.{name}"]


def _require(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} != wanted:
        raise ValueError("names, dtypes or shapes of its tensors are not those of the parameters")
