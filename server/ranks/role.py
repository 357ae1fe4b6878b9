"""What a server does because it is one of several ranks: how it starts, serves and stops with the others.

The doors open first, and let nobody in. Rank 0 tells the others its address, the others open their links; then all load
their models, and rank 0 says when to serve. At a stop rank 0 lets work in flight finish and has the others save; they
stay until it says so. If a rank is lost, every other one ends at once, as by SIGKILL: what is on their disks is settled
at the next start.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import grpc

from pushstep.proto.errors import PushstepError
from pushstep.proto.shards_pb2 import RankHello
from pushstep.proto.training_pb2 import Shard

from ..config import Config, split_address
from ..links.hub import SERVICE
from ..links.job import MEET_S, Job, Meeting
from ..links.link import RankLink
from ..models.catalog import Catalog
from ..process.exit_status import rank_lost
from ..process.threads import DISK
from ..reports.job_view import Alone, JobView
from ..shared_memory.regions import SharedMemory
from ..traces.request_spans import Traces
from ..worker_door.servicer import GrpcDoor
from .door import PartDoor
from .other import OtherRank
from .resharding import reshard
from .zero import RankZero

log = logging.getLogger("pushstep.ranks")
LOOK_S: Final = 0.02


async def begin(role: Role | None, config: Config, address: str, unix_path: str, stop: asyncio.Event) -> None:
    """Meet the other ranks, if there are any, and have every model lie in as many as there are. What `Role.begin` raises."""
    if role is None:
        await DISK.run(reshard, config.data, 1)
    else:
        await role.begin(address, unix_path, stop)


class Role:
    """One rank's part in its job."""

    def __init__(self, job: Job, config: Config, catalog: Catalog, build: str) -> None:
        self.job = job
        self._config = config
        self._catalog = catalog
        self._build = build
        self._meeting = Meeting(job)
        # all ranks are linked
        self.has_met = False
        self._zero = RankZero(job, build, catalog, self._lost) if job.leads else None
        self._other = None if job.leads else OtherRank(job, catalog, self._lost)
        catalog.ranks = self._zero or self._other

    def door(self, catalog: Catalog, memory: SharedMemory, stall_s: float, traces: Traces | None) -> GrpcDoor:
        """The workers' door of this rank."""
        if self._other is None:
            return GrpcDoor(catalog, memory, stall_s, traces)
        return PartDoor(catalog, memory, stall_s, traces, self._other)

    def view(self, address: str, unix_path: str) -> JobView:
        """The job, as operators see it."""
        job = self._zero or Alone(self._catalog)
        return JobView(self._catalog, job, self._reached_at(address), unix_path)

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """What else its gRPC server serves."""
        return [] if self._zero is None else [self._zero.hub.handler()]

    @property
    def services(self) -> tuple[str, ...]:
        """The names of that."""
        return () if self._zero is None else (SERVICE,)

    async def begin(self, address: str, unix_path: str, stop: asyncio.Event) -> None:
        """Meet the others, or return without them once `stop` is set. OSError, or a named error.

        `address`: of this rank's open door. `stop` is set if rank 0 ends the job.
        """
        meeting = asyncio.create_task(self._meet(address, unix_path, stop))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({meeting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if meeting.done():
            meeting.result()
            self.has_met = True
            return
        log.info("stopping: not all ranks had come")
        # a thread may go on to wait for the store; the process ends without it
        meeting.cancel()
        await asyncio.wait({meeting})

    async def _meet(self, address: str, unix_path: str, stop: asyncio.Event) -> None:
        reached = self._reached_at(address)
        if self._zero is not None:
            await DISK.run(reshard, self._config.data.parent, self.job.world)
        log.info("rank %d of %d waits for the others", self.job.rank, self.job.world)
        leader = await self._meeting.leader(reached)
        if self._zero is not None:
            await self._zero.begin(Shard(rank=0, address=reached, unix_path=unix_path), MEET_S)
            return
        other = self._other
        if other is None:
            return
        hello = RankHello(
            rank=self.job.rank, world=self.job.world, build=self._build, address=reached, unix_path=unix_path
        )
        files = self._config.tls_files()
        own = None if files is None else (files.cert, files.key)
        file = self._config.link_token_file
        token = None if file is None else file.read_text().strip()
        other.link = RankLink(hello, other.take, self._lost, token, self._config.link_ca, own)
        await other.link.open(leader)
        self._closing = asyncio.create_task(self._stop_when_told(other, stop))

    async def _stop_when_told(self, other: OtherRank, stop: asyncio.Event) -> None:
        await other.closed.wait()
        if other.link is not None:
            other.link.closing = True
        stop.set()

    def _reached_at(self, address: str) -> str:
        """Where workers and the other ranks reach this one."""
        if self._config.advertise is None:
            return address
        _, port = split_address(address)
        wanted, _, own_port = self._config.advertise.rpartition(":")
        return f"{wanted}:{own_port}" if wanted and own_port.isdigit() else f"{self._config.advertise}:{port}"

    async def serve(self) -> None:
        """Come to one state with the others, once this rank's models are loaded."""
        if self._zero is not None:
            self._zero.serve()
        elif self._other is not None:
            await self._other.serves.wait()

    async def drain(self, timeout_s: float) -> None:
        """Rank 0: let steps finish that are under way, then have the others save. Others: wait until it says so."""
        if not self.has_met:
            if self._zero is not None:
                self._zero.hub.let_go()
            return
        try:
            async with asyncio.timeout(timeout_s):
                if self._other is not None:
                    await self._other.closed.wait()
                    for follower in self._other.followers.values():
                        follower.let_go()
                    return
                while any(model.executor.under_way() for model in self._catalog.models.values()):
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            log.error("stopping: the ranks have not come to an end together within %.0f s", timeout_s)
        if self._zero is not None:
            await self._zero.close()

    async def end(self) -> None:
        """Everything here is saved."""
        if self._other is not None and self._other.link is not None:
            self._other.end()
            await asyncio.sleep(0)
            await self._other.link.close()

    def _lost(self, error: PushstepError) -> None:
        rank_lost(error)


def seen_by_operators(role: Role | None, catalog: Catalog, address: str, unix_path: str) -> JobView:
    """What operators see of this server, or of all ranks of its job. `address`: of its open door."""
    if role is not None:
        return role.view(address, unix_path)
    return JobView(catalog, Alone(catalog), address, unix_path)
