"""Which rank of which job this process is, as torchrun, srun or an operator say in the environment.

A process alone has nothing of this: no environment, no torch.distributed, no link. Of torch.distributed only the
store is used, once, at the start: rank 0 writes its address there, the others read it. Everything after that goes over
the link (server/links/link.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from pushstep.proto.wire.shards import MAX_RANKS

from ..process.threads import Threads

# How long a start waits for the other ranks.
MEET_S: Final = 300.0
LEADER: Final = "pushstep/leader"
# waits for the other ranks, once
MEETING: Final = Threads("meeting", 1)


@dataclass(frozen=True, slots=True)
class Job:
    """One rank of a job of several."""

    rank: int
    world: int
    # among the ranks of this host
    local_rank: int

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def job_of(environ: Mapping[str, str]) -> Job | None:
    """This process's place; None if it is alone. ValueError if the environment contradicts itself."""
    if environ.get("WORLD_SIZE", "1") == "1":
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {environ['WORLD_SIZE']}, and {', '.join(missing)} is missing beside it"
        )
    world, rank = _whole(environ, "WORLD_SIZE"), _whole(environ, "RANK")
    if not 1 < world <= MAX_RANKS:
        raise ValueError(f"WORLD_SIZE is {world}: a job has at most {MAX_RANKS} ranks")
    if rank >= world:
        raise ValueError(f"RANK is {rank}, and WORLD_SIZE {world}")
    local = _whole(environ, "LOCAL_RANK") if "LOCAL_RANK" in environ else rank
    return Job(rank, world, local)


def _whole(environ: Mapping[str, str], name: str) -> int:
    if not environ[name].isdecimal():
        raise ValueError(f"{name} is {environ[name]!r}, which is no number")
    return int(environ[name])


class Meeting:
    """The store at MASTER_ADDR:MASTER_PORT. It lives as long as this: rank 0 may be the one that serves it."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._store: Any = None

    async def leader(self, address: str) -> str:
        """Rank 0's address: `address`, which it tells the others, or what it has told. OSError if nobody comes."""
        return await MEETING.run(self._meet, address)

    def _meet(self, address: str) -> str:
        # here, since a process alone never needs it
        from torch.distributed import DistError
        from torch.distributed.rendezvous import rendezvous

        try:
            made: Any = rendezvous(
                "env://", self._job.rank, self._job.world, timeout=timedelta(seconds=MEET_S)
            )
            self._store, _, _ = next(made)
            if self._job.leads:
                self._store.set(LEADER, address)
                return address
            return bytes(self._store.get(LEADER)).decode()
        except (DistError, RuntimeError, ValueError) as error:
            raise OSError(f"the ranks do not meet at MASTER_ADDR and MASTER_PORT: {error}") from error
