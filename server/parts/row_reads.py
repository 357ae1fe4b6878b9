"""Rows of a model that lies in several ranks, of one version of all: who waits for whom.

A rank keeps no old versions, so the ids that it is asked for must be there when the version is fixed. A worker calls every
rank that has rows it wants, under one number. Each other rank tells rank 0 of its call. Once all that rank 0's own call
names have, rank 0 queues its own rows and orders those of the others in one turn of its event loop: they are of the same
version, also while workers push all the time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, Final, TypeVar

from pushstep.proto.errors import MalformedFrame, ModelLost, VersionGone
from pushstep.proto.shards_pb2 import RankAsked, RankMessage, RankOrder, RankRead

from ..arenas.arena import Arenas
from ..arenas.writer import ModelWriter

T = TypeVar("T")
# How long calls of one read wait for each other.
WAIT_S: Final = 20.0
# How many reads other ranks may have before them. More would keep a step waiting there.
READS_AT_ONCE: Final = 4


class RowOrders:
    """Rank 0's side of one model. Called on the event loop only."""

    def __init__(
        self, model: str, others: Collection[int], send: Callable[[Iterable[int], RankOrder], None]
    ) -> None:
        """`others`: the ranks above 0 that have a part."""
        self._model = model
        self._others = others
        self._send = send
        # by read: the ranks whose calls wait for an order, and those that have one and are not over
        self._asked: dict[int, set[int]] = {}
        self._reading: dict[int, set[int]] = {}
        # rank 0's own calls that wait, by read
        self._waiting: dict[int, asyncio.Event] = {}
        self._is_over = asyncio.Event()
        self._has_ended = False

    def asked(self, rank: int, message: RankAsked) -> None:
        """A rank has a call, or not any more."""
        read = int(message.read)
        if not message.over:
            self._asked.setdefault(read, set()).add(rank)
            if read in self._waiting:
                self._waiting[read].set()
            return
        for known in (self._asked, self._reading):
            if read in known:
                known[read].discard(rank)
                if not known[read]:
                    del known[read]
                    self._is_over.set()

    async def all_asked(self, read: int, ranks: Collection[int], version: int) -> None:
        """Wait until these ranks have their calls. MalformedFrame; VersionGone if one does not come; ModelLost."""
        if len({*ranks} & {*self._others}) < len(ranks):
            raise MalformedFrame(
                problem="a rank that has no part of this model has no rows of it, or is named twice"
            )
        if read in self._waiting:
            raise MalformedFrame(problem="another call has the number of this read")
        changed = self._waiting[read] = asyncio.Event()
        try:
            async with asyncio.timeout(WAIT_S):
                while not self._asked.get(read, set()).issuperset(ranks):
                    changed.clear()
                    await changed.wait()
                    self._require_model()
        except TimeoutError as error:
            lacking = min({*ranks} - self._asked.get(read, set()), default=0)
            raise VersionGone(version=version, model=self._model, rank=lacking, retry_after_s=0.0) from error
        finally:
            del self._waiting[read]

    async def room(self) -> None:
        """Wait until the others have few reads before them. ModelLost."""
        while len(self._reading) >= READS_AT_ONCE:
            self._is_over.clear()
            await self._is_over.wait()
            self._require_model()

    def order(self, read: int, ranks: Collection[int]) -> None:
        """Have these ranks gather their rows of the version that they are at here in the order of tickets."""
        reading = self._asked.pop(read, set()) & {*ranks}
        if reading:
            self._reading[read] = reading
        self._send(ranks, RankOrder(read=RankRead(model=self._model, read=read)))

    def _require_model(self) -> None:
        if self._has_ended:
            raise ModelLost(model=self._model)

    def end(self) -> None:
        """The model is deleted: nobody waits any more."""
        self._has_ended = True
        for waiting in (*self._waiting.values(), self._is_over):
            waiting.set()


class RowReads:
    """Another rank's side: calls for rows that wait for rank 0's order. Called on the event loop only."""

    def __init__(
        self, model: str, rank: int, arenas: Arenas, writer: ModelWriter, say: Callable[[RankMessage], None]
    ) -> None:
        self._model = model
        self._rank = rank
        self._arenas = arenas
        self._writer = writer
        self._say = say
        # by read: what gathers its rows in the writer thread, and who waits for them
        self._waiting: dict[int, tuple[Callable[[], Any], asyncio.Future[Any]]] = {}

    async def ordered(self, read: int, gather: Callable[[], T]) -> T:
        """Run `gather` in the writer thread where rank 0 orders it. MalformedFrame; VersionGone if it does not."""
        if read in self._waiting:
            raise MalformedFrame(problem="another call has the number of this read")
        gathered: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting[read] = gather, gathered
        self._tell(read, over=False)
        try:
            async with asyncio.timeout(WAIT_S):
                return await gathered
        except TimeoutError as error:
            raise self._gone() from error
        finally:
            self._waiting.pop(read, None)
            self._tell(read, over=True)

    def read(self, order: RankRead) -> None:
        """Queue a gathering behind all earlier tickets."""
        gather, gathered = self._waiting.pop(int(order.read), (None, None))
        if gather is not None and gathered is not None and not gathered.done():
            self._writer.submit(gather).add_done_callback(partial(_pass_on, gathered))

    def let_go(self) -> None:
        """Nobody waits for an order any more."""
        for _, gathered in self._waiting.values():
            if not gathered.done():
                gathered.set_exception(self._gone())

    def _gone(self) -> VersionGone:
        return VersionGone(
            version=self._arenas.version, model=self._model, rank=self._rank, retry_after_s=0.0
        )

    def _tell(self, read: int, *, over: bool) -> None:
        self._say(RankMessage(asked=RankAsked(model=self._model, read=read, over=over)))


def _pass_on(gathered: asyncio.Future[T], done: asyncio.Future[T]) -> None:
    """Give what a job has come to to the one who waits for it, if anyone does."""
    error = done.exception()
    if gathered.done():
        return
    if error is not None:
        gathered.set_exception(error)
    else:
        gathered.set_result(done.result())
