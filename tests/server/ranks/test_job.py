"""Who a rank is, where all go on, and what a link is refused for."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc
import pytest

from pushstep.proto.errors import MalformedFrame, PushstepError, RankLost, RanksDiffer
from pushstep.proto.errors.status import from_rpc_error
from pushstep.proto.shards_pb2 import RankContent, RankHello, RankMessage
from pushstep.server.config import Config
from pushstep.server.links.hub import SERVICE, Hub
from pushstep.server.links.job import Job, job_of
from pushstep.server.parts.shard import Goal, Survey
from pushstep.server.ranks.recovery import goal_of

WHOLE = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("environ", [{}, {"RANK": "0"}, {**WHOLE, "WORLD_SIZE": "1"}])
def test_a_server_alone_is_no_rank(environ: dict[str, str]) -> None:
    assert job_of(environ) is None


def test_what_torchrun_says() -> None:
    assert job_of(WHOLE) == Job(1, 3, 1)
    assert job_of({**WHOLE, "LOCAL_RANK": "0"}) == Job(1, 3, 0)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": ""}, "RANK is missing"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "MASTER_ADDR, MASTER_PORT is missing"),
        ({"RANK": "3"}, "RANK is 3, and WORLD_SIZE 3"),
        ({"RANK": "-1"}, "no number"),
        ({"WORLD_SIZE": "many"}, "no number"),
        ({"WORLD_SIZE": "4000"}, "at most 1024"),
        ({"WORLD_SIZE": "0"}, "at most 1024"),
    ],
)
def test_an_environment_that_contradicts_itself(changed: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        job_of({**WHOLE, **changed})


def test_each_rank_has_a_folder_and_a_port_of_its_own() -> None:
    config = Config(grpc="127.0.0.1:7070", unix="/tmp/s").of_rank(2, 1)
    assert (config.grpc, config.data.name, config.unix) == ("127.0.0.1:7071", "rank-2", "/tmp/s.2")
    assert Config(grpc="[::1]:0").of_rank(2, 1).grpc == "[::1]:0"
    with pytest.raises(ValueError, match="--device cpu"):
        Config(device="cuda").of_rank(0, 0)


def survey(version: int = 5, **changed: Any) -> Survey:
    return Survey(
        **{
            "uid": b"u", "timeline": 2, "identity_timeline": 2, "version": version, "proven": True,
            "reaches": [(0, version)],
        }
        | changed
    )  # fmt: skip


OWN = survey(others=(1, 2))


@pytest.mark.parametrize(
    ("own", "theirs", "expected"),
    [
        (OWN, [survey(), survey()], Goal()),
        (OWN, [survey(), survey(4)], Goal(4, 3)),
        (OWN, [survey(7), survey(6)], Goal(5, 3)),
        (OWN, [survey(proven=False), survey()], Goal(5, 3)),
        (OWN, [survey(timeline=1, identity_timeline=4), survey()], Goal(5, 5)),
        # without a journal only snapshots count: ranks that have saved apart go back to one that all have
        (
            survey(4, reaches=[(4, 4), (2, 2), (0, 0)], others=(1,)),
            [survey(3, reaches=[(3, 3), (2, 2), (0, 0)])],
            Goal(2, 3),
        ),
        (survey(4, reaches=[(4, 4), (0, 3)], others=(1,)), [survey(3, reaches=[(2, 3)])], Goal(3, 3)),
    ],
)
def test_all_meet_at_the_newest_version_that_all_have(
    own: Survey, theirs: list[Survey], expected: Goal
) -> None:
    assert goal_of("m", own, {rank: {"m": found} for rank, found in enumerate(theirs, 1)}) == expected


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({1: {"m": survey()}, 2: {}}, "rank 2: it has nothing of it"),
        ({1: {"m": survey(uid=b"v")}, 2: {"m": survey()}}, "rank 1: it has a part of another model"),
        ({1: {"m": survey()}, 2: {"m": Survey(problem=RankLost(rank=2, problem="x"))}}, "rank 2: .*x"),
        (
            {1: {"m": survey(4, reaches=[(4, 4)])}, 2: {"m": survey(3, reaches=[(1, 1), (3, 3)])}},
            "no version in common .*rank 0: 0 to 5; rank 1: 4; rank 2: 1, 3",
        ),
    ],
)
def test_a_model_that_a_rank_lacks_is_not_served(
    theirs: Mapping[int, Mapping[str, Survey]], said: str
) -> None:
    goal = goal_of("m", OWN, theirs)
    assert goal.refused is not None
    with pytest.raises(PushstepError, match=said):
        raise goal.refused


HELLO = {"rank": 1, "world": 3, "build": "1.0", "address": "host:1"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rank": 0}, "there is a rank 0 already"),
        ({"rank": 3}, "there are 3 ranks"),
        ({"rank": 2}, "another process is that rank already"),
        ({"world": 2}, "its job has 2 ranks, this one 3"),
        ({"build": "0.9"}, "it runs pushstep 0.9"),
    ],
)
def test_a_link_that_does_not_fit_is_refused_by_name(changed: dict[str, Any], said: str) -> None:
    asyncio.run(refused_link(changed, said))


async def refused_link(changed: dict[str, Any], said: str) -> None:
    lost: list[PushstepError] = []
    server, hub = grpc.aio.server(), Hub(3, "1.0", lambda *_: None, lost.append)
    server.add_generic_rpc_handlers((hub.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        link: Any = channel.stream_stream(
            f"/{SERVICE}/Link", request_serializer=None, response_deserializer=None
        )
        second = link()
        await second.write(RankMessage(hello=RankHello(**{**HELLO, "rank": 2})).SerializeToString())
        while 2 not in hub.links:
            await asyncio.sleep(0.01)
        call = link()
        await call.write(RankMessage(hello=RankHello(**{**HELLO, **changed})).SerializeToString())
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        refusal = from_rpc_error(raised.value)
        assert isinstance(refusal, RanksDiffer)
        assert said in refusal.message
        assert list(hub.links) == [2]
        assert lost == []
        hub.closing = True
        second.cancel()
    await server.stop(None)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (RankContent(rank=1, order=7).SerializeToString(), "nobody waits for this part"),
        (b"no message", "not a RankContent"),
    ],
)
def test_a_part_that_nobody_waits_for_is_refused_by_name(message: bytes, said: str) -> None:
    asyncio.run(refused_part(message, said))


async def refused_part(message: bytes, said: str) -> None:
    server, hub = grpc.aio.server(), Hub(3, "1.0", lambda *_: None, lambda _: None)
    server.add_generic_rpc_handlers((hub.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        give: Any = channel.stream_unary(
            f"/{SERVICE}/Give", request_serializer=None, response_deserializer=None
        )
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await give(iter([message]))
    await server.stop(None)
    refusal = from_rpc_error(raised.value)
    assert isinstance(refusal, MalformedFrame)
    assert said in refusal.message
