"""Tickets to create models, in all ranks: what lapses at rank 0 is forgotten by the others, too."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from pushstep.proto.shards_pb2 import RankCreate, RankOrder, RankWithdraw
from pushstep.proto.training_pb2 import Shard
from pushstep.proto.types_pb2 import Manifest, Parameter, ParamGroup
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Layout
from pushstep.server.config import Config
from pushstep.server.links.job import Job
from pushstep.server.models.catalog import Catalog
from pushstep.server.models.creations import CREATION_S
from pushstep.server.ranks.other import OtherRank
from pushstep.server.ranks.zero import RankZero

FLOAT32 = dtypes.BY_NAME["float32"]
WHOLE = Layout(
    Manifest(
        parameters=[Parameter(name="w", shape=[30_000], dtype=dtypes.WIRE[FLOAT32])],
        groups=[ParamGroup(rule="adagrad")],
    )
)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    made = Catalog(Config(data=tmp_path))
    yield made
    made.close()


def test_rank_0_takes_back_what_lapses(catalog: Catalog) -> None:
    async def run() -> list[bool]:
        zero = RankZero(Job(0, 2, 0), "build", catalog, lambda _: None)
        zero._addresses = [Shard(rank=0), Shard(rank=1)]
        now_s = catalog.clock()
        catalog.creations.promised("m", 5, b"", 1000, now_s + CREATION_S)
        zero.announce("m", 5, zero.shard(WHOLE))
        found = []
        for later_s in (0.0, CREATION_S + 1):
            catalog.clock = lambda later_s=later_s: now_s + later_s
            zero.sweep()
            await asyncio.sleep(0)
            found.append(bool(zero._announced or zero.hub._asked))
        return found

    assert asyncio.run(run()) == [True, False]


def test_another_rank_forgets_what_is_taken_back(catalog: Catalog) -> None:
    async def run() -> tuple[bool, bool]:
        other = OtherRank(Job(1, 2, 0), catalog, lambda _: None)
        create = RankCreate(model="m", ticket=5, manifest=WHOLE.manifest, uid=b"u" * 16)
        await other.take(RankOrder(create=create))
        await other.creations.until_promised("m", 5)
        held = catalog.creations.get("m") is not None
        await other.take(RankOrder(withdraw=RankWithdraw(model="m", ticket=5)))
        return held, catalog.creations.get("m") is None and not other.creations._promised

    assert asyncio.run(run()) == (True, True)
