"""Rank 0's side of the links: every other rank has one, and nothing is served before all are there.

Orders are queued for each rank and leave in the order in which they were given, so each rank executes the same history.
A link that ends, or is silent for too long, ends the job: pushes that some ranks have stepped and others have not can
only be settled from what all have on their disks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from pushstep.proto.errors import MalformedFrame, PushstepError, RankLost, RanksDiffer
from pushstep.proto.errors.status import TRAILER, brief, named, to_trailer
from pushstep.proto.shards_pb2 import (
    RankContent,
    RankDone,
    RankHello,
    RankMessage,
    RankOrder,
    RankTaken,
    RankWelcome,
)
from pushstep.proto.training_pb2 import Shard
from pushstep.proto.wire import limits

from ..parts.shard import Taker
from ..process.threads import DOWNLOADS
from ..streams.readers import Context
from .words import heard

log = logging.getLogger("pushstep.ranks")
SERVICE: Final = "pushstep.v1.ShardService"
# How often each side says that it lives, and for how long it may be silent.
ALIVE_S: Final = 2.0
SILENCE_S: Final = 30.0
# How many ranks may send what they have of a model at the same time: each has some messages on their way here.
SENDING_AT_ONCE: Final = 4
Receive = Callable[[RankContent], Taker]
M = TypeVar("M", bound=Message)


class Link:
    """One rank's link, as rank 0 has it."""

    def __init__(self, hello: RankHello, serving: asyncio.Task[Any] | None) -> None:
        self.hello = hello
        self._serving = serving
        self.orders: asyncio.Queue[bytes] = asyncio.Queue()
        self.heard_s = asyncio.get_running_loop().time()

    def end(self) -> None:
        """End it. The rank takes rank 0 for lost."""
        if self._serving is not None:
            self._serving.cancel()


class Hub:
    """The links of all other ranks."""

    def __init__(
        self,
        world: int,
        build: str,
        on_message: Callable[[int, RankMessage], None],
        on_lost: Callable[[PushstepError], None],
    ) -> None:
        """`on_message` gets what ranks say, but for answers to numbered orders. `on_lost`: the job is over."""
        self._world = world
        self._build = build
        self._on_message = on_message
        self._on_lost = on_lost
        self.links: dict[int, Link] = {}
        self.all_here = asyncio.Event()
        # the job ends: links may
        self.closing = False
        self._number = 0
        self._asked: dict[tuple[int, int], asyncio.Future[RankDone]] = {}
        # by the number of an order, where what the ranks send for it goes
        self._receiving: dict[int, Receive] = {}
        self._turns = asyncio.Semaphore(SENDING_AT_ONCE)
        # whose links have ended, at the end of the job
        self._gone: dict[int, RankLost] = {}

    def handler(self) -> grpc.GenericRpcHandler:
        """The handler to add to a grpc.aio server."""
        method: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(self._link)
        give: grpc.RpcMethodHandler[Any, Any] = grpc.stream_unary_rpc_method_handler(self._give)
        return grpc.method_handlers_generic_handler(SERVICE, {"Link": method, "Give": give})

    def shards(self, own: Shard) -> list[Shard]:
        """Where all ranks are. `own`: rank 0."""
        hellos = [self.links[rank].hello for rank in range(1, self._world)]
        return [own, *(Shard(rank=h.rank, address=h.address, unix_path=h.unix_path) for h in hellos)]

    def send(self, ranks: Iterable[int], order: RankOrder) -> None:
        """Give an order that nobody answers."""
        message = order.SerializeToString()
        for rank in ranks:
            if rank in self.links:
                self.links[rank].orders.put_nowait(message)

    def asked(self, ranks: Iterable[int], order: RankOrder) -> dict[int, asyncio.Future[RankDone]]:
        """Give an order that each rank answers, once it is done. The answers, by rank; an error is raised by its future."""
        self._number += 1
        order.order = self._number
        found = {}
        for rank in ranks:
            answer: asyncio.Future[RankDone] = asyncio.get_running_loop().create_future()
            answer.add_done_callback(partial(self._answered, (rank, self._number)))
            found[rank] = self._asked[rank, self._number] = answer
            if rank in self._gone:
                answer.set_exception(self._gone[rank])
        self.send(found, order)
        return found

    def _answered(self, asked: tuple[int, int], answer: asyncio.Future[RankDone]) -> None:
        """Forget an order that is answered, or that its giver has given up. A rank never answers for a model withdrawn."""
        self._asked.pop(asked, None)
        if not answer.cancelled():
            answer.exception()  # perhaps nobody waits for it any more

    async def ask(self, ranks: Iterable[int], order: RankOrder) -> dict[int, RankDone]:
        """The same, and wait. Raises the first error."""
        answers = self.asked(ranks, order)
        await asyncio.gather(*answers.values())
        return {rank: answer.result() for rank, answer in answers.items()}

    def received(self, ranks: Iterable[int], order: RankOrder, taking: Receive) -> Awaitable[None]:
        """Give an order that each rank answers by Give first. `taking`: where that goes, by its first message.

        Done when no rank sends any more. Raises the first error.
        """
        answers = self.asked(ranks, order)
        self._receiving[order.order] = taking

        async def wait() -> None:
            try:
                await asyncio.wait(answers.values())
            finally:
                del self._receiving[order.order]
            for answer in answers.values():
                answer.result()

        waiting = asyncio.ensure_future(wait())
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
        return waiting

    async def watch(self) -> None:
        """Say that rank 0 lives, and notice a rank that does not, until this is cancelled."""
        while True:
            await asyncio.sleep(ALIVE_S)
            self.send(self.links, RankOrder(alive=True))
            now_s = asyncio.get_running_loop().time()
            for link in list(self.links.values()):
                if now_s - link.heard_s > SILENCE_S:
                    self._lost(link, f"it has said nothing for {SILENCE_S:.0f} s")
                    link.end()

    async def _link(self, messages: AsyncIterator[bytes], context: Context) -> None:
        link: Link | None = None
        try:
            hello = await self._hello(messages)
            rank = int(hello.rank)
            link = self.links[rank] = Link(hello, asyncio.current_task())
            log.info("rank %d of %d is here: %s", rank, self._world, hello.address)
            if len(self.links) == self._world - 1:
                self.send(self.links, RankOrder(welcome=RankWelcome(world=self._world, build=self._build)))
                self.all_here.set()
            writing = asyncio.create_task(self._write(link, context))
            try:
                async for message in messages:
                    link.heard_s = asyncio.get_running_loop().time()
                    self._take(rank, _parsed(RankMessage, message))
            finally:
                writing.cancel()
            self._lost(link, "its link has ended")
        except asyncio.CancelledError:
            if link is not None:
                self._lost(link, "its link has broken")
            raise
        except Exception as error:  # noqa: BLE001 - the rank is told by name, whatever it was
            refusal = named(error, log)
            if link is not None:
                self._lost(link, refusal.message)
            log.warning("a link was refused: %s", refusal.message)
            await _refuse(context, refusal)

    async def _give(self, messages: AsyncIterator[bytes], context: Context) -> bytes:
        try:
            taker: Taker | None = None
            async with self._turns:
                async for message in messages:
                    content = _parsed(RankContent, message)
                    if taker is None:
                        taker = self._taker(content)
                    await DOWNLOADS.run(taker.take, content)
        except Exception as error:  # noqa: BLE001 - the rank is told by name, whatever it was
            await _refuse(context, named(error, log))
        return RankTaken().SerializeToString()

    def _taker(self, first: RankContent) -> Taker:
        taking = self._receiving.get(int(first.order))
        if taking is None:
            raise MalformedFrame(problem="nobody waits for this part")
        return taking(first)

    async def _write(self, link: Link, context: Context) -> None:
        while True:
            await context.write(await link.orders.get())

    async def _hello(self, messages: AsyncIterator[bytes]) -> RankHello:
        """The first message of a link. RanksDiffer unless it is one of the ranks that are awaited."""
        async with asyncio.timeout(SILENCE_S):
            first = _parsed(RankMessage, await anext(messages, b""))
        hello = first.hello
        rank = int(hello.rank)
        problem = ""
        if first.WhichOneof("said") != "hello":
            problem = "it does not say who it is"
        elif hello.world != self._world:
            problem = f"its job has {hello.world} ranks, this one {self._world}"
        elif hello.build != self._build:
            problem = f"it runs pushstep {hello.build}, rank 0 runs {self._build}"
        elif rank == 0:
            problem = "there is a rank 0 already, which is this one"
        elif rank >= self._world:
            problem = f"there are {self._world} ranks"
        elif rank in self.links:
            problem = "another process is that rank already"
        if problem:
            raise RanksDiffer(rank=rank, problem=problem)
        return hello

    def _take(self, rank: int, message: RankMessage) -> None:
        match message.WhichOneof("said"):
            case "done":
                answer = self._asked.get((rank, int(message.done.order)))
                if answer is None or answer.done():
                    return
                if message.done.HasField("problem"):
                    answer.set_exception(heard(message.done.problem))
                else:
                    answer.set_result(message.done)
            case "failed":
                self._lost(self.links[rank], heard(message.failed).message)
            case "alive" | "hello" | None:
                pass
            case _:
                self._on_message(rank, message)

    def _lost(self, link: Link, problem: str) -> None:
        """A link is over. Until all ranks have come, its rank may come again."""
        rank = int(link.hello.rank)
        lost = RankLost(rank=rank, problem=problem)
        if self.closing:
            self.give_up(rank, lost)
        elif self.all_here.is_set():
            self._on_lost(lost)
        elif self.links.get(rank) is link:
            log.warning("rank %d had come and is gone (%s): it may come again", rank, problem)
            del self.links[rank]

    def let_go(self) -> None:
        """End the links that there are: the job has not begun."""
        self.closing = True
        for link in self.links.values():
            link.end()

    def give_up(self, rank: int, lost: RankLost) -> None:
        """Wait for no answer of a rank any more: the job ends, and somebody may hold a lock while he waits."""
        self._gone[rank] = lost
        for (of, _), answer in list(self._asked.items()):
            if of == rank and not answer.done():
                answer.set_exception(lost)


async def _refuse(context: Context, refusal: PushstepError) -> None:
    await context.abort(refusal.grpc_status, brief(refusal.message), ((TRAILER, to_trailer(refusal)),))


def _parsed(kind: type[M], message: Any) -> M:
    try:
        parsed = kind.FromString(message)
    except DecodeError as error:
        raise MalformedFrame(problem=f"not a {kind.DESCRIPTOR.name}") from error
    limits.check(parsed)
    return parsed
