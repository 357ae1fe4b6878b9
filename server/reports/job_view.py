"""What rank 0 knows of all ranks, for operators: each rank is asked when somebody looks, and never while a push waits.

A rank that does not answer in time is shown as it last answered, with the age of that. All who look at once share one
question. A server alone has the same view, of one rank, and asks nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Final, Protocol

from pushstep.proto.shards_pb2 import RankDone, RankFigures

from ..capacity.rates import Measured
from ..models.catalog import Catalog
from ..models.model import Model
from .reporter import Reporter

# How long a look waits for ranks, and one that has them measure rates.
ASK_S: Final = 1.0
MEASURE_S: Final = 20.0
# A rank that has not been heard of for so long is not ready. Each says every 2 s that it lives; after 30 s it is lost.
SILENT_S: Final = 10.0


class RankState(StrEnum):
    """What a rank does."""

    AWAITED = "awaited"
    STARTING = "starting"
    SERVING = "serving"
    SILENT = "silent"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class SeenRank:
    """A rank whose link is open. `silent_s`: since when nothing was heard of it."""

    rank: int
    address: str
    unix_path: str
    silent_s: float


class Job(Protocol):
    """The ranks of a job, as rank 0 has them."""

    world: int

    def seen(self) -> Sequence[SeenRank]:
        """The ranks above 0 that are there."""

    def ask_figures(self, *, rates: bool) -> Mapping[int, asyncio.Future[RankDone]]:
        """Ask them all for their figures."""

    def staged(self) -> int:
        """Pushes whose part is in rank 0, and which are not stepped yet."""


@dataclass(frozen=True, slots=True)
class RankRow:
    """One rank, as operators see it."""

    rank: int
    state: RankState
    address: str = ""
    unix_path: str = ""
    # since when nothing was heard of it; 0 for rank 0
    silent_s: float | None = None
    # as it last said, and how long ago; None: never yet
    figures: RankFigures | None = None
    age_s: float = 0.0
    # the most versions that it is behind rank 0's tickets, of any model
    behind: int = 0


class Alone:
    """The job of a server alone."""

    world = 1

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def seen(self) -> Sequence[SeenRank]:
        """Nobody."""
        return ()

    def ask_figures(self, *, rates: bool) -> Mapping[int, asyncio.Future[RankDone]]:
        """Nobody."""
        return {}

    def staged(self) -> int:
        """Pushes whose body is complete and that have no outcome yet."""
        return pushes_held(self._catalog)


def pushes_held(catalog: Catalog) -> int:
    """Pushes whose body is complete and that have no outcome yet, of all models."""
    return sum(len(model.held) for model in catalog.models.values())


class JobView:
    """One look after the other at all ranks. Used on the event loop only."""

    def __init__(self, catalog: Catalog, job: Job, address: str = "", unix_path: str = "") -> None:
        """`address`, `unix_path`: where workers reach this server."""
        self._catalog = catalog
        self._job = job
        self._own = address, unix_path
        self._reporter = Reporter(catalog, job.staged)
        self._said: dict[int, tuple[RankFigures, float]] = {}
        self._looking: asyncio.Future[None] | None = None

    @property
    def world(self) -> int:
        """How many ranks there are; 1: this server is alone."""
        return self._job.world

    @property
    def measured(self) -> Measured:
        """The rates of this host."""
        return self._reporter.measured

    @property
    def unready(self) -> dict[int, RankState]:
        """The ranks that take no work, and what they do instead."""
        return {row.rank: row.state for row in self._states() if row.state is not RankState.SERVING}

    async def look(self) -> list[RankRow]:
        """All ranks, asked just now."""
        if self.world > 1:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.ensure_future(self._ask(ASK_S, rates=False))
            await asyncio.shield(self._looking)
        return self._rows()

    async def look_with_rates(self) -> list[RankRow]:
        """The same, with the rates of every host but rank 0's, where `measured` has them."""
        await self._ask(MEASURE_S, rates=True)
        return self._rows()

    async def _ask(self, wait_s: float, *, rates: bool) -> None:
        answers = self._job.ask_figures(rates=rates)
        for rank, answer in answers.items():
            answer.add_done_callback(partial(self._note, rank))
        if answers:
            await asyncio.wait(answers.values(), timeout=wait_s)

    def _note(self, rank: int, answer: asyncio.Future[RankDone]) -> None:
        if answer.cancelled() or answer.exception() is not None:
            return  # its age tells
        figures = answer.result().figures
        known = self._said.get(rank)
        if known is not None and not figures.HasField("rates") and known[0].HasField("rates"):
            figures.rates.CopyFrom(known[0].rates)
        self._said[rank] = figures, self._catalog.clock()

    def _states(self) -> list[RankRow]:
        """The ranks without their figures."""
        address, unix_path = self._own
        rows = [RankRow(0, self._state(), address, unix_path, 0.0)]
        seen = {each.rank: each for each in self._job.seen()}
        for rank in range(1, self.world):
            here = seen.get(rank)
            if here is None:
                rows.append(RankRow(rank, RankState.AWAITED))
                continue
            state = RankState.SILENT if here.silent_s > SILENT_S else self._state()
            rows.append(RankRow(rank, state, here.address, here.unix_path, here.silent_s))
        return rows

    def _state(self) -> RankState:
        """What all ranks do that are heard of: rank 0 is ready only once the others are."""
        if self._catalog.draining:
            return RankState.STOPPING
        return RankState.SERVING if self._catalog.ready else RankState.STARTING

    def _rows(self) -> list[RankRow]:
        behind = versions_behind(self._catalog.models.values())
        now_s = self._catalog.clock()
        said = {**self._said, 0: (self._reporter.figures(), now_s)}
        rows = []
        for row in self._states():
            figures, at_s = said.get(row.rank, (None, now_s))
            rows.append(replace(row, figures=figures, age_s=now_s - at_s, behind=behind.get(row.rank, 0)))
        return rows


def versions_behind(models: Iterable[Model]) -> dict[int, int]:
    """By rank, the most versions that it is behind the tickets of a model."""
    found: dict[int, int] = {}
    for model in models:
        for rank, version in versions_of(model).items():
            found[rank] = max(found.get(rank, 0), model.version - version)
    return found


def versions_of(model: Model) -> dict[int, int]:
    """The version that each rank above 0 with a part of a model has come to."""
    leader = model.executor.leader
    return {} if leader is None else leader.reached()
