"""A push's segments as gradients, once the body is complete. Compressed segments are unpacked here.

Dense elements and rows lie in the body as the step reads them. int8 codes are multiplied out into float32 in one pass,
which also takes the norms. The elements of an element-sparse segment are put among zeros. The memory for that was
reserved with the body (`Layout.unpacked_bytes`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pushstep.optim.ops.quantise import dequantise, dequantise_rows
from pushstep.optim.ops.rows import Merging, OutOfBounds, check_bounds, coalesce, has_kernels
from pushstep.proto.errors import MalformedFrame, RowOutOfRange
from pushstep.proto.shared_memory.slots import SharedBody
from pushstep.proto.types_pb2 import Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.frames import Assembly
from pushstep.proto.wire.layout import ID_BYTES, INDEX_BYTES, INT8_UNPACKED, Slot

from .gradient import DensePart, RowsPart

# Allocates so many bytes. Used pages need not be mapped again (16 M int8 elements: 17 ms, not 49).
Take = Callable[[int], Tensor]


def dense_part(
    segment: Segment, slots: Sequence[Slot], body: Assembly | SharedBody, index: int, take: Take
) -> tuple[DensePart, list[float] | None]:
    """The gradient of whole parameters, and each one's sum of squares if it was taken in the same pass.

    MalformedFrame if an element-sparse segment's indices are not valid.
    """
    dtype = dtypes.of_push(segment.dtype, "segment")
    if segment.HasField("parameter"):
        nothing = torch.empty(0, dtype=slots[0].dtype, device="cpu")
        return DensePart(segment.arena, segment.start, tuple(slots), nothing), [0.0]
    sums = None
    if dtype == torch.int8:
        gradient = take((segment.stop - segment.start) * INT8_UNPACKED.itemsize).view(INT8_UNPACKED)
        lengths = [slot.stop - slot.start for slot in slots]
        sums = dequantise(body.part(index, torch.uint8), gradient, lengths, block=dtypes.INT8_BLOCK)
    elif segment.HasField("elements"):
        gradient = _scattered(segment, slots[0], dtype, body, index, take)
    else:
        gradient = body.part(index, dtype)
    return DensePart(segment.arena, segment.start, tuple(slots), gradient), sums


def rows_parts(
    segments: Sequence[Segment], slots: Sequence[Sequence[Slot]], body: Assembly | SharedBody, take: Take
) -> dict[int, RowsPart]:
    """By segment, the gradients of some rows of one parameter each, duplicates summed.

    slots: each segment's parameters. RowOutOfRange if a row does not exist.
    """
    kinds: dict[torch.dtype, list[int]] = {}
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    for index, segment in enumerate(segments):
        if segment.HasField("rows"):
            pairs[index] = _pair(segment, slots[index][0], body, index, take)
            kinds.setdefault(pairs[index][1].dtype, []).append(index)
    found: dict[int, RowsPart] = {}
    for members in kinds.values():
        of = [slots[index][0] for index in members]
        some = [pairs[index] for index in members]
        if not has_kernels(some[0][1]):
            found |= {index: _alone(slot, *pair) for index, slot, pair in zip(members, of, some, strict=True)}
            continue
        try:
            merging = Merging(some, [slot.rows for slot in of])
        except OutOfBounds as error:
            wrong = of[error.table]
            raise RowOutOfRange(parameter=wrong.name, row=error.row, rows=wrong.rows) from error
        for table, (index, slot) in enumerate(zip(members, of, strict=True)):
            found[index] = RowsPart(slot, merging.ids(table), merging.rows(table))
    return found


def _pair(
    segment: Segment, slot: Slot, body: Assembly | SharedBody, index: int, take: Take
) -> tuple[Tensor, Tensor]:
    """Ids and rows as they came."""
    count = int(segment.rows)
    ids = body.part(index, torch.int64, 0, count)
    dtype = dtypes.of_push(segment.dtype, "segment")
    if dtype == torch.int8:
        rows = take(count * slot.row_elements * INT8_UNPACKED.itemsize).view(INT8_UNPACKED)
        rows = rows.view(count, slot.row_elements)
        dequantise_rows(body.part(index, torch.uint8, count * ID_BYTES), rows, block=dtypes.INT8_BLOCK)
    else:
        rows = body.part(index, dtype, count * ID_BYTES)
    return ids, rows.view(count, *slot.shape[1:])


def _alone(slot: Slot, ids: Tensor, rows: Tensor) -> RowsPart:
    """The same on a device, where no kernel checks the ids."""
    try:
        check_bounds(ids, slot.rows)
    except OutOfBounds as error:
        raise RowOutOfRange(parameter=slot.name, row=error.row, rows=slot.rows) from error
    return RowsPart(slot, *coalesce(ids, rows))


def _scattered(
    segment: Segment, first: Slot, dtype: torch.dtype, body: Assembly | SharedBody, index: int, take: Take
) -> Tensor:
    count, length = int(segment.elements), int(segment.stop - segment.start)
    # the indices are uint32, for which torch has few operations
    indices = body.part(index, torch.int32, 0, count).to(torch.int64).bitwise_and_(0xFFFFFFFF)
    wrong = indices[1:] <= indices[:-1]
    if (count and int(indices[-1]) >= length) or bool(wrong.any()):
        raise MalformedFrame(
            problem=f"the indices of the element-sparse segment that begins with {first.name!r} are not {count} different "
            f"ones below {length} in ascending order"
        )
    gradient = take(length * dtype.itemsize).view(dtype).zero_()
    gradient[indices] = body.part(index, dtype, count * INDEX_BYTES, count)
    return gradient
