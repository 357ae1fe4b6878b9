"""What rank 0 shows of its job while ranks are awaited, silent or slow to answer; each rank's counts go up only."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from pushstep.proto.errors import Busy, PushstepError
from pushstep.proto.shards_pb2 import RankDone, RankFigures, RankRates
from pushstep.server.config import Config
from pushstep.server.models.catalog import Catalog
from pushstep.server.operator_door.app import create_app
from pushstep.server.reports import job_view
from pushstep.server.reports.job_view import SILENT_S, JobView, RankRow, RankState, SeenRank
from pushstep.server.reports.reporter import Reporter
from pushstep.server.reports.shown import skew
from tests.support.servers.driven import made

HERE = SeenRank(1, "host:7071", "", 0.0)


class Three:
    """A job of three ranks, whose others are and answer as a test says."""

    world = 3

    def __init__(self) -> None:
        self.others: list[SeenRank] = []
        self.asked: dict[int, asyncio.Future[RankDone]] = {}
        self.questions = 0
        # to all questions; None: none
        self.answer: RankDone | PushstepError | None = None

    def seen(self) -> list[SeenRank]:
        return self.others

    def ask_figures(self, *, rates: bool) -> dict[int, asyncio.Future[RankDone]]:
        self.questions += 1
        self.asked = {each.rank: asyncio.get_running_loop().create_future() for each in self.others}
        for answer in self.asked.values() if self.answer is not None else ():
            if isinstance(self.answer, RankDone):
                answer.set_result(self.answer)
            else:
                answer.set_exception(self.answer)
        return self.asked

    def staged(self) -> int:
        return 0


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    made_here = Catalog(Config(data=tmp_path))
    yield made_here
    made_here.close()


def viewed(catalog: Catalog, *others: SeenRank) -> tuple[JobView, Three]:
    job = Three()
    job.others = list(others)
    return JobView(catalog, job, "host:7070"), job


STATES: dict[str, tuple[dict[str, bool], list[SeenRank], list[str]]] = {
    "nobody is there": ({}, [], ["starting", "awaited", "awaited"]),
    "one is awaited": ({}, [HERE], ["starting", "starting", "awaited"]),
    "all load": ({}, [HERE, replace(HERE, rank=2)], ["starting", "starting", "starting"]),
    "all serve": ({"ready": True}, [HERE, replace(HERE, rank=2)], ["serving"] * 3),
    "one is silent": (
        {"ready": True},
        [HERE, replace(HERE, rank=2, silent_s=SILENT_S + 1)],
        ["serving", "serving", "silent"],
    ),
    "it drains": ({"ready": False, "draining": True}, [HERE, replace(HERE, rank=2)], ["stopping"] * 3),
}


@pytest.mark.parametrize("name", STATES)
def test_readyz_is_for_all_ranks_and_says_which_are_not(name: str, catalog: Catalog) -> None:
    flags, others, states = STATES[name]
    for flag, value in flags.items():
        setattr(catalog, flag, value)
    view, _ = viewed(catalog, *others)
    answer = asyncio.run(asked(catalog, view, "/readyz"))
    unready = {str(rank): state for rank, state in enumerate(states) if state != "serving"}
    assert answer.json() == {"ready": not unready, "ranks_not_ready": unready}
    assert answer.status_code == (503 if unready else 200)
    assert f"pushstep_ready {float(not unready)}" in asyncio.run(scraped(catalog, view))


async def asked(catalog: Catalog, view: JobView, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(create_app(catalog, None, view=view))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get(path)


async def scraped(catalog: Catalog, view: JobView) -> str:
    return (await asked(catalog, view, "/metrics")).text


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that do not answer here never will."""
    monkeypatch.setattr(job_view, "ASK_S", 0.01)


def test_while_ranks_are_awaited_the_route_answers(catalog: Catalog) -> None:
    view, _ = viewed(catalog, HERE)
    answer = asyncio.run(asked(catalog, view, "/v1/shards")).json()
    assert (answer["world"], answer["ready"]) == (3, False)
    assert [rank["state"] for rank in answer["ranks"]] == ["starting", "starting", "awaited"]
    assert [rank["address"] for rank in answer["ranks"]] == ["host:7070", "host:7071", None]
    assert answer["ranks"][2]["bytes"] is None
    assert answer["ranks"][2]["seconds"] is None


def test_a_rank_is_shown_as_it_last_answered(catalog: Catalog) -> None:
    now_s = 100.0
    catalog.clock = lambda: now_s
    view, job = viewed(catalog, HERE)

    async def run() -> list[list[RankRow]]:
        nonlocal now_s
        job.answer = RankDone(figures=RankFigures(steps=7, rates=RankRates(age_s=1)))
        found = [await view.look()]
        now_s, job.answer = 104.0, None
        found.append(await view.look())
        late = job.asked[1]
        job.answer = Busy(what="reads", waiting=9, retry_after_s=1.0)
        found.append(await view.look())
        late.set_result(RankDone(figures=RankFigures(steps=9)))
        found.append(await view.look())
        return found

    first, unanswered, refused, late = asyncio.run(run())
    shown = [
        (row.figures and row.figures.steps, row.age_s)
        for row in (first[1], unanswered[1], refused[1], late[1])
    ]
    assert shown == [(7, 0), (7, 4), (7, 4), (9, 0)]
    # rates are asked for less often, and kept
    assert late[1].figures is not None
    assert late[1].figures.HasField("rates")
    assert first[2].state is RankState.AWAITED


def test_all_who_look_at_once_share_one_question(catalog: Catalog) -> None:
    view, job = viewed(catalog, HERE)

    async def run() -> None:
        await asyncio.gather(*(view.look() for _ in range(10)))

    asyncio.run(run())
    assert job.questions == 1


def test_counts_go_up_only(catalog: Catalog) -> None:
    """Also when a model is deleted, and another of its name made."""

    async def run() -> list[int]:
        reporter, found = Reporter(catalog, lambda: 0), []
        for uid in (b"first", b"second"):
            catalog.models["m"] = model = made()
            model.uid = uid
            for _ in range(2):
                model.counts.step.observe(0.5)
                found.append(reporter.figures().steps)
            del catalog.models["m"]
            found.append(reporter.figures().steps)
            await model.close()
        return found

    assert asyncio.run(run()) == [1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize(
    ("sizes", "expected"), [([], 1.0), ([0, 0], 1.0), ([5], 1.0), ([3, 1], 1.5), ([4, 0, 0, 0], 4.0)]
)
def test_skew(sizes: list[float], expected: float) -> None:
    assert skew(sizes) == expected
