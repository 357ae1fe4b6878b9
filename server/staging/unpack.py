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
from pushstep.optim.ops.rows import coalesce
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


def rows_part(
    segment: Segment, slots: Sequence[Slot], body: Assembly | SharedBody, index: int, take: Take
) -> tuple[RowsPart, list[float] | None]:
    """The gradient of some rows of the one parameter in `slots`, duplicates summed.

    RowOutOfRange if a row does not exist.
    """
    slot, count = slots[0], int(segment.rows)
    ids = body.part(index, torch.int64, 0, count)
    if count:
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= slot.rows:
            wrong = lowest if lowest < 0 else highest
            raise RowOutOfRange(parameter=slot.name, row=wrong, rows=slot.rows)
    dtype = dtypes.of_push(segment.dtype, "segment")
    if dtype == torch.int8:
        rows = take(count * slot.row_elements * INT8_UNPACKED.itemsize).view(INT8_UNPACKED)
        rows = rows.view(count, slot.row_elements)
        dequantise_rows(body.part(index, torch.uint8, count * ID_BYTES), rows, block=dtypes.INT8_BLOCK)
    else:
        rows = body.part(index, dtype, count * ID_BYTES)
    ids, rows = coalesce(ids, rows.view(count, *slot.shape[1:]))
    return RowsPart(slot, ids, rows), None


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
