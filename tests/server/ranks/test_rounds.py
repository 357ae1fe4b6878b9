"""The sum of a round, as rank 0 tells the other ranks of it: by a number that no other push has."""

from __future__ import annotations

import asyncio

import torch

from pushstep.proto.shards_pb2 import RankHello, RankOrder
from pushstep.proto.training_pb2 import Shard
from pushstep.proto.types_pb2 import Manifest, Parameter, ParamGroup, Ticket
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Layout
from pushstep.proto.wire.shards import Part
from pushstep.server.coordinator.decision import Reduce, Step
from pushstep.server.coordinator.policies.asynchronous import AsyncPolicy, AsyncSettings
from pushstep.server.links.hub import Hub, Link
from pushstep.server.parts.shard import ModelShard
from pushstep.server.parts.sums import measures
from pushstep.server.ranks.leader import RankLeader
from pushstep.server.staging.gradient import DensePart, StagedPush
from pushstep.server.staging.inspect import measured
from tests.support.servers.driven import made

WHOLE = Layout(
    Manifest(
        parameters=[Parameter(name="w", shape=[30_000], dtype=dtypes.WIRE[torch.float32])],
        groups=[ParamGroup(rule="adagrad")],
    )
)
ROUND = Reduce((), (), False, (), AsyncPolicy(AsyncSettings()))


def ones(part: Part | None) -> StagedPush:
    """A rank's part of a gradient of ones."""
    assert part is not None
    (slot,) = part.layout.slots
    return measured([DensePart(slot.arena, slot.start, (slot,), torch.ones(slot.stop - slot.start))])


def test_a_sum_that_is_not_stepped_is_taken_for_no_other_push() -> None:
    async def run() -> list[int]:
        hub, model = Hub(2, "build", lambda *_: None, lambda _: None), made()
        hub.links[1] = link = Link(RankHello(rank=1, world=2), asyncio.get_running_loop().create_future())
        shard = ModelShard(WHOLE, 0, [Shard(rank=0), Shard(rank=1)])
        leader = RankLeader(hub, model, shard, lambda _: None)
        own, others = shard.parts

        async def summed() -> StagedPush:
            adding = asyncio.create_task(leader.reduce(ROUND, ones(own)))
            number = int(RankOrder.FromString(await link.orders.get()).reduce.reduce)
            sums = measures(ones(others), others) if others is not None else None
            assert sums is not None
            sums.reduce = number
            leader.summed(1, sums)
            return await adding

        def ticketed(push: StagedPush) -> int:
            leader.ticket(Step(Ticket(version=1), push, (), {}))
            return int(RankOrder.FromString(link.orders.get_nowait()).ticket.reduce)

        await summed()  # its round has changed meanwhile: no ticket comes
        found = [ticketed(ones(own)), ticketed(await summed()), ticketed(ones(own))]
        await model.close()
        return found

    assert asyncio.run(run()) == [0, 2, 0]
