"""Rounds of a model that lies in several ranks: each adds up its own parts, and rank 0 waits for what the others say of theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pushstep.proto.errors import ModelLost
from pushstep.proto.shards_pb2 import RankOrder, RankReduce, RankSums
from pushstep.proto.types_pb2 import Contribution

from ..coordinator.decision import Reduce
from ..links.hub import Hub
from ..links.words import heard


class RoundSums:
    """Rank 0's side of one model. Called on the event loop only."""

    def __init__(self, hub: Hub, model: str, others: Sequence[int]) -> None:
        """`others`: the ranks above 0 that have a part."""
        self._hub = hub
        self._model = model
        self._others = others
        self._number = 0
        # by round, each other rank's answer
        self._sums: dict[int, dict[int, asyncio.Future[RankSums]]] = {}

    async def added(self, reduce: Reduce) -> tuple[int, dict[int, RankSums]]:
        """Have the others add up their parts; the round's number, and what each says. ModelLost; what a rank says instead."""
        self._number = number = self._number + 1
        loop = asyncio.get_running_loop()
        self._sums[number] = answers = {rank: loop.create_future() for rank in self._others}
        contributions = [Contribution(identity=p.identity, weight=p.weight) for p in reduce.pushes]
        order = RankReduce(
            model=self._model, reduce=number, contributions=contributions, divisor=reduce.divisor
        )
        self._hub.send(self._others, RankOrder(reduce=order))
        try:
            await asyncio.gather(*answers.values())
        finally:
            del self._sums[number]
        return number, {rank: answer.result() for rank, answer in answers.items()}

    def summed(self, rank: int, message: RankSums) -> None:
        """A rank has added up its parts of a round."""
        answer = self._sums.get(int(message.reduce), {}).get(rank)
        if answer is None or answer.done():
            return
        if message.HasField("problem"):
            answer.set_exception(heard(message.problem))
        else:
            answer.set_result(message)

    def end(self) -> None:
        """The model is deleted: what the others say of it is not heard any more."""
        for answer in [each for of in self._sums.values() for each in of.values()]:
            if not answer.done():
                answer.set_exception(ModelLost(model=self._model))
