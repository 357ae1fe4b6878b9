"""Turns what the user holds (arrays, tensors, row-sparse pairs) into segments and pieces of one body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pushstep.optim.ops.rows import OutOfBounds, check_all_bounds, coalesce
from pushstep.optim.state_dict import tensor_of
from pushstep.proto.errors import NotAttached, RowOutOfRange, UnsupportedModule, WrongDtype, WrongShape
from pushstep.proto.types_pb2 import Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.frames import Piece, Source
from pushstep.proto.wire.layout import Layout, Slot

from ..transport.streams import Body
from .compression import Compression
from .sparse import merged_rows
from .stretch import LEAST_TENSORS, StretchTable

Rows = tuple[Tensor, Tensor]


def as_gradient(value: Any, slot: Slot) -> Tensor | Rows:
    """A gradient as a dense tensor of the slot's shape, or as (ids, rows): int64 ids and one row for each.

    Takes a numpy array, a torch tensor (strided or sparse COO with one sparse dimension), or a pair (ids, rows).
    WrongShape or WrongDtype, naming the parameter, for anything else. `check_ids` looks at the ids of all of them.
    """
    if isinstance(value, tuple):
        ids, rows = map(tensor_of, value)
        return _checked_rows(ids, rows, slot)
    tensor = tensor_of(value)
    if tensor.is_sparse:
        if tensor.sparse_dim() != 1:
            raise WrongShape(
                what=f"gradient of {slot.name!r}", got=f"{tensor.sparse_dim()} sparse dimensions", expected=1
            )
        return _checked_rows(tensor._indices()[0], tensor._values(), slot)
    if tuple(tensor.shape) != slot.shape:
        raise WrongShape(what=f"gradient of {slot.name!r}", got=tuple(tensor.shape), expected=slot.shape)
    _check_floating(tensor, slot)
    return tensor


def _checked_rows(ids: Tensor, rows: Tensor, slot: Slot) -> Rows:
    _check_floating(rows, slot)
    if ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 1:
        raise WrongDtype(
            what=f"row ids of {slot.name!r}", got=f"{ids.dim()}-d {ids.dtype}", expected="1-d int64"
        )
    expected = (ids.numel(), *slot.shape[1:])
    if not slot.shape or tuple(rows.shape) != expected:
        raise WrongShape(what=f"gradient rows of {slot.name!r}", got=tuple(rows.shape), expected=expected)
    return ids.to(torch.int64), rows


def check_ids(gradients: Mapping[Slot, Tensor | Rows]) -> None:
    """RowOutOfRange, naming the parameter, unless every row that these name is there."""
    named = [(slot, value[0]) for slot, value in gradients.items() if isinstance(value, tuple)]
    try:
        check_all_bounds([ids for _, ids in named], [slot.rows for slot, _ in named])
    except OutOfBounds as error:
        slot, _ = named[error.table]
        raise RowOutOfRange(parameter=slot.name, row=error.row, rows=slot.rows) from error


def _check_floating(tensor: Tensor, slot: Slot) -> None:
    if tensor.dtype not in dtypes.WIRE:
        raise WrongDtype(
            what=f"gradient of {slot.name!r}", got=tensor.dtype, expected=", ".join(dtypes.NAMES.values())
        )


def push_body(layout: Layout, gradients: Mapping[Slot, Tensor | Rows], compression: Compression) -> Body:
    """The body of a push: a segment per run of neighbouring dense gradients, then one per row-sparse one.

    NotAttached if there are no gradients.
    """
    if not gradients:
        raise NotAttached(problem="a push needs at least one gradient")
    segments: list[Segment] = []
    pieces: list[Sequence[Source]] = []
    dense = {slot: g for slot, g in gradients.items() if isinstance(g, Tensor)}
    whole = [slot for slot, g in gradients.items() if isinstance(g, Tensor) or slot.start == slot.stop]
    for segment, slots in layout.dense_segments(whole, compression.wire, of_push=True):
        segments.append(segment)
        if segment.HasField("parameter"):
            pieces.append([])
        elif compression.may_select(slots):
            indices, values = compression.select(slots, dense)
            segment.elements = indices.numel()
            # the wire has uint32; int32 has the same bits
            pieces.append([Piece(indices, torch.int32), Piece(values, values.dtype)])
        else:
            pieces.append([compression.dense(slot, dense[slot]) for slot in slots])
    # duplicate rows are summed here, in order of appearance, so that they cost no bytes
    named = [
        (slot, *gradient)
        for slot, gradient in gradients.items()
        if isinstance(gradient, tuple) and slot.start < slot.stop
    ]
    merged = {} if compression.owes else merged_rows(named, compression.wire)
    for slot, given_ids, given_rows in named:
        if slot in merged:
            ids, sources = merged[slot]
        else:
            ids, rows = coalesce(given_ids.cpu(), given_rows.cpu())
            sources = [Piece(ids, torch.int64), compression.rows(slot, ids, rows)]
        segments.append(
            Segment(
                arena=slot.arena,
                start=slot.start,
                stop=slot.stop,
                dtype=dtypes.to_push(compression.dtype_of(slot), "segment"),
                rows=ids.numel(),
            )
        )
        pieces.append(sources)
    return Body(segments, pieces)


class PushBodies:
    """Makes the bodies of one worker's pushes. The segments are kept while pushes are of the same parameters."""

    def __init__(self, compression: Compression) -> None:
        self._compression = compression
        self._layout: Layout | None = None
        self._slots: list[Slot] = []
        self._segments: list[Segment] = []
        # by segment: its parameters' places among the gradients, their dtype on the wire, and a table if they are many
        self._runs: list[tuple[list[int], torch.dtype, StretchTable | None]] = []

    def of(self, layout: Layout, gradients: Mapping[Slot, Tensor | Rows]) -> Body:
        """The body of a push; see `push_body`."""
        values = list(gradients.values())
        if self._compression.owes or not values or tuple in map(type, values):
            return push_body(layout, gradients, self._compression)
        slots = list(gradients)
        if layout is not self._layout or slots != self._slots:
            self._arrange(layout, slots)
        # a list of whole values: `values` holds no rows
        return Body(self._segments, [self._sources(values, *run) for run in self._runs])  # type: ignore[arg-type]

    def _sources(
        self, values: list[Tensor], places: list[int], dtype: torch.dtype, table: StretchTable | None
    ) -> Sequence[Source]:
        tensors = [values[place] for place in places]
        stretch = None if table is None else table.of(tensors)
        return [Piece(tensor, dtype) for tensor in tensors] if stretch is None else [stretch]

    def _arrange(self, layout: Layout, slots: list[Slot]) -> None:
        places = {slot: place for place, slot in enumerate(slots)}
        runs = layout.dense_segments(slots, self._compression.wire, of_push=True)
        self._layout, self._slots = layout, slots
        self._segments = [segment for segment, _ in runs]
        self._runs = []
        for _, run in runs:
            held, dtype = [slot for slot in run if slot.start < slot.stop], self._compression.dtype_of(run[0])
            table = StretchTable(held, dtype) if len(held) >= LEAST_TENSORS else None
            self._runs.append(([places[slot] for slot in held], dtype, table))


def values_body(layout: Layout, values: Mapping[tuple[Slot, str], Tensor]) -> Body:
    """The body of an upload: whole parameters and states, by (slot, state name or "")."""
    segments: list[Segment] = []
    pieces: list[list[Piece]] = []
    for state in dict.fromkeys(state for _, state in values):
        slots = [slot for slot, name in values if name == state]
        for segment, run in layout.dense_segments(slots, state=state):
            dtype = dtypes.to_torch(segment.dtype, "segment")
            segments.append(segment)
            pieces.append([Piece(values[slot, state], dtype) for slot in run])
    return Body(segments, pieces)


def as_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The same elements for numpy, which lacks bfloat16: that becomes float32, in memory of its own."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def by_slot(grads: Mapping[str, Any], layout: Layout, model: str) -> dict[Slot, Tensor | Rows]:
    """A user's gradients by slot. UnsupportedModule if two names mean one parameter."""
    found: dict[Slot, Tensor | Rows] = {}
    for name, gradient in grads.items():
        slot = layout.slot(name, model)
        if slot in found:
            raise UnsupportedModule(
                problem=f"{name!r} is another name of {slot.name!r}, of which a push has one gradient: add them up"
            )
        found[slot] = as_gradient(gradient, slot)
    check_ids(found)
    return found


def row_ids(ids: Any, slot: Slot) -> Tensor:
    """A user's row numbers of one parameter, flat, as int64. WrongDtype or RowOutOfRange for others."""
    rows = ids.numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if rows.size and rows.dtype.kind not in "iu":
        raise WrongDtype(what=f"row ids of {slot.name!r}", got=rows.dtype, expected="integers")
    if rows.size and not 0 <= rows.min() <= rows.max() < slot.rows:
        wrong = rows.ravel()[((rows < 0) | (rows >= slot.rows)).argmax()]
        raise RowOutOfRange(parameter=slot.name, row=int(wrong), rows=slot.rows)
    return torch.from_numpy(np.ascontiguousarray(rows.ravel(), np.int64))
