"""PullRows: rows of parameters at one version, in the order in which the request names them.

Of a model that lies in several ranks, each answers for its own part, all at one version (`parts/row_reads.py`).

Ids may repeat, and a request may name millions of them. So a small request can ask for far more than the parameter
holds. The ids are counted first, before any of them is decoded. Then the bytes of ids and rows are claimed from the
read budget. Then the ids are decoded. The rows are gathered
straight into frames in the model's writer thread, for one request at a time.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
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
from ..journal.journal import Level
from ..models.catalog import Catalog
from ..models.model import Model
from ..parts.shard import whole_of
from ..process.request_log import about
from ..process.threads import PULLS
from ..staging.read_budget import ReadBudget
from ..streams.received import INLINE_MESSAGE_BYTES, received
from .join import fill_in
from .pull import header_frames, header_of, require_map, wire_of

IDS_FIELD: Final = pb.PullRowsRequest.IDS_FIELD_NUMBER
MOST_IDS: Final = limit_of(pb.PullRowsRequest, "ids").count
# The header of an answer without its manifest, and its frames.
Gathered = tuple[pb.PullHeader, Sequence[bytes]]


class Turns:
    """When the rows of a request are gathered: at a server alone when the writer gets to it.

    In rank 0, behind the same ticket as in the other ranks that the request names.
    """

    def admit(self, model: Model, request: pb.PullRowsRequest) -> None:
        """Raise what the caller must know before anything is read. MapChanged, MalformedFrame."""
        model.require_whole()
        if request.map_version or names_rows(request):
            require_map(model, int(request.map_version))
        if request.ranks and model.executor.leader is None:
            raise MalformedFrame(problem="the model lies in one server, and the request names others")

    async def gathered(
        self, model: Model, request: pb.PullRowsRequest, gather: Callable[[], Gathered]
    ) -> Gathered:
        """What `gather` returns, once readers may be shown its version."""
        leader, read, ranks = model.executor.leader, int(request.read), list(request.ranks)
        reads = leader.reads if leader is not None and ranks else None
        if reads is not None:
            await reads.all_asked(read, ranks, model.version)
        async with model.gathering:
            if reads is not None:
                await reads.room()
            model.require_whole()
            job = model.writer.submit(gather)
            if reads is not None:
                reads.order(read, ranks)  # in this turn of the event loop: behind the same ticket
            header, frames = await job
        await model.recorder.until_shown(header.version)
        if leader is not None:
            await leader.until(header.version, safe=model.recorder.level is Level.DURABLE)
        return header, frames


async def pulled_rows(
    catalog: Catalog, budget: ReadBudget, message: bytes, turns: Turns
) -> AsyncGenerator[bytes, None]:
    """The answer's messages.

    Raises UnknownModel, UnknownParameter, WrongShape, RowOutOfRange, OverBudget and others.
    """
    asked = await RowsAsked.parse(catalog, message, turns)
    await budget.claim(asked.nbytes)
    try:
        async with aclosing(asked.answers(turns)) as answers:
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
    async def parse(cls, catalog: Catalog, message: bytes, turns: Turns) -> RowsAsked:
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
        turns.admit(model, request)
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
        if not names_rows(self.request) and not self.ids.count:
            return []
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

    async def answers(self, turns: Turns) -> AsyncGenerator[bytes, None]:
        """The answer's messages, all of one version."""
        model, request = self.model, self.request
        wanted = await PULLS.run_unless(self.is_small, self._checked)
        header, frames = await turns.gathered(model, request, lambda: self._gathered(wanted))
        if not wanted and header.manifest_hash != request.manifest_hash:
            await fill_in(header, whole_of(model))
            if model.shard is not None:
                header.shards.CopyFrom(model.shard.map)
        for first in await header_frames(header):
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

    def _gathered(self, wanted: Sequence[tuple[Slot, Tensor]]) -> Gathered:
        """In the writer thread: the header, and the rows."""
        arenas, some = self.model.arenas, []
        for slot, ids in wanted:
            dtype = wire_of(self.request.dtype) or slot.dtype
            wire = dtypes.to_wire(dtype, "segment")
            segment = Segment(
                arena=slot.arena, start=slot.start, stop=slot.stop, dtype=wire, rows=ids.numel()
            )
            some.append((segment, arenas.view(slot), ids.to(arenas.device)))
        header = header_of(self.model, arenas, [segment for segment, _, _ in some])
        return header, list(pack(rows_sources(arenas, some), joined=self.request.joined_chunks))


def names_rows(request: pb.PullRowsRequest) -> bool:
    """Whether a request names a parameter. One that does not brings only what there is to know of the model."""
    return bool(request.parameter or request.selections)
