"""PullRows: some rows of one parameter, in the order in which they are asked for, at one version.

A small request can ask for far more than the parameter holds, since ids may repeat, and name millions of them. So they
are counted first, without one of them made; then room is set aside for them and the answer; then a kernel reads
them. Only gathering the rows takes the model's writer, one request's at a time; frames are made of them elsewhere.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from pushstep.optim.varints import Varints
from pushstep.proto import dtypes
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import MalformedFrame, MessageTooLarge, RowOutOfRange, TooLong, WrongShape
from pushstep.proto.frames import MAX_MESSAGE_BYTES, Piece, pack
from pushstep.proto.layout import ID_BYTES
from pushstep.proto.limits import limit_of
from pushstep.proto.types_pb2 import Segment

from .catalog import Catalog
from .model import Model
from .publish import fetched
from .pull_answers import header_of, wire_of
from .read_budget import ReadBudget
from .received import INLINE_MESSAGE_BYTES, received
from .staging import INLINE_BYTES
from .threads import PULLS

IDS_FIELD: Final = pb.PullRowsRequest.IDS_FIELD_NUMBER
MOST_IDS: Final = limit_of(pb.PullRowsRequest, "ids").count


async def pulled_rows(catalog: Catalog, budget: ReadBudget, message: bytes) -> AsyncGenerator[bytes, None]:
    """The answer's messages. UnknownModel, UnknownParameter, WrongShape, RowOutOfRange, OverBudget and others."""
    asked = await RowsAsked.parse(catalog, message)
    await budget.claim(asked.nbytes)
    try:
        async with aclosing(asked.answers()) as answers:
            async for answer in answers:
                yield answer
    finally:
        budget.give_back(asked.nbytes)


@dataclass(frozen=True, slots=True)
class RowsAsked:
    """A request, with its ids still as they came."""

    model: Model
    request: pb.PullRowsRequest
    ids: Varints
    is_small: bool

    @classmethod
    async def parse(cls, catalog: Catalog, message: bytes) -> RowsAsked:
        """The request in a message; a named error if it cannot be answered whatever its ids are."""
        if len(message) > MAX_MESSAGE_BYTES:
            raise MessageTooLarge(got=len(message), limit=MAX_MESSAGE_BYTES)
        is_small = len(message) <= INLINE_MESSAGE_BYTES
        try:
            ids = await PULLS.run_unless(is_small, Varints, message, IDS_FIELD)
        except ValueError as error:
            raise MalformedFrame(problem="not a PullRowsRequest") from error
        request = await received(pb.PullRowsRequest, ids.rest)
        if ids.count > MOST_IDS:
            raise TooLong(what="PullRowsRequest.ids", got=ids.count, unit="entries", most=MOST_IDS)
        model = catalog.get(request.model)
        model.require_whole()
        slot = model.layout.slot(request.parameter, model.name)
        if not slot.shape:
            raise WrongShape(what=f"parameter {slot.name!r}", got="()", expected="one with rows")
        wire_of(request.dtype)
        return cls(model, request, ids, is_small)

    @property
    def nbytes(self) -> int:
        """What the ids and the rows take; frames are made of them one by one."""
        slot = self.model.layout.slot(self.request.parameter, self.model.name)
        return self.ids.count * (ID_BYTES + slot.row_elements * slot.dtype.itemsize)

    async def answers(self) -> AsyncGenerator[bytes, None]:
        """The answer's messages, at one version."""
        ids = await PULLS.run_unless(self.is_small, self._checked)
        self.model.require_whole()
        async with self.model.gathering:
            first, frames = await self.model.stepper.submit(lambda: self._gathered(ids))
        yield first
        is_small = self.nbytes <= INLINE_BYTES and self.model.arenas.lane.takes_small
        while (frame := await PULLS.run_unless(is_small, next, frames, None)) is not None:
            yield frame

    def _checked(self) -> Tensor:
        numbers = self.ids.numbers()
        slot = self.model.layout.slot(self.request.parameter, self.model.name)
        beyond = numbers >= slot.rows
        if beyond.any():
            raise RowOutOfRange(parameter=slot.name, row=int(numbers[beyond.argmax()]), rows=slot.rows)
        return torch.from_numpy(numbers.view("int64"))

    def _gathered(self, ids: Tensor) -> tuple[bytes, Iterator[bytes]]:
        """The first message, and what makes the others of a copy of the rows: in the writer's thread."""
        arenas = self.model.arenas
        slot = arenas.layout.slot(self.request.parameter, self.model.name)
        dtype = wire_of(self.request.dtype) or slot.dtype
        wanted = ids.to(arenas.device)
        rows = arenas.view(slot).index_select(0, wanted)
        body = fetched(arenas, [Piece(wanted, torch.int64), Piece(rows, dtype)])
        wire = dtypes.to_wire(dtype, "segment")
        segment = Segment(arena=slot.arena, start=slot.start, stop=slot.stop, dtype=wire, rows=ids.numel())
        header = header_of(self.model, arenas, [segment])
        return pb.PullResponse(header=header).SerializeToString(), iter(pack([body]))
