"""Rank 0 of several: it has the coordinator, REST and a part of each model, and leads the others."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pushstep.proto.errors import NoCreationTicket, PushstepError, RankLost, StreamStalled
from pushstep.proto.shards_pb2 import (
    RankCommitCreation,
    RankCreate,
    RankDelete,
    RankDone,
    RankMeet,
    RankMessage,
    RankModels,
    RankOrder,
    RankReport,
    RankServe,
    RankWithdraw,
)
from pushstep.proto.training_pb2 import Shard
from pushstep.proto.wire.layout import Layout

from ..links.hub import Hub
from ..links.job import Job
from ..links.words import heard, said
from ..models.catalog import Catalog
from ..models.model import Model
from ..parts.shard import Goal, LedModel, ModelShard, Survey
from ..reports.job_view import SeenRank, pushes_held
from .leader import RankLeader
from .recovery import goal_message, goal_of, survey_of

log = logging.getLogger("pushstep.ranks")
# How long the values of a new model wait for those of the other parts.
UPLOAD_S: Final = 600.0
SWEEP_S: Final = 5.0


@dataclass(slots=True, eq=False)
class _Announced:
    """A model that is being uploaded to several ranks."""

    uid: bytes
    shard: ModelShard
    # each other rank's answer: its part is there
    there: dict[int, asyncio.Future[RankDone]]


class RankZero:
    """What rank 0 knows of the others. It is the catalog's `ranks`."""

    def __init__(
        self, job: Job, build: str, catalog: Catalog, on_lost: Callable[[PushstepError], None]
    ) -> None:
        self.rank = 0
        self.world = job.world
        self.hub = Hub(job.world, build, self._heard, on_lost)
        self._catalog = catalog
        self._on_lost = on_lost
        self._addresses: Sequence[Shard] = ()
        self._leaders: dict[str, RankLeader] = {}
        self._announced: dict[tuple[str, int], _Announced] = {}
        self._tasks: list[asyncio.Task[None]] = []
        # what the others have said that is on their disks
        self._surveys: dict[int, asyncio.Future[RankModels]] = {}
        self._meeting: list[asyncio.Future[RankDone]] = []

    async def begin(self, own: Shard, timeout_s: float) -> None:
        """Wait until all ranks are there. OSError if one does not come. `own`: where workers reach this one."""
        # from now on: those who come first must hear that rank 0 lives
        self._tasks = [asyncio.create_task(self.hub.watch()), asyncio.create_task(self._sweep())]
        try:
            async with asyncio.timeout(timeout_s):
                await self.hub.all_here.wait()
        except TimeoutError as error:
            missing = sorted(set(range(1, self.world)) - self.hub.links.keys())
            raise OSError(
                f"ranks {', '.join(map(str, missing))} do not come within {timeout_s:.0f} s"
            ) from error
        self._addresses = self.hub.shards(own)

    def serve(self) -> None:
        """Let workers come to all ranks."""
        self.hub.send(self.hub.links, RankOrder(serve=RankServe()))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep()
            for leader in self._leaders.values():
                leader.sweep()

    def sweep(self) -> None:
        """Have the others forget models whose ticket was taken back, or has run out."""
        creations, now_s = self._catalog.creations, self._catalog.clock()
        for model, ticket in list(self._announced):
            if not creations.holds(model, ticket, now_s):
                self.withdraw(model, ticket)

    def _heard(self, rank: int, message: RankMessage) -> None:
        kind = message.WhichOneof("said")
        if kind == "models" and not self._survey(rank).done():
            self._survey(rank).set_result(message.models)
        if kind not in ("staged", "stepped", "sums", "asked"):
            return
        of = getattr(message, kind)
        leader = self._leaders.get(of.model)
        if leader is None:
            return
        if kind == "staged":
            leader.staged(rank, message.staged)
        elif kind == "stepped":
            leader.stepped(rank, message.stepped)
        elif kind == "asked":
            leader.reads.asked(rank, message.asked)
        else:
            leader.summed(rank, message.sums)

    def shard(self, whole: Layout) -> ModelShard:
        """How a model lies in the ranks."""
        return ModelShard(whole, 0, list(self._addresses))

    # The start.

    def _survey(self, rank: int) -> asyncio.Future[RankModels]:
        if rank not in self._surveys:
            self._surveys[rank] = asyncio.get_running_loop().create_future()
        return self._surveys[rank]

    async def meet(self, found: Mapping[str, Survey]) -> Mapping[str, Goal]:
        """Where each model goes on, once all ranks have said what they have. The others are told."""
        theirs = {
            rank: {model.model: survey_of(model) for model in (await self._survey(rank)).models}
            for rank in self.hub.links
        }
        goals = {name: goal_of(name, own, theirs) for name, own in found.items()}
        for rank, models in theirs.items():
            order = RankMeet()
            for name in models:
                goal = goals.get(name, Goal(aside=True))
                if goal.aside or goal.refused is not None or goal.version is not None:
                    order.goals.append(goal_message(name, goal))
            self._meeting += self.hub.asked([rank], RankOrder(meet=order)).values()
        return {name: goal for name, goal in goals.items() if goal != Goal()}

    async def met(self) -> None:
        """Wait until the models of all ranks are where they are to go on."""
        for done in await asyncio.gather(*self._meeting):
            for of in done.steps:
                if of.model in self._leaders:
                    self._leaders[of.model].begun(int(of.group), int(of.steps))

    # What operators see.

    def seen(self) -> list[SeenRank]:
        """The other ranks that are there."""
        now_s = asyncio.get_running_loop().time()
        return [
            SeenRank(rank, link.hello.address, link.hello.unix_path, now_s - link.heard_s)
            for rank, link in self.hub.links.items()
        ]

    def ask_figures(self, *, rates: bool) -> dict[int, asyncio.Future[RankDone]]:
        """Ask the other ranks for their figures."""
        return self.hub.asked(self.hub.links, RankOrder(report=RankReport(rates=rates)))

    def staged(self) -> int:
        """Pushes that wait here for the parts of others, for their turn, or for their step."""
        return pushes_held(self._catalog)

    # Models.

    def loaded(self, model: LedModel) -> None:
        """Lead a model from here on. Its creation, if it was one, can come to nothing no more."""
        for known in [known for known in self._announced if known[0] == model.name]:
            del self._announced[known]
        if isinstance(model, Model) and model.shard is not None:
            leader = RankLeader(self.hub, model, model.shard, self._failed)
            self._leaders[model.name] = model.shard.leader = leader

    def announce(self, model: str, ticket: int, shard: ModelShard) -> None:
        """Tell the others of a model that is about to be uploaded under a ticket. Again: nothing."""
        if (model, ticket) in self._announced:
            return
        for known, other in list(self._announced):
            if known == model:
                self.withdraw(known, other)
        uid = secrets.token_bytes(16)
        order = RankCreate(model=model, ticket=ticket, manifest=shard.whole.manifest, uid=uid)
        there = self.hub.asked(shard.others, RankOrder(create=order))
        self._announced[model, ticket] = _Announced(uid, shard, there)

    async def uploaded(self, model: str, ticket: int) -> bytes:
        """The uid that the model gets, once every rank has its part. Raises what one of them was refused with."""
        announced = self._announced.get((model, ticket))
        if announced is None:
            raise NoCreationTicket(model=model)
        try:
            async with asyncio.timeout(UPLOAD_S):
                await asyncio.gather(*map(asyncio.shield, announced.there.values()))
        except TimeoutError as error:
            raise StreamStalled(seconds=UPLOAD_S) from error
        return announced.uid

    async def commit(self, model: LedModel, ticket: int) -> None:
        """Have the others make a model, and wait until each has made it or failed. Raises the first error."""
        announced = self._announced[model.name, ticket]
        if not isinstance(model, Model):
            raise TypeError("not a model of this server")
        durability = model.durability.model_dump_json()
        order = RankCommitCreation(model=model.name, ticket=ticket, durability=durability)
        answers = self.hub.asked(announced.shard.others, RankOrder(commit_creation=order))
        await asyncio.gather(*answers.values(), return_exceptions=True)
        for answer in answers.values():
            answer.result()

    def _failed(self, error: Exception) -> None:
        self._on_lost(heard(said(error)))

    def withdraw(self, model: str, ticket: int) -> None:
        """A creation has come to nothing, perhaps when some ranks had made the model already."""
        announced = self._announced.pop((model, ticket), None)
        if announced is not None:
            others = announced.shard.others
            self.hub.send(others, RankOrder(withdraw=RankWithdraw(model=model, ticket=ticket)))
            self.hub.send(others, RankOrder(delete=RankDelete(model=model, uid=announced.uid)))
            for answer in announced.there.values():
                if not answer.done():  # an upload that waits for them holds its bytes
                    answer.set_exception(NoCreationTicket(model=model))

    async def delete(self, model: str, uid: bytes) -> None:
        """Have the others delete a model, and wait."""
        leader = self._leaders.pop(model, None)
        if leader is not None:
            leader.end()
            await self.hub.ask(self.hub.links, RankOrder(delete=RankDelete(model=model, uid=uid)))

    async def close(self) -> None:
        """Have the others save and end, once everything that was ordered is done."""
        self.hub.closing = True
        for task in self._tasks:
            task.cancel()
        answers = self.hub.asked(self.hub.links, RankOrder(close=True))
        if answers:
            await asyncio.wait(answers.values(), timeout=self._catalog.config.drain_s)
        for rank in answers:
            self.hub.give_up(rank, RankLost(rank=rank, problem="the job has ended"))
