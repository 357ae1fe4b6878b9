"""The journal's records of steps, outcomes and uploads: made when they are decided, read when they are replayed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from pushstep.proto.errors import CATALOGUE, PushstepError
from pushstep.proto.journal_pb2 import JournalFailure, JournalGradient, JournalOutcome
from pushstep.proto.types_pb2 import Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Layout

from ..coordinator.worker import Decided
from ..staging.gradient import DensePart, RowsPart, StagedPush
from .file import begin_of

ID_BYTES = torch.int64.itemsize


def gradient_message(push: StagedPush) -> JournalGradient:
    """What a push brought: a segment for each of its parts."""
    return JournalGradient(segments=map(_segment, push.parts))


def _segment(part: DensePart | RowsPart) -> Segment:
    if isinstance(part, RowsPart):
        slot = part.slot
        dtype = dtypes.to_wire(part.rows.dtype, slot.name)
        return Segment(arena=slot.arena, start=slot.start, stop=slot.stop, dtype=dtype, rows=part.ids.numel())
    first, last = part.slots[0], part.slots[-1]
    dtype = dtypes.to_wire(part.gradient.dtype, first.name)
    segment = Segment(arena=part.arena, start=first.start, stop=last.stop, dtype=dtype)
    if first.start == last.stop:
        segment.parameter = first.index
    return segment


def tensors_of(parts: Iterable[DensePart | RowsPart]) -> Iterator[Tensor]:
    """The tensors of gradients, in the order in which a record has them."""
    for part in parts:
        if isinstance(part, RowsPart):
            yield part.ids
            yield part.rows
        else:
            yield part.gradient


def payload_of(tensors: Iterable[Tensor]) -> list[memoryview]:
    """The bytes of tensors, from wherever they lie."""
    return [
        tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        for tensor in tensors
        if tensor.numel()
    ]


class PayloadReader:
    """Takes the tensors of a record's payload, one after the other. They lie in the record's memory."""

    def __init__(self, payload: Tensor) -> None:
        self._payload = payload
        self._at = 0

    def take(self, elements: int, dtype: torch.dtype) -> Tensor:
        """The next tensor, flat. ValueError if the payload ends before."""
        size_bytes = elements * dtype.itemsize
        if not elements:  # has no part in the record
            return torch.empty(0, dtype=dtype, device="cpu")
        begin = begin_of(self._at, size_bytes)
        found = self._payload[begin : begin + size_bytes]
        if found.numel() != size_bytes:
            raise ValueError(f"its payload ends {size_bytes - found.numel()} bytes too early")
        self._at = begin + size_bytes
        return found.view(dtype)

    def take_bytes(self, size_bytes: int) -> Tensor:
        """So many bytes."""
        return self.take(size_bytes, torch.uint8)

    def push(self, message: JournalGradient, layout: Layout) -> StagedPush:
        """The gradient of one push."""
        parts = [self._part(segment, layout) for segment in message.segments]
        return StagedPush(0, parts, None, 0.0)

    def _part(self, segment: Segment, layout: Layout) -> DensePart | RowsPart:
        slots = layout.slots_of(segment)
        dtype = dtypes.to_torch(segment.dtype, "the journal")
        if segment.HasField("rows"):
            ids = self.take(segment.rows, torch.int64)
            rows = self.take(segment.rows * slots[0].row_elements, dtype)
            return RowsPart(slots[0], ids, rows.view(int(segment.rows), *slots[0].shape[1:]))
        gradient = self.take(int(segment.stop - segment.start), dtype)
        return DensePart(segment.arena, segment.start, tuple(slots), gradient)

    def values(self, segments: Sequence[Segment]) -> Iterator[tuple[Segment, Tensor]]:
        """Uploaded values by segment."""
        for segment in segments:
            dtype = dtypes.to_torch(segment.dtype, "the journal")
            yield segment, self.take(int(segment.stop - segment.start), dtype)


def on_device(push: StagedPush, device: torch.device) -> StagedPush:
    """The push on the device where it is stepped; itself on the CPU."""
    if device.type == "cpu":
        return push
    parts: list[DensePart | RowsPart] = []
    for part in push.parts:
        if isinstance(part, RowsPart):
            parts.append(RowsPart(part.slot, part.ids.to(device), part.rows.to(device)))
        else:
            parts.append(DensePart(part.arena, part.start, part.slots, part.gradient.to(device)))
    return StagedPush(0, parts, None, 0.0)


def outcome_message(decided: Decided, worker_state: bytes | None, refused_in_row: int) -> JournalOutcome:
    """The outcome that a worker is given, and its worker state where the push brought one."""
    message = JournalOutcome(receipt=decided.receipt, digest=decided.digest, refused_in_row=refused_in_row)
    if worker_state is not None:
        message.worker_state = worker_state
    if decided.error is not None:
        message.error.CopyFrom(failure_message(decided.error))
    return message


def decided_of(message: JournalOutcome) -> Decided:
    """The outcome that `outcome_message` wrote."""
    error = error_of(message.error) if message.HasField("error") else None
    return Decided(message.digest, message.receipt, error)


def failure_message(error: PushstepError) -> JournalFailure:
    """A named error."""
    return JournalFailure(code=error.code, message=error.message, fields=error.fields)


def error_of(message: JournalFailure) -> PushstepError:
    """The error that `failure_message` wrote."""
    return CATALOGUE[message.code](message.message, **dict(message.fields))
