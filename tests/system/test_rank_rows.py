"""Rows of a model in several ranks: those that one server gives, bit for bit, and of one version while workers push."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from pushstep.client import Session
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import RowOutOfRange, TooLong, UnknownParameter, WrongDtype, WrongShape
from pushstep.proto.wire.shards import cut
from tests.support.ranks import faulty_rank
from tests.support.ranks.group import RankGroup, running_ranks
from tests.support.servers.harness import RunningServer, wait_until
from tests.support.trainings.bits import array_bits
from tests.support.workers.wire import Wire

WORLDS = (2, 3)
FAULTY = Path(faulty_rank.__file__)
ROWS, WIDTH = 3000, 32
Asked = Mapping[str, Any]
DRAWN = np.random.default_rng(5)
START: dict[str, Any] = {
    "table": DRAWN.standard_normal((ROWS, WIDTH), dtype=np.float32),
    "flat": DRAWN.standard_normal(50_001, dtype=np.float32),
    "half": torch.randn(400, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    "doubles": DRAWN.standard_normal((700, 9)),
    "bias": np.ones(3, np.float32),
    "scalar": np.ones((), np.float32),
}
GROUPS: list[dict[str, Any]] = [{"rule": "adagrad", "params": list(START), "lr": 0.1}]
ASKED: dict[str, Asked] = {
    "in any order, some twice": {"table": DRAWN.integers(0, ROWS, 500)},
    "of the first rank": {"table": [0, 1, 0]},
    "of the last rank": {"half": [399]},
    "all of a table": {"table": np.arange(ROWS)},
    "elements": {"flat": DRAWN.integers(0, 50_001, 2000)},
    "of several": {
        name: DRAWN.integers(0, len(START[name]), 90) for name in ("doubles", "half", "table", "bias")
    },
    "of some none": {"bias": [2], "table": [], "half": np.zeros(0, np.int64), "flat": [50_000]},
    "none at all": {"table": [], "half": []},
}


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RankGroup]]:
    with (
        running_ranks(tmp_path_factory.mktemp("two"), WORLDS[0]) as two,
        running_ranks(tmp_path_factory.mktemp("three"), WORLDS[1]) as three,
    ):
        yield [two, three]


@pytest.fixture(scope="module")
def three(groups: list[RankGroup]) -> RankGroup:
    return groups[1]


def trained(server: RunningServer, model: str, **options: Any) -> Session:
    """A session with a model after two steps, one of them of rows."""
    session = server.connect(model, **options)
    session.create(START, GROUPS)
    drawn = np.random.default_rng(3)
    dense = {"flat": drawn.standard_normal(50_001, dtype=np.float32), "half": torch.ones(400, 64)}
    ids = drawn.integers(0, ROWS, 400)
    session.push({**dense, "table": (ids, drawn.standard_normal((400, WIDTH), dtype=np.float32))})
    session.push({"doubles": np.ones((700, 9)), "bias": np.ones(3, np.float32)})
    return session


@pytest.mark.parametrize("wire", [None, "bfloat16"])
def test_the_same_rows_as_one_server(
    server: RunningServer, groups: list[RankGroup], model_name: str, wire: str | None
) -> None:
    """To a worker, to a reader that has never joined, and by a cache."""

    def run(of: RunningServer) -> dict[str, Any]:
        with trained(of, model_name, wire=wire) as session, of.connect(model_name, "r", wire=wire) as reader:
            found: dict[str, Any] = {}
            for name, asked in ASKED.items():
                rows = session.pull_rows(asked)
                assert list(rows) == list(asked)
                found[name] = [array_bits(rows), {each: row.dtype for each, row in rows.items()}]
                assert array_bits(reader.pull_rows(asked)) == found[name][0]
                assert array_bits(session.row_cache().get(asked)) == found[name][0]
            found["by a name"] = session.pull_rows("doubles", [699, 0]).tobytes()
            return found

    alone = run(server)
    for group in groups:
        assert run(group.leader) == alone


def test_a_model_that_lies_in_rank_0_alone(server: RunningServer, three: RankGroup, model_name: str) -> None:
    values = {"w": np.arange(30, dtype=np.float32).reshape(10, 3)}
    with three.leader.connect(model_name) as session:
        session.create(values)
        assert session.pull_rows("w", [9, 0, 9]).tolist() == values["w"][[9, 0, 9]].tolist()
        assert session._transport.shards is not None
        assert [shard.rank for shard in session._transport.shards.shards] == [0]


def test_more_ids_than_a_message_of_selections_holds(three: RankGroup, model_name: str) -> None:
    """Of one parameter; those of the middle rank alone are too many for its selection, too."""
    values = np.arange(1_500_000, dtype=np.float32)
    ids = np.concatenate([np.arange(1_499_999, 400_000, -1), [3, 3]])
    with three.leader.connect(model_name) as session:
        session.create({"a": values, "b": np.zeros(4, np.float32)})
        assert np.array_equal(session.pull_rows("a", ids), values[ids])
        with pytest.raises(TooLong):
            session.pull_rows({"a": ids, "b": [0]})


BAD: dict[str, tuple[Asked, type[Exception]]] = {
    "behind the last": ({"table": [0, ROWS]}, RowOutOfRange),
    "below 0": ({"bias": [-1], "table": [0]}, RowOutOfRange),
    "no integers": ({"table": [0.5]}, WrongDtype),
    "of nothing": ({"nothing": [0]}, UnknownParameter),
    "of a scalar": ({"scalar": [0], "table": [1]}, RowOutOfRange),
    "none of a scalar": ({"scalar": [], "table": [1]}, WrongShape),
}


@pytest.mark.parametrize("case", BAD)
def test_rows_that_there_are_not(server: RunningServer, three: RankGroup, model_name: str, case: str) -> None:
    """Refused as by one server, and the session goes on."""
    asked, error = BAD[case]
    for of in (server, three.leader):
        with of.connect(model_name) as session:
            session.create(START, GROUPS)
            with pytest.raises(error):
                session.pull_rows(asked)
            assert session.pull_rows("table", [7]).tobytes() == START["table"][[7]].tobytes()


def test_every_answer_is_of_one_version(three: RankGroup, model_name: str) -> None:
    """Two workers push the same to all rows, so rows of two versions differ."""
    tables = {"a": np.zeros((4000, 8), np.float32), "b": np.zeros((40_000, 1), np.float32)}
    ones = {name: np.ones_like(table) for name, table in tables.items()}
    asked = {"a": np.arange(0, 4000, 400), "b": np.arange(39_999, 0, -3000)}
    seen: set[float] = set()
    with (
        three.leader.connect(model_name, "w0") as first,
        three.leader.connect(model_name, "w1") as second,
        three.leader.connect(model_name, "w2") as third,
        ThreadPoolExecutor(2) as pool,
    ):
        for session in (first, second, third):
            session.create(tables, [{"rule": "adagrad", "params": ["a", "b"]}])
        done: list[bool] = []

        def push(session: Session) -> int:
            count = 0
            while not done:
                session.push(ones)
                count += 1
            return count

        pushing = [pool.submit(push, session) for session in (first, second)]
        cache = third.row_cache(1)
        try:
            for turn in range(120):
                cache.prefetch(asked)
                rows = third.pull_rows(asked) if turn % 2 else cache.get(asked)
                values = {float(value) for row in rows.values() for value in row.ravel()}
                assert len(values) == 1, values
                seen |= values
        finally:
            done.append(True)
        pushes = sum(pushed.result() for pushed in pushing)
        assert third.push(ones).version == pushes + 1
    assert len(seen) > 10


def test_rows_asked_for_beside_a_push_need_no_pull(three: RankGroup, model_name: str) -> None:
    with three.leader.connect(model_name) as session:
        session.create(START, GROUPS)
        cache = session.row_cache(1)
        for batch in range(6):
            asked = {"table": np.arange(batch, ROWS, 7), "flat": [batch, 50_000 - batch]}
            cache.prefetch(asked)
            session.push({"table": (np.array([batch, ROWS - 1 - batch]), np.ones((2, WIDTH), np.float32))})
            assert cache.get(asked)["table"].shape == (len(asked["table"]), WIDTH)
        assert cache.misses == 0
        cache.forget()
        values = session.pull()
        assert array_bits(cache.get(asked)) == array_bits({n: values[n][asked[n]] for n in asked})


def test_a_job_that_becomes_one_server_and_ranks_again(tmp_path: Path, model_name: str) -> None:
    """A worker that only reads rows learns of it by them."""
    group = RankGroup(tmp_path, 2)
    asked = {"table": np.arange(0, ROWS, 50), "flat": [50_000, 0]}
    try:
        with (
            group.leader.connect(model_name, "w0", retry_for_s=60.0) as session,
            group.leader.connect(model_name, "r0", retry_for_s=60.0) as reader,
        ):
            session.create(START, GROUPS)
            cache = reader.row_cache()
            rows = array_bits(cache.get(asked))
            for others in ([], [None]):
                for rank in group.ranks:  # `stop` would close the sessions
                    rank.process.send_signal(signal.SIGTERM)
                group.ended(0)
                group.become(*others)
                group.start()
                cache.forget()
                cache.prefetch(asked)
                assert array_bits(cache.get(asked)) == rows
                assert array_bits(reader.pull_rows(asked)) == rows
    finally:
        for rank in group.ranks:
            rank.kill()


def test_nothing_is_shown_before_all_ranks_have_it(tmp_path: Path, model_name: str) -> None:
    """At `durable`, on its disk; also a rank that has none of the rows. A call that waits for its order ends with the job."""
    with running_ranks(tmp_path, 3, "--durability", "durable") as group:
        group.stop()
        group.start({2: (sys.executable, FAULTY, "fdatasync:", "wait")})
        armed = tmp_path / "armed"
        with group.leader.connect(model_name, "w0") as session, group.leader.connect(model_name) as reader:
            session.create(
                {"table": np.zeros((ROWS, WIDTH), np.float32)}, [{"rule": "adagrad", "params": ["table"]}]
            )
            before = reader.pull_rows("table", [0])
            with ThreadPoolExecutor(2) as pool:
                armed.touch()
                try:
                    pushed = pool.submit(session.push, {"table": ([0, 1], np.ones((2, WIDTH), np.float32))})
                    show = f"/v1/models/{model_name}"
                    wait_until(lambda: group.leader.rest("GET", show).json()["version"] == 1)
                    pulled = pool.submit(reader.pull_rows, "table", [0])
                    with pytest.raises(TimeoutError):
                        pulled.result(0.5)
                finally:
                    armed.unlink()
                assert pushed.result(20).version == 1
                assert (pulled.result(20) != before).all()
            layout = session.member().layout
        part = cut(layout, 3)[1]
        assert part is not None
        asked = pb.PullRowsRequest(model=model_name, manifest_hash=part.layout.manifest_hash, read=77)
        wire = Wire(group.ranks[1].grpc)
        waiting = wire.start("PullRows", [asked.SerializeToString()])
        assert group.kill(2) == [6, 6]
        with pytest.raises(grpc.RpcError):
            next(waiting)
        wire.close()
