"""The one pass over a complete body: row ids, finiteness, and norms.

It blocks, so large bodies need a thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from pushstep.optim.ops.norms import square_sums
from pushstep.proto.shared_memory.slots import SharedBody
from pushstep.proto.training_pb2 import PushHeader
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.frames import Assembly
from pushstep.proto.wire.layout import Slot

from .gradient import DensePart, RowsPart, StagedPush
from .incoming import IncomingBody
from .unpack import Take, dense_part, rows_part

# Elements that are checked for finiteness at once: 256 Ki lie in the cache, and take little memory.
BLOCK_ELEMENTS: Final = 1 << 18


def inspect(
    header: PushHeader,
    slots: Sequence[Sequence[Slot]],
    body: Assembly | SharedBody,
    take: Take,
    incoming: IncomingBody | None = None,
) -> StagedPush:
    """Read a complete body once, or the part of it that `incoming` has not read.

    RowOutOfRange, MalformedFrame. They are raised if the body names rows or elements that do not exist.
    slots: each segment's parameters. take: allocates memory for what is unpacked.
    """
    parts: list[DensePart | RowsPart] = []
    sums: Sequence[float] | None
    known: list[Sequence[float] | None] = []
    for index, segment in enumerate(header.segments):
        covered = slots[index]
        found = incoming.dense(index) if incoming is not None else None
        if found is not None:
            gradient, sums = found
            parts.append(DensePart(segment.arena, segment.start, tuple(covered), gradient))
        else:
            unpack = rows_part if segment.HasField("rows") else dense_part
            part, sums = unpack(segment, covered, body, index, take)
            parts.append(part)
        known.append(sums)
    return measured(parts, known)


def measured(
    parts: Sequence[DensePart | RowsPart],
    known: Sequence[Sequence[float] | None] | None = None,
) -> StagedPush:
    """Gradients with their norms, and whether they are finite in the dtype that is stepped.

    known: for each part, its parameters' sums of squares if they were taken before.
    """
    nonfinite = None
    sums_of: dict[int, float] = {}
    for part, sums in zip(parts, known or [None] * len(parts), strict=True):
        slots: Sequence[Slot]
        if isinstance(part, RowsPart):
            slots, pieces = [part.slot], [part.rows]
        else:
            slots = part.slots
            pieces = [part.gradient]  # a single parameter is all of the part, and needs no view
            if len(slots) > 1:
                pieces = [part.gradient[slot.start - part.start : slot.stop - part.start] for slot in slots]
        stepped = dtypes.state_dtype(slots[0].dtype)  # the parameters of an arena have one dtype
        narrowed = pieces[0].dtype.itemsize > stepped.itemsize  # a finite float64 may be an infinite float32
        for slot, piece, square_sum in zip(
            slots, pieces, square_sums(pieces) if sums is None else sums, strict=True
        ):
            sums_of[slot.index] = square_sum
            if (narrowed or not math.isfinite(square_sum)) and not _all_finite(piece, stepped):
                nonfinite = nonfinite or slot.name
    norm = math.sqrt(sum([sums_of[index] for index in sorted(sums_of)]))
    return StagedPush(sums_of, parts, nonfinite, norm)


def _all_finite(values: Tensor, stepped: torch.dtype) -> bool:
    """True if all values are finite as `stepped`. Squares in float64 can overflow where the values do not.

    It converts one block at a time, because no budget counts the memory.
    """
    flat = values.reshape(-1)
    blocks = (flat[start : start + BLOCK_ELEMENTS] for start in range(0, flat.numel(), BLOCK_ELEMENTS))
    return all(bool(torch.isfinite(block.to(stepped)).all()) for block in blocks)


def is_accumulated(values: Tensor) -> bool:
    """True if all values are finite and none is negative. A NaN makes it False."""
    if not values.numel():
        return True
    lowest, highest = torch.aminmax(values)
    return bool(lowest >= 0) and bool(highest < math.inf)
