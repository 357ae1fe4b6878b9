"""PullRows: rows of one parameter at one version, in the order in which the request names them.

Ids may repeat, and a request may name millions of them. So a small request can ask for far more than the parameter
holds. The ids are counted first, before any of them is decoded. Then the bytes of ids and rows are claimed from the
read budget. Then a kernel decodes the ids. Only the gathering of the rows takes the model's writer thread, for one
request at a time; frames are encoded in other threads.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from pushstep.optim.ops.varints import Varints
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import MalformedFrame, MessageTooLarge, RowOutOfRange, TooLong, WrongShape
from pushstep.proto.types_pb2 import Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.frames import MAX_MESSAGE_BYTES, Piece, pack
from pushstep.proto.wire.layout import ID_BYTES
from pushstep.proto.wire.limits import limit_of

from ..access.caller import require_named
from ..arenas.version_frames import fetched
from ..models.catalog import Catalog
from ..models.model import Model
from ..parts.refusals import refuse
from ..process.inline import INLINE_BYTES
from ..process.request_log import about
from ..process.threads import PULLS
from ..staging.read_budget import ReadBudget
from ..streams.received import INLINE_MESSAGE_BYTES, received
from .pull import header_of, wire_of

IDS_FIELD: Final = pb.PullRowsRequest.IDS_FIELD_NUMBER
MOST_IDS: Final = limit_of(pb.PullRowsRequest, "ids").count


async def pulled_rows(catalog: Catalog, budget: ReadBudget, message: bytes) -> AsyncGenerator[bytes, None]:
    """The answer's messages.

    Raises UnknownModel, UnknownParameter, WrongShape, RowOutOfRange, OverBudget and others.
    """
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
    """A request whose ids are not decoded yet."""

    model: Model
    request: pb.PullRowsRequest
    ids: Varints
    is_small: bool

    @classmethod
    async def parse(cls, catalog: Catalog, message: bytes) -> RowsAsked:
        """Parse a message and check all but the values of its ids. Raises a named error."""
        if len(message) > MAX_MESSAGE_BYTES:
            raise MessageTooLarge(got=len(message), limit=MAX_MESSAGE_BYTES)
        is_small = len(message) <= INLINE_MESSAGE_BYTES
        try:
            ids = await PULLS.run_unless(is_small, Varints, message, IDS_FIELD)
        except ValueError as error:
            raise MalformedFrame(problem="not a PullRowsRequest") from error
        request = await received(pb.PullRowsRequest, ids.rest)
        require_named(request)
        if ids.count > MOST_IDS:
            raise TooLong(what="PullRowsRequest.ids", got=ids.count, unit="entries", most=MOST_IDS)
        about(request.model)
        model = catalog.get(request.model)
        model.require_whole()
        refuse(model.shard, model.name, "rows of a parameter for a worker")
        slot = model.layout.slot(request.parameter, model.name)
        if not slot.shape:
            raise WrongShape(what=f"parameter {slot.name!r}", got="()", expected="one with rows")
        wire_of(request.dtype)
        return cls(model, request, ids, is_small)

    @property
    def nbytes(self) -> int:
        """Bytes of the ids and the rows. Frames do not count: they are encoded one at a time."""
        slot = self.model.layout.slot(self.request.parameter, self.model.name)
        return self.ids.count * (ID_BYTES + slot.row_elements * slot.dtype.itemsize)

    async def answers(self) -> AsyncGenerator[bytes, None]:
        """The answer's messages, all of one version."""
        ids = await PULLS.run_unless(self.is_small, self._checked)
        self.model.require_whole()
        async with self.model.gathering:
            first, frames, version = await self.model.writer.submit(lambda: self._gathered(ids))
        await self.model.recorder.until_shown(version)
        yield first
        is_small = self.nbytes <= INLINE_BYTES and self.model.arenas.device_stream.takes_small
        while (frame := await PULLS.run_unless(is_small, next, frames, None)) is not None:
            yield frame

    def _checked(self) -> Tensor:
        numbers = self.ids.numbers()
        slot = self.model.layout.slot(self.request.parameter, self.model.name)
        beyond = numbers >= slot.rows
        if beyond.any():
            raise RowOutOfRange(parameter=slot.name, row=int(numbers[beyond.argmax()]), rows=slot.rows)
        return torch.from_numpy(numbers.view("int64"))

    def _gathered(self, ids: Tensor) -> tuple[bytes, Iterator[bytes], int]:
        """In the writer thread: the first message, an iterator that makes the others of copied rows, the version."""
        arenas = self.model.arenas
        slot = arenas.layout.slot(self.request.parameter, self.model.name)
        dtype = wire_of(self.request.dtype) or slot.dtype
        wanted = ids.to(arenas.device)
        rows = arenas.view(slot).index_select(0, wanted)
        body = fetched(arenas, [Piece(wanted, torch.int64), Piece(rows, dtype)])
        wire = dtypes.to_wire(dtype, "segment")
        segment = Segment(arena=slot.arena, start=slot.start, stop=slot.stop, dtype=wire, rows=ids.numel())
        header = header_of(self.model, arenas, [segment])
        return pb.PullResponse(header=header).SerializeToString(), iter(pack([body])), arenas.version
