"""A rank above 0: it takes its parts of pushes, and does what rank 0 orders."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any

import xxhash

from pushstep.proto.errors import (
    ManifestChanged,
    ModelLost,
    NoCreationTicket,
    NotTheCoordinator,
    PushstepError,
    RanksDiffer,
)
from pushstep.proto.shards_pb2 import (
    RankDelete,
    RankDone,
    RankDurability,
    RankMessage,
    RankModels,
    RankOrder,
    RankSnapshot,
    RankSteps,
)
from pushstep.proto.training_pb2 import Shard
from pushstep.proto.wire.layout import Layout

from ..arenas.arenas_copy import ArenasCopy
from ..journal.durability import read_durability
from ..links.job import Job
from ..links.link import RankLink
from ..links.words import heard, said
from ..models.catalog import Catalog
from ..models.model import Model
from ..pacing.pace import AT_ONCE
from ..parts.content import Content, Wanted, messages_of, tensors_of
from ..parts.looks import content_of, look_at_piece
from ..parts.shard import Goal, LedModel, ModelShard, Survey, whole_of
from ..process.threads import DISK, PULLS, READS
from ..reports.reporter import Reporter
from .follower import Follower
from .part_creations import PartCreations
from .recovery import goal_heard, survey_message

log = logging.getLogger("pushstep.ranks")


class OtherRank:
    """A rank above 0. It is the catalog's `ranks`."""

    def __init__(self, job: Job, catalog: Catalog, on_lost: Callable[[PushstepError], None]) -> None:
        self.rank = job.rank
        self.world = job.world
        self._catalog = catalog
        self._on_lost = on_lost
        self.link: RankLink | None = None
        self.followers: dict[str, Follower] = {}
        self._reporter = Reporter(catalog, lambda: sum(each.parts_held for each in self.followers.values()))
        # by model, the newest snapshot here, until rank 0 has said that its own of that version is on its disk
        self._uncommitted: dict[str, str] = {}
        self.creations = PartCreations(catalog, self.shard, self.say)
        self._tasks: set[asyncio.Task[None]] = set()
        self._meet: asyncio.Future[RankOrder] = asyncio.get_running_loop().create_future()
        # workers may come
        self.serves = asyncio.Event()
        # rank 0 has ordered the end; its number
        self.closed = asyncio.Event()
        self._close_order = 0

    def shard(self, whole: Layout) -> ModelShard:
        """How a model lies in the ranks. Where they are only rank 0 knows."""
        return ModelShard(whole, self.rank, [Shard(rank=rank) for rank in range(self.world)])

    def follower_of(self, name: str, uid: bytes, manifest_hash: int) -> Follower:
        """The part that the caller means. NotTheCoordinator, ModelLost, ManifestChanged, RanksDiffer if it is not here."""
        model = self._catalog.get(name, uid)
        found = self.followers.get(name)
        if found is None or found.model is not model or model.shard is None:
            raise NotTheCoordinator(rank=self.rank, what=f"model {name!r}, of which it has no part,")
        if uid and uid != model.uid:
            raise ModelLost(model=name)
        if manifest_hash != model.layout.manifest_hash:
            for part in model.shard.parts:
                if part is not None and part.layout.manifest_hash == manifest_hash:
                    meant = (
                        f"it is asked as if it were rank {part.rank}: is it reached at that one's address?"
                    )
                    raise RanksDiffer(rank=self.rank, problem=meant)
            raise ManifestChanged(model=name)
        return found

    async def take(self, order: RankOrder) -> None:
        """An order from rank 0. The next one is taken when this returns."""
        if order.WhichOneof("ordered") == "snapshot" and not order.snapshot.committed:
            await self._snapshot(order)
        else:
            self._take(order)

    async def _snapshot(self, order: RankOrder) -> None:
        """Capture what is here now, behind the last ticket; write it while further ones are executed."""
        snapshotter, done = self._catalog.snapshotter, RankDone(order=order.order)
        try:
            model = self._catalog.get(order.snapshot.model)
            taken = await snapshotter.capture(model)
        except Exception as error:  # noqa: BLE001 - rank 0 decides what it means
            done.problem.CopyFrom(said(error))
            self.say(RankMessage(done=done))
            return

        async def written() -> None:
            folder = self._catalog.folder(model.name)
            async with self._catalog.alone(model.name):
                manifest = await snapshotter.write(
                    model, folder, taken, "rank 0", automatic=order.snapshot.automatic, pace=AT_ONCE
                )
                given_up = self._uncommitted.pop(model.name, None)
                self._uncommitted[model.name] = manifest["id"]
                if (
                    given_up is not None
                ):  # or they would fill this disk for as long as another rank's takes none
                    await DISK.run(folder.snapshots.delete, given_up)
            done.snapshot = manifest["id"]
            done.digest = xxhash.xxh3_64_intdigest(json.dumps(manifest, sort_keys=True).encode())
            self.say(RankMessage(done=done))

        self._start(order, written(), is_done=False)

    async def _prune(self, order: RankSnapshot) -> None:
        """Rank 0 has its snapshot of a version, too: older ones that are not kept may go."""
        model = self._catalog.get(order.model)
        folder, alone = self._catalog.folder(model.name), self._catalog.alone(model.name)
        await self._catalog.snapshotter.prune(model, folder, f"of version {order.version}", DISK, alone)

    def _take(self, order: RankOrder) -> None:
        kind = order.WhichOneof("ordered")
        match kind:
            case "ticket" | "drop" | "publish" | "read" | "reduce" | "hooks":
                of = getattr(order, kind)
                follower = self.followers.get(of.model)
                if follower is not None:  # rank 0 may have decided it before it deleted the model
                    getattr(follower, kind)(of)
            case "meet":
                self._meet.set_result(order)
            case "snapshot":
                self._uncommitted.pop(order.snapshot.model, None)
                self._start(order, self._prune(order.snapshot), is_done=False)
            case "export":
                self._export(order)
            case "report":
                self._start(order, self._report(order), is_done=False)
            case "serve":
                self.serves.set()
            case "close":
                self._close_order = int(order.order)
                self.closed.set()
            case "create":
                self._start(order, self.creations.create(int(order.order), order.create), is_done=False)
            case "commit_creation":
                self._start(order, self.creations.commit(order.commit_creation))
            case "withdraw":
                self.creations.withdraw(
                    order.withdraw.model,
                    int(order.withdraw.ticket),
                    NoCreationTicket(model=order.withdraw.model),
                )
            case "durability":
                self._start(order, self._set_durability(order.durability))
            case "delete":
                self._start(order, self._delete(order.delete))
            case _:
                self.say(
                    RankMessage(failed=said(NotTheCoordinator(rank=self.rank, what=f"the order {kind!r}")))
                )

    def say(self, message: RankMessage) -> None:
        """Say something to rank 0."""
        if self.link is not None:
            self.link.say(message)

    def _start(self, order: RankOrder, work: Coroutine[Any, Any, None], *, is_done: bool = True) -> None:
        """Do what takes time, then answer the order, unless the work does that itself."""

        async def run() -> None:
            done = RankDone(order=order.order)
            try:
                await work
            except Exception as error:  # noqa: BLE001 - rank 0 decides what it means
                done.problem.CopyFrom(said(error))
                self.say(RankMessage(done=done))
                return
            if is_done:
                self.say(RankMessage(done=done))

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _export(self, order: RankOrder) -> None:
        """Send all of this part, of the version that is the newest in the writer's queue now, or of a snapshot."""
        export = order.export
        follower = self.followers.get(export.model)
        if follower is None:
            problem = said(ModelLost(model=export.model))
            self.say(RankMessage(done=RankDone(order=order.order, problem=problem)))
            return
        part, model = follower.part, follower.model
        whole = whole_of(model)
        wanted = Wanted(export.state, {each.hook: list(each.groups) for each in export.averages})

        def all_of(copy: ArenasCopy) -> Content:
            return Content(copy.timeline, copy.version, tensors_of(copy, part, whole, wanted))

        def read() -> Content:
            snapshots = self._catalog.snapshots(model.name)
            found = next((each for each in snapshots.ids() if each.startswith(export.snapshot)), "")
            return all_of(snapshots.read(found or export.snapshot)[1])

        def copied() -> Content:
            if not export.HasField("parameter"):
                return all_of(model.arenas.copy())
            seen = look_at_piece(model.arenas, part, whole.slots[export.parameter])
            return content_of(seen, model.arenas.timeline, model.arenas.version)

        reading = READS.run(read) if export.snapshot else model.writer.submit(copied)
        self._start(order, self._give(int(order.order), reading))

    async def _give(self, order: int, reading: Awaitable[Content]) -> None:
        messages = messages_of(self.rank, order, await reading)

        async def contents() -> AsyncIterator[bytes]:
            while (message := await PULLS.run(next, messages, None)) is not None:
                yield message

        if self.link is not None:
            await self.link.give(contents())

    async def _report(self, order: RankOrder) -> None:
        reporter = self._reporter
        figures = await reporter.with_rates() if order.report.rates else reporter.figures()
        self.say(RankMessage(done=RankDone(order=order.order, figures=figures)))

    # The start.

    async def meet(self, found: Mapping[str, Survey]) -> Mapping[str, Goal]:
        """Tell rank 0 what is here; where it has it go on."""
        models = [survey_message(name, survey) for name, survey in found.items()]
        self.say(RankMessage(models=RankModels(models=models)))
        order = await self._meet
        return {goal.model: goal_heard(goal) for goal in order.meet.goals}

    async def met(self) -> None:
        """Tell rank 0 that every model here is there."""
        done = RankDone(order=(await self._meet).order)
        for name, follower in self.followers.items():
            done.steps.extend(
                RankSteps(model=name, group=group, steps=steps) for group, steps in follower.first_steps()
            )
        self.say(RankMessage(done=done))

    # Models.

    def loaded(self, model: LedModel) -> None:
        """Take orders for a model from here on."""
        self._uncommitted.pop(model.name, None)
        if isinstance(model, Model) and model.shard is not None and model.shard.part is not None:
            self.followers[model.name] = Follower(model, model.shard.part, self.say, self._failed)

    async def _set_durability(self, order: RankDurability) -> None:
        """Keep a part on the disk in another way. The snapshot that a new journal needs is ordered by rank 0."""
        model = self._catalog.get(order.model)
        async with self._catalog.alone(model.name):
            model.require_here()
            before = model.durability
            model.durability = wanted = read_durability(json.loads(order.settings), before)
            try:
                await self._catalog.snapshotter.keep_at(model, self._catalog.folder(model.name), wanted.level)
            except BaseException:
                model.durability = before
                raise

    def _failed(self, error: Exception) -> None:
        self.say(RankMessage(failed=said(error)))
        self._on_lost(heard(said(error)))

    async def _delete(self, order: RankDelete) -> None:
        async with self._catalog.alone(order.model):  # it may be about to be made
            model = self._catalog.models.get(order.model)
            follower = self.followers.pop(order.model, None)
            self._uncommitted.pop(order.model, None)
        if follower is not None:
            follower.let_go()
        if model is not None and model.uid == order.uid:
            await self._catalog.delete(order.model, "rank 0")

    def end(self) -> None:
        """Rank 0's order to end is done, or about to be."""
        self.say(RankMessage(done=RankDone(order=self._close_order)))

    # What only rank 0 does.

    def announce(self, model: str, ticket: int, shard: ModelShard) -> None:
        """Rank 0's."""
        raise NotTheCoordinator(rank=self.rank, what="a model that is made")

    async def uploaded(self, model: str, ticket: int) -> bytes:
        """Rank 0's."""
        raise NotTheCoordinator(rank=self.rank, what="a model that is made")

    async def commit(self, model: LedModel, ticket: int) -> None:
        """Rank 0's."""
        raise NotTheCoordinator(rank=self.rank, what="a model that is made")

    def withdraw(self, model: str, ticket: int) -> None:
        """Rank 0's."""

    async def delete(self, model: str, uid: bytes) -> None:
        """Rank 0 has ordered it."""
