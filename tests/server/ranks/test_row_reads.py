"""Who waits for whom before rows of several ranks are read, and that nothing is kept of reads that come to nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from pushstep.proto.errors import MalformedFrame, ModelLost, VersionGone
from pushstep.proto.shards_pb2 import RankAsked, RankMessage, RankOrder, RankRead
from pushstep.server.parts import row_reads
from pushstep.server.parts.row_reads import READS_AT_ONCE, RowOrders, RowReads


class Orders:
    """Rank 0 of three, and what it has ordered."""

    def __init__(self) -> None:
        self.sent: list[tuple[list[int], int]] = []
        self.reads = RowOrders("m", [1, 2], self._send)

    def _send(self, ranks: Iterable[int], order: RankOrder) -> None:
        self.sent.append((list(ranks), int(order.read.read)))

    def hear(self, rank: int, read: int, *, over: bool = False) -> None:
        self.reads.asked(rank, RankAsked(model="m", read=read, over=over))

    @property
    def is_empty(self) -> bool:
        return not (self.reads._asked or self.reads._reading or self.reads._waiting)


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_rank_0_orders_once_all_have_their_calls() -> None:
    async def run() -> None:
        zero = Orders()
        zero.hear(2, 7)
        waiting = asyncio.ensure_future(zero.reads.all_asked(7, [1, 2], 3))
        await turns()
        assert not waiting.done()
        with pytest.raises(MalformedFrame):
            await zero.reads.all_asked(7, [1, 2], 3)
        zero.hear(1, 8)
        await turns()
        assert not waiting.done()
        zero.hear(1, 7)
        await waiting
        zero.reads.order(7, [1, 2])
        assert zero.sent == [([1, 2], 7)]
        for rank, read in ((1, 7), (1, 8), (2, 7)):
            assert not zero.is_empty
            zero.hear(rank, read, over=True)
        assert zero.is_empty

    asyncio.run(run())


@pytest.mark.parametrize("ranks", [[0], [3], [1, 1]])
def test_ranks_without_a_part(ranks: list[int]) -> None:
    async def run() -> None:
        zero = Orders()
        with pytest.raises(MalformedFrame):
            await zero.reads.all_asked(7, ranks, 3)
        assert zero.is_empty

    asyncio.run(run())


def test_a_call_that_does_not_come_or_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_reads, "WAIT_S", 0.02)

    async def run() -> None:
        zero = Orders()
        zero.hear(1, 7)
        zero.hear(1, 7, over=True)
        zero.hear(2, 7)
        with pytest.raises(VersionGone, match="rank 1"):
            await zero.reads.all_asked(7, [1, 2], 3)
        zero.hear(2, 7, over=True)
        assert zero.is_empty

    asyncio.run(run())


def test_a_rank_has_few_reads_before_it() -> None:
    async def run() -> None:
        zero = Orders()
        for read in range(READS_AT_ONCE):
            zero.hear(1, read)
            await zero.reads.room()
            zero.reads.order(read, [1])
        waiting = asyncio.ensure_future(zero.reads.room())
        await turns()
        assert not waiting.done()
        zero.hear(1, 0, over=True)
        await waiting
        # of a call that has ended before its order nothing comes any more
        zero.reads.order(99, [1])
        await zero.reads.room()

    asyncio.run(run())


def test_nobody_waits_for_a_model_that_is_deleted() -> None:
    async def run() -> None:
        zero = Orders()
        for read in range(READS_AT_ONCE):
            zero.hear(1, read)
            zero.reads.order(read, [1])
        waits = [zero.reads.all_asked(50, [1], 3), zero.reads.room()]
        waiting = [asyncio.ensure_future(each) for each in waits]
        await turns()
        zero.reads.end()
        for each in waiting:
            with pytest.raises(ModelLost):
                await each

    asyncio.run(run())


class Other:
    """Rank 1, its writer, and what it has said."""

    def __init__(self) -> None:
        self.said: list[tuple[int, bool]] = []
        self._thread = ThreadPoolExecutor(1)
        arenas: Any = SimpleNamespace(version=4)
        self.reads = RowReads("m", 1, arenas, self._writer(), self._say)

    def _writer(self) -> Any:
        def submit(job: Callable[[], Any]) -> asyncio.Future[Any]:
            return asyncio.get_running_loop().run_in_executor(self._thread, job)

        return SimpleNamespace(submit=submit)

    def _say(self, message: RankMessage) -> None:
        self.said.append((int(message.asked.read), message.asked.over))


def test_a_rank_gathers_where_it_is_ordered() -> None:
    async def run() -> None:
        other = Other()
        other.reads.read(RankRead(model="m", read=7))  # of a call that has gone
        waiting = asyncio.ensure_future(other.reads.ordered(7, lambda: "rows"))
        await turns()
        assert other.said == [(7, False)]
        with pytest.raises(MalformedFrame):
            await other.reads.ordered(7, lambda: "others")
        other.reads.read(RankRead(model="m", read=7))
        assert await waiting == "rows"
        assert other.said == [(7, False), (7, True)]
        assert not other.reads._waiting

    asyncio.run(run())


def test_what_gathering_raises_is_the_caller_s() -> None:
    def fail() -> None:
        raise ModelLost(model="m")

    async def run() -> None:
        other = Other()
        waiting = asyncio.ensure_future(other.reads.ordered(7, fail))
        await turns()
        other.reads.read(RankRead(model="m", read=7))
        with pytest.raises(ModelLost):
            await waiting

    asyncio.run(run())


@pytest.mark.parametrize("ends", ["cancelled", "late", "let go"])
def test_nothing_is_kept_of_a_call_without_an_order(monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    monkeypatch.setattr(row_reads, "WAIT_S", 0.02 if ends == "late" else 20.0)

    async def run() -> None:
        other = Other()
        waiting = asyncio.ensure_future(other.reads.ordered(7, lambda: "rows"))
        await turns()
        if ends == "cancelled":
            waiting.cancel()
        elif ends == "let go":
            other.reads.let_go()
        with pytest.raises(asyncio.CancelledError if ends == "cancelled" else VersionGone):
            await waiting
        assert other.said == [(7, False), (7, True)]
        other.reads.read(RankRead(model="m", read=7))
        assert not other.reads._waiting

    asyncio.run(run())
