"""The one pass over a complete body: row ids, finiteness, and norms.

It blocks, so large bodies need a thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, islice
from typing import Final

import torch
from torch import Tensor

from pushstep.optim.ops.norms import square_sums
from pushstep.proto.errors import InvalidState
from pushstep.proto.shared_memory.slots import SharedBody
from pushstep.proto.training_pb2 import PushHeader
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.frames import Assembly
from pushstep.proto.wire.layout import Slot

from .gradient import DensePart, RowsPart, StagedPush
from .incoming import IncomingBody
from .row_sums import row_square_sums
from .unpack import Take, dense_part, rows_parts

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
    by_rows = rows_parts(header.segments, slots, body, take)
    for index, segment in enumerate(header.segments):
        if index in by_rows:
            parts.append(by_rows[index])
            known.append(None)
            continue
        covered = slots[index]
        found = incoming.dense(index) if incoming is not None else None
        if found is not None:
            gradient, sums = found
            parts.append(DensePart(segment.arena, segment.start, tuple(covered), gradient))
        else:
            part, sums = dense_part(segment, covered, body, index, take)
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
    slots_of = [[part.slot] if isinstance(part, RowsPart) else part.slots for part in parts]
    sums = list(known or [None] * len(parts))
    fresh = [k for k, found in enumerate(sums) if found is None]
    by_rows = [(k, part) for k in fresh if isinstance(part := parts[k], RowsPart)]
    taken = row_square_sums([part for _, part in by_rows]) if by_rows else []
    for (k, _), total in zip(by_rows, taken, strict=True):
        sums[k] = [total]
    dense = [k for k in fresh if sums[k] is None]
    pieces = [_pieces(parts[k]) for k in dense]
    found = iter(square_sums(list(chain.from_iterable(pieces))) if dense else ())
    for k, some in zip(dense, pieces, strict=True):
        sums[k] = list(islice(found, len(some)))
    complete = [own or () for own in sums]
    total = _added(slots_of, complete)
    names = (
        _first_nonfinite(part, slots, some, total)
        for part, slots, some in zip(parts, slots_of, complete, strict=True)
    )
    nonfinite = next(filter(None, names), None)
    return StagedPush(sum(map(len, slots_of)), parts, nonfinite, math.sqrt(total), complete)


def _first_nonfinite(
    part: DensePart | RowsPart, slots: Sequence[Slot], sums: Sequence[float], total: float
) -> str | None:
    """The name of a part's first parameter whose gradient is not finite in the dtype that it is stepped in."""
    stepped = dtypes.state_dtype(slots[0].dtype)  # the parameters of an arena have one dtype
    # a finite float64 may be an infinite float32
    narrowed = _values(part).dtype.itemsize > stepped.itemsize
    if not narrowed and math.isfinite(total):
        return None
    for slot, piece, square_sum in zip(slots, _pieces(part), sums, strict=True):
        if (narrowed or not math.isfinite(square_sum)) and not _all_finite(piece, stepped):
            return slot.name
    return None


def _values(part: DensePart | RowsPart) -> Tensor:
    return part.rows if isinstance(part, RowsPart) else part.gradient


def _pieces(part: DensePart | RowsPart) -> list[Tensor]:
    """Each parameter's gradient."""
    if isinstance(part, RowsPart) or len(part.slots) == 1:
        return [_values(part)]  # a single parameter is all of the part, and needs no view
    return [part.gradient[slot.start - part.start : slot.stop - part.start] for slot in part.slots]


def _added(slots_of: Sequence[Sequence[Slot]], sums: Sequence[Sequence[float]]) -> float:
    """All sums of squares, added in manifest order."""
    if all(slots[-1].index - slots[0].index == len(slots) - 1 for slots in slots_of):
        order = sorted(range(len(sums)), key=lambda k: slots_of[k][0].index)
        return sum(list(chain.from_iterable(sums[k] for k in order)), 0.0)
    of_slot = {
        slot.index: found
        for slots, some in zip(slots_of, sums, strict=True)
        for slot, found in zip(slots, some, strict=True)
    }
    return sum([of_slot[index] for index in sorted(of_slot)], 0.0)


def _all_finite(values: Tensor, stepped: torch.dtype) -> bool:
    """True if all values are finite as `stepped`. Squares in float64 can overflow where the values do not.

    It converts one block at a time, because no budget counts the memory.
    """
    flat = values.reshape(-1)
    blocks = (flat[start : start + BLOCK_ELEMENTS] for start in range(0, flat.numel(), BLOCK_ELEMENTS))
    return all(bool(torch.isfinite(block.to(stepped)).all()) for block in blocks)


def require_accumulated(values: Tensor, state: str, parameter: str) -> None:
    """InvalidState, with the first bad bound, unless steps can have left these values of a parameter's state."""
    if not is_accumulated(values):
        lowest, highest = (float(bound) for bound in torch.aminmax(values))
        got = lowest if not 0 <= lowest < math.inf else highest
        raise InvalidState(state=state, parameter=parameter, got=got)


def is_accumulated(values: Tensor) -> bool:
    """True if all values are finite and none is negative. A NaN makes it False."""
    if not values.numel():
        return True
    lowest, highest = torch.aminmax(values)
    return bool(lowest >= 0) and bool(highest < math.inf)
