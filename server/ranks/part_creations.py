"""New models in a rank above 0: each one's part is uploaded here, and the model is made when rank 0 says so, in all ranks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pushstep.proto.errors import NoCreationTicket, PushstepError
from pushstep.proto.shards_pb2 import RankCommitCreation, RankCreate, RankDone, RankMessage
from pushstep.proto.wire.layout import Layout

from ..arenas.arena import Arenas
from ..journal.durability import read_durability
from ..links.words import heard, said
from ..models.catalog import Catalog
from ..models.creations import CREATION_S, Proposal
from ..models.model import Model
from ..parts.shard import ModelShard
from ..process.threads import REQUESTS

# How long the part of a new model waits for rank 0's word of it.
PROMISE_S: Final = 10.0


@dataclass(slots=True, eq=False)
class Promised:
    """A model whose part is to be uploaded here."""

    order: int
    ticket: int
    uid: bytes
    shard: ModelShard
    # its part, once it was uploaded
    model: Model | None = None
    # done when rank 0 has had it made
    made: asyncio.Future[None] | None = None
    # the model is made of the part that is here: another one that comes is dropped
    is_taken: bool = False


class PartCreations:
    """The models whose parts are being uploaded to one rank. Called on the event loop only."""

    def __init__(
        self, catalog: Catalog, shard: Callable[[Layout], ModelShard], say: Callable[[RankMessage], None]
    ) -> None:
        """`shard`: how a model lies in the ranks. `say` tells rank 0."""
        self._catalog = catalog
        self._shard = shard
        self._say = say
        self._promised: dict[str, Promised] = {}
        self._promises = asyncio.Event()

    async def create(self, number: int, order: RankCreate) -> None:
        """Let the part of a model be uploaded, which rank 0 has told of. NoCreationTicket; what `require_creatable` raises."""
        shard = await REQUESTS.run(lambda: self._shard(Layout(order.manifest)))
        if shard.part is None:
            raise NoCreationTicket(model=order.model)
        layout = shard.part.layout
        needed = Arenas.bytes_charged(layout)
        push_bytes = sum(arena.elements * arena.dtype.itemsize for arena in layout.arenas)
        manifest = layout.manifest.SerializeToString()
        self._catalog.require_creatable(order.model, Proposal(layout, manifest, needed, push_bytes))
        self.withdraw(order.model, 0, NoCreationTicket(model=order.model))
        until_s = self._catalog.clock() + CREATION_S
        self._catalog.creations.promised(order.model, int(order.ticket), manifest, needed, until_s)
        made: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        made.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._promises.set()
        self._promised[order.model] = Promised(number, int(order.ticket), order.uid, shard, None, made)

    async def until_promised(self, model: str, ticket: int) -> None:
        """Wait for rank 0's word of a ticket, which a worker may be faster than. NoCreationTicket if it does not come."""
        try:
            async with asyncio.timeout(PROMISE_S):
                while model not in self._promised or self._promised[model].ticket != ticket:
                    self._promises.clear()
                    await self._promises.wait()
        except TimeoutError as error:
            raise NoCreationTicket(model=model) from error

    def promised(self, model: str, ticket: int) -> Promised:
        """What rank 0 has said of a model that is uploaded. NoCreationTicket."""
        found = self._promised.get(model)
        if found is None or found.ticket != ticket:
            raise NoCreationTicket(model=model)
        return found

    def part_is_here(self, promised: Promised, model: Model) -> None:
        """A part was uploaded, whole: rank 0 may have the model made."""
        is_first = promised.model is None
        promised.model = model
        if is_first:
            self._say(RankMessage(done=RankDone(order=promised.order)))

    def withdraw(self, model: str, ticket: int, error: PushstepError) -> None:
        """Forget a model that is not made after all; ticket 0: whatever its ticket is. Uploads of it end with `error`."""
        found = self._promised.get(model)
        if found is not None and ticket in (0, found.ticket):
            del self._promised[model]
            creation = self._catalog.creations.get(model)
            if creation is not None and creation.ticket == found.ticket:
                self._catalog.creations.end(model)
            if found.made is not None and not found.made.done():
                found.made.set_exception(error)

    async def commit(self, order: RankCommitCreation) -> None:
        """Make a model of the part that is here. NoCreationTicket; what `finish_creation` raises."""
        promised = self.promised(order.model, int(order.ticket))
        model = promised.model
        creation = self._catalog.creations.get(order.model)
        if model is None or creation is None:
            raise NoCreationTicket(model=order.model)
        promised.is_taken = True
        try:
            model.durability = read_durability(json.loads(order.durability), model.durability)
            self._catalog.creations.take_place(order.model, creation)
            await self._catalog.finish_creation(order.model, creation, model)
        except Exception as error:
            self.withdraw(order.model, int(order.ticket), heard(said(error)))
            raise
        if self._promised.get(order.model) is promised:
            del self._promised[order.model]
        if promised.made is not None and not promised.made.done():
            promised.made.set_result(None)
