"""PullRows: rows of parameters at one version, in the order in which the request names them.

Ids may repeat, and a request may name millions of them. So a small request can ask for far more than the parameter
holds. The ids are counted first, before any of them is decoded. Then the bytes of ids and rows are claimed from the
read budget. Then the ids are decoded. The rows are gathered
straight into frames in the model's writer thread, for one request at a time.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from pushstep.optim.ops.varints import Varints
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import MalformedFrame, MessageTooLarge, RowOutOfRange, TooLong, WrongShape
from pushstep.proto.types_pb2 import Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.frames import MAX_MESSAGE_BYTES, pack
from pushstep.proto.wire.layout import ID_BYTES, Slot
from pushstep.proto.wire.limits import limit_of

from ..access.caller import require_named
from ..arenas.version_frames import rows_sources
from ..models.catalog import Catalog
from ..models.model import Model
from ..parts.refusals import refuse
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
    """A request whose ids are not decoded yet: of one parameter as varints, or of several as they lie in memory."""

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
        asked = cls(model, request, ids, is_small)
        slots = [slot for slot, _ in asked.counts()]
        for slot in slots:
            if not slot.shape:
                raise WrongShape(what=f"parameter {slot.name!r}", got="()", expected="one with rows")
        if len({slot.index for slot in slots}) < len(slots):
            raise MalformedFrame(problem="a parameter comes twice in the selections")
        wire_of(request.dtype)
        return asked

    def counts(self) -> list[tuple[Slot, int]]:
        """Each parameter and how many of its rows are asked for. UnknownParameter, MalformedFrame."""
        layout, name = self.model.layout, self.model.name
        if not self.request.selections:
            return [(layout.slot(self.request.parameter, name), self.ids.count)]
        found = []
        for selection in self.request.selections:
            count, rest = divmod(len(selection.ids), ID_BYTES)
            if rest:
                raise MalformedFrame(problem=f"the ids of a selection are of {ID_BYTES} bytes each")
            found.append((layout.slot(selection.parameter, name), count))
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the ids and the rows, which are copied or encoded at once."""
        return sum(
            count * (ID_BYTES + slot.row_elements * slot.dtype.itemsize) for slot, count in self.counts()
        )

    async def answers(self) -> AsyncGenerator[bytes, None]:
        """The answer's messages, all of one version."""
        wanted = await PULLS.run_unless(self.is_small, self._checked)
        self.model.require_whole()
        async with self.model.gathering:
            first, frames, version = await self.model.writer.submit(lambda: self._gathered(wanted))
        await self.model.recorder.until_shown(version)
        yield first
        for frame in frames:
            yield frame

    def _checked(self) -> list[tuple[Slot, Tensor]]:
        found = []
        for place, (slot, _) in enumerate(self.counts()):
            if self.request.selections:
                numbers = np.frombuffer(self.request.selections[place].ids, np.int64)
            else:
                numbers = self.ids.numbers().view(np.int64)  # one above 2**63 becomes negative
            if numbers.size and not 0 <= numbers.min() <= numbers.max() < slot.rows:
                wrong = int(numbers[((numbers < 0) | (numbers >= slot.rows)).argmax()])
                wrong += 0 if self.request.selections or wrong >= 0 else 1 << 64
                raise RowOutOfRange(parameter=slot.name, row=wrong, rows=slot.rows)
            found.append((slot, torch.from_numpy(numbers.copy())))
        return found

    def _gathered(self, wanted: Sequence[tuple[Slot, Tensor]]) -> tuple[bytes, Sequence[bytes], int]:
        """In the writer thread: the first message, the others, and the version."""
        arenas, some = self.model.arenas, []
        for slot, ids in wanted:
            dtype = wire_of(self.request.dtype) or slot.dtype
            wire = dtypes.to_wire(dtype, "segment")
            segment = Segment(
                arena=slot.arena, start=slot.start, stop=slot.stop, dtype=wire, rows=ids.numel()
            )
            some.append((segment, arenas.view(slot), ids.to(arenas.device)))
        header = header_of(self.model, arenas, [segment for segment, _, _ in some])
        frames = list(pack(rows_sources(arenas, some), joined=self.request.joined_chunks))
        return pb.PullResponse(header=header).SerializeToString(), frames, arenas.version
