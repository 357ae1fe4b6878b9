"""Copies of models and files of checkpoints: one for all who ask for the same, few at once, gone with the last reader."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from pushstep.proto.errors import ExportsBusy
from pushstep.server.arenas.statistics import BLOCK_ELEMENTS, statistics
from pushstep.server.models.copies import Copies
from tests.support.processes.bounded import run
from tests.support.servers import operators
from tests.support.servers.harness import RunningServer, forget_peak, memory_bytes, running_server, wait_until

MIB = 1 << 20


class Made:
    """What was made and discarded, in order; making waits until told."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.discarded: list[str] = []
        self.go = asyncio.Event()

    async def make(self, name: str) -> str:
        await self.go.wait()
        self.made.append(name)
        return name

    async def read(self, copies: Copies[str], name: str, until: asyncio.Event) -> str:
        async with copies.shared(name, lambda: self.make(name)) as copy:
            await until.wait()
            return copy


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_all_who_ask_for_the_same_share_one() -> None:
    async def case() -> None:
        made, over = Made(), asyncio.Event()
        copies = Copies(2, made.discarded.append)
        readers = [asyncio.ensure_future(made.read(copies, "a", over)) for _ in range(10)]
        await turns()
        made.go.set()
        await turns()
        late = asyncio.ensure_future(made.read(copies, "a", over))
        await turns()
        assert (made.made, made.discarded) == (["a"], [])
        over.set()
        assert await asyncio.gather(*readers, late) == ["a"] * 11
        await turns()
        assert (made.made, made.discarded) == (["a"], ["a"])

    run(case)


def test_beyond_the_limit_others_are_told_to_come_back() -> None:
    async def case() -> None:
        made, over = Made(), asyncio.Event()
        copies = Copies(2, made.discarded.append)
        made.go.set()
        readers = [asyncio.ensure_future(made.read(copies, name, over)) for name in "aab"]
        await turns()
        with pytest.raises(ExportsBusy) as caught:
            await made.read(copies, "c", over)
        assert caught.value.retry_after_s
        over.set()
        await asyncio.gather(*readers)
        await turns()
        assert await made.read(copies, "c", over) == "c"

    run(case)


def test_a_reader_that_goes_away_leaves_the_others_theirs() -> None:
    """And what nobody waits for any more counts until it is made, then goes."""

    async def case() -> None:
        made, over = Made(), asyncio.Event()
        copies = Copies(1, made.discarded.append)
        first, second = (asyncio.ensure_future(made.read(copies, "a", over)) for _ in range(2))
        await turns()
        first.cancel()
        await turns()
        over.set()
        made.go.set()
        assert await second == "a"
        await turns()
        assert made.discarded == ["a"]
        made.go.clear()
        alone = asyncio.ensure_future(made.read(copies, "b", over))
        await turns()
        alone.cancel()
        await turns()
        with pytest.raises(ExportsBusy):
            await made.read(copies, "c", over)
        made.go.set()
        await turns()
        assert made.discarded == ["a", "b"]
        assert await made.read(copies, "c", over) == "c"

    run(case)


def test_one_that_cannot_be_made_is_asked_for_anew() -> None:
    async def case() -> None:
        async def fail() -> str:
            raise OSError("full")

        copies: Copies[str] = Copies(1)
        for _ in range(3):
            with pytest.raises(OSError, match="full"):
                async with copies.shared("a", fail):
                    raise AssertionError
            await turns()

    run(case)


@pytest.mark.parametrize("elements", [0, 1, 5, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_statistics_are_those_of_the_whole(elements: int, dtype: torch.dtype) -> None:
    values = torch.randn(elements, generator=torch.Generator().manual_seed(1)).to(dtype)
    shown, wide = statistics(values), values.double()
    if not elements:
        assert set(shown.values()) == {None}
        return
    assert (shown["min"], shown["max"]) == (float(wide.min()), float(wide.max()))
    assert shown["mean"] == pytest.approx(
        float(wide.mean()), rel=1e-12, abs=1e-15
    )  # float64's, added up otherwise
    assert shown["norm"] == pytest.approx(float(torch.linalg.vector_norm(wide)), rel=1e-12)
    values[-1] = math.nan
    assert all(math.isnan(number or 0) for number in statistics(values).values())


SIZE = 24 * MIB


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> RunningServer:
    """A model of 48 MiB with its state, and a snapshot of it."""
    with running_server(tmp_path_factory.mktemp("large") / "data") as running:
        session = running.connect("m")
        values = {"w": np.ones(SIZE // 4, np.float32)}
        session.create(values)
        session.push(values)
        operators.take_snapshot(running, "m")
        yield running


PATHS = {
    "export": "/export",
    "a torch export": "/export?format=torch",
    "a snapshot's content": "/snapshots/{snapshot}/content",
    "a snapshot": "/snapshots/{snapshot}",
    "the state_dict": "/state-dict",
    "a parameter": "/parameters/w",
}


@pytest.mark.parametrize("what", PATHS)
def test_twelve_at_once_take_the_memory_of_one(what: str, large: RunningServer) -> None:
    snapshot = large.rest("GET", "/v1/models/m/snapshots").json()["snapshots"][0]
    path = "/v1/models/m" + PATHS[what].format(snapshot=snapshot["id"])
    start = threading.Barrier(12, timeout=20)

    def ask(_: int) -> int:
        start.wait()
        return large.rest("GET", path).status_code

    before = memory_bytes(large.process.pid)
    forget_peak(large.process.pid)
    with ThreadPoolExecutor(12) as asking:
        assert list(asking.map(ask, range(12))) == [200] * 12
    # of parameters and state, and what a dozen downloads take on their way
    assert memory_bytes(large.process.pid, "VmHWM") - before < 2 * SIZE + 40 * MIB
    wait_until(lambda: not operators.checkpoints_held(large))


@pytest.mark.parametrize("header", ["bytes=9-5", "bytes=99999999999-", "lines=1-2", "bytes=0-0,5-9"])
def test_a_download_leaves_no_file(header: str, large: RunningServer) -> None:
    large.rest("GET", "/v1/models/m/export", headers={"Range": header})
    wait_until(lambda: not operators.checkpoints_held(large))


def test_few_files_of_different_versions_exist_at_once(data: Path) -> None:
    with running_server(data) as server, contextlib.ExitStack() as reading:
        session = server.connect("m")
        values = {"w": np.ones(SIZE // 4, np.float32)}
        session.create(values)
        answers = []
        for _ in range(6):
            session.push(values)
            answers.append(operators.begin_download(server, "m/export", reading))
        statuses = [answer.status for answer in answers]
        assert statuses == [200] * 4 + [503] * 2
        assert answers[-1].getheader("Retry-After") is not None
        assert answers[-1].getheader("content-type") == "application/problem+json"
        assert operators.checkpoints_held(server) == 4
        assert session.push(values).version
        reading.close()
        wait_until(lambda: not operators.checkpoints_held(server))
        assert operators.download(server, "m/export", "safetensors")
