"""One rank: a process of the real server, from its doors for workers and its link inwards, on a folder of its own."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from pushstep.proto.errors import PushstepError
from pushstep.proto.shards_pb2 import RankHello
from pushstep.proto.training_pb2 import Shard
from pushstep.server.config import Config
from pushstep.server.journal.journal import Journal, Level
from pushstep.server.links.hub import Hub
from pushstep.server.links.job import Job
from pushstep.server.models import catalog as catalog_module
from pushstep.server.models.catalog import Catalog
from pushstep.server.models.model import Model
from pushstep.server.models.saved_models import SavedModels
from pushstep.server.ranks.role import Role
from pushstep.server.shared_memory.regions import SharedMemory

from .links import SimulatedLink
from .world import ProcessEnds, ProcessLoop

if TYPE_CHECKING:
    from .group import Group
    from .links import Call

LEASE_S = 10.0
STALL_S = 10.0
DRAIN_S = 20.0
# Nobody starts one again that was stopped alone before all had come: the others give up.
MEET_S = 60.0
BUILD = "simulated"
CONFIG = Config(
    data=Path("/nowhere"),
    no_shared_memory=True,
    lease_s=LEASE_S,
    stall_s=STALL_S,
    staging_bytes=1 << 20,
    read_bytes=16 << 20,
    drain_s=DRAIN_S,
    part_bytes=0,
)
EVERYSEC_S = 1.0


class Syncing:
    """Forces journals to the disk, in place of the thread that does."""

    def __init__(self, loop: ProcessLoop) -> None:
        self._loop = loop
        self._waiting: set[Journal] = set()

    def request(self, journal: Journal, synced: Callable[[], None]) -> None:
        """As the thread."""
        if journal in self._waiting:
            return
        self._waiting.add(journal)

        def sync() -> None:
            self._waiting.discard(journal)
            journal.sync()
            synced()

        def due() -> None:
            runner = self._loop.runner
            if runner is None:
                sync()
            else:
                runner("journal", sync)

        self._loop.call_later(0.0 if journal.level is Level.DURABLE else EVERYSEC_S, due)

    def close(self) -> None:
        """It has no thread."""


class SimulatedRole(Role):
    """A rank's role, over links of the simulation."""

    process: RankProcess

    async def _meet(self, address: str, unix_path: str, stop: asyncio.Event) -> None:
        if self._zero is not None:
            try:
                await self._zero.begin(Shard(rank=0, address=address), MEET_S)
            except OSError as error:
                self.process.lost = error
                raise ProcessEnds from error
            return
        other = self._other
        if other is None:
            return
        hello = RankHello(rank=self.job.rank, world=self.job.world, build=BUILD, address=address)
        link = SimulatedLink(hello, other.take, self._lost)
        link.process = self.process
        other.link = link
        try:
            await link.open("rank 0")
        except OSError as error:  # whoever has started it starts it again
            self.process.lost = error
            raise ProcessEnds from error
        self._closing = self.process.loop.create_task(self._stop_when_told(other, stop))

    def _lost(self, error: PushstepError) -> None:
        self.process.lost = error
        raise ProcessEnds


class RankProcess:
    """One process, until it ends or is killed."""

    def __init__(self, group: Group, rank: int, folder: Path, level: str, chance: random.Random) -> None:
        self.group = group
        self.rank = rank
        self.folder = folder
        self.is_over = False
        # it has all models, and the others are there
        self.is_ready = False
        # it has ended in order
        self.is_saved = False
        self.lost: Exception | None = None
        self.calls: list[Call] = []
        self.loop = ProcessLoop(group.world, self.exited)
        self.loop.runner = lambda kind, work: self.loop.call_later(group.work_s(kind), work)
        self._stopping = asyncio.Event()
        self.loop.within(lambda: self._make(level))
        self.loop.create_task(self._life())
        self.loop.create_task(self._drain())

    def _make(self, level: str) -> None:
        config = CONFIG.model_copy(update={"data": self.folder, "durability": level})
        with patch.object(catalog_module, "register"):
            self.catalog = Catalog(config, self.loop.time)
        self.syncing = Syncing(self.loop)
        self.catalog._journal_sync = self.syncing
        job = Job(self.rank, self.group.world_size, self.rank)
        self.role = SimulatedRole(job, config, self.catalog, BUILD)
        self.role.process = self
        self.door = self.role.door(self.catalog, SharedMemory(self.catalog.staging, "", 1), STALL_S, None)
        self._saved = SavedModels(self.catalog)
        ranks, loaded = self.catalog.ranks, self.catalog.ranks.loaded

        def watched(model: Any) -> None:
            loaded(model)
            self.group.witness.watch(self, model)

        ranks.loaded = watched

    @property
    def hub(self) -> Hub:
        """Rank 0's."""
        return self.role._zero.hub

    @property
    def model(self) -> Model | None:
        """The one model, once it is there."""
        return self.catalog.models.get("m")

    # Its life.

    async def _life(self) -> None:
        """As server/service.py has it, without sockets."""
        try:
            await self.role.begin(f"rank-{self.rank}:1", "", self._stopping)
            if not self.role.has_met:
                return
            await self._saved.load()
        except (PushstepError, OSError) as error:
            self.lost = error
            raise ProcessEnds from error
        self.group.witness.came_back(self)
        await self.role.serve()
        self.is_ready = True

    def stop(self) -> None:
        """End in order, and keep everything."""
        if not self.is_over:
            self._stopping.set()

    async def _drain(self) -> None:
        await self._stopping.wait()
        self.catalog.draining = True
        self.catalog.ready = False
        for model in self.catalog.models.values():
            model.held.let_go()
            model.events.end("draining")
        await self.role.drain(DRAIN_S)
        await self._saved.save()
        await self.role.end()
        self.is_saved = True
        raise ProcessEnds

    def kill(self) -> None:
        """The process ends: nobody hears of it again, but for those who had something open to it."""
        if self.is_over:
            return
        self.is_over = True
        self.is_ready = False
        self.loop.kill()
        for call in self.calls:
            call.ends()
        self.group.ended(self)

    def exited(self) -> None:
        """It has ended by itself."""
        self.kill()

    def bury(self) -> None:
        """The run is over."""
        self.loop.kill()

    def lose_power(self, chance: random.Random) -> None:
        """Its machine has died with it: what was not forced to the disk may be lost, from some byte on."""
        self.group.deaths.append(self.rank)
        for path in sorted((self.folder / "models").glob("*/journal/*.journal")):
            size_bytes = os.path.getsize(path)
            safe_bytes = min(size_bytes, self.group.safe_bytes.get(path, 0))
            os.truncate(path, chance.randint(safe_bytes, size_bytes))
