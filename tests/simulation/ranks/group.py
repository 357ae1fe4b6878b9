"""The ranks of one job, and who starts them: when one has ended, all are ended and started again, as torchrun does."""

from __future__ import annotations

import contextlib
import random
from functools import partial
from pathlib import Path

from pushstep.proto.errors import PushstepError

from .links import Line, Winds
from .process import RankProcess
from .witness import Witness
from .world import World

# Until the starter has seen that a rank has ended, and until it has ended each of the others.
NOTICES_S = (0.0, 0.1, 2.0)
BETWEEN_S = (0.0, 0.05, 1.0)


class Group:
    """The job as its workers and its operator know it."""

    def __init__(
        self,
        world: World,
        winds: Winds,
        chance: random.Random,
        folder: Path,
        ranks: int,
        level: str,
        work_s: dict[str, tuple[float, ...]],
    ) -> None:
        self.world = world
        self.winds = winds
        self.chance = chance
        self.world_size = ranks
        self.level = level
        self.starts = 0
        self.witness = Witness(self)
        self.processes: list[RankProcess | None] = [None] * ranks
        self.lines: list[Line] = []
        self.zero: RankProcess | None = None
        self.power_is_lost = 0.0
        # by journal file: how much of it is on the disk
        self.safe_bytes: dict[Path, int] = {}
        # the ranks whose machines have died, in order
        self.deaths: list[int] = []
        self._work_s = work_s
        self._folders = [folder / f"rank-{rank}" for rank in range(ranks)]
        self._is_ending = False
        for each in self._folders:
            each.mkdir()
        self._start()

    def work_s(self, kind: str) -> float:
        """Until a thread gets round to a piece of work."""
        return self.chance.choice(self._work_s[kind])

    @property
    def is_ready(self) -> bool:
        """Every rank is there."""
        return all(process is not None and process.is_ready for process in self.processes)

    def _start(self) -> None:
        self.starts += 1
        self._is_ending = False
        self.lines = []
        self.witness.starts()
        order = list(range(self.world_size))
        self.chance.shuffle(order)
        for rank in order:
            self.world.after(self.chance.choice(BETWEEN_S), partial(self._start_one, rank, self.starts))

    def _start_one(self, rank: int, start: int) -> None:
        if self._is_ending or start != self.starts:
            return  # they are ended already
        process = RankProcess(self, rank, self._folders[rank], self.level, self.chance)
        self.processes[rank] = process
        if rank == 0:
            self.zero = process

    def opened(self, other: RankProcess) -> Line:
        """A rank opens its link to rank 0."""
        if self.zero is None:
            raise RuntimeError("rank 0 is not there")
        line = Line(self.world, self.winds, self.zero, other)
        self.lines.append(line)
        return line

    def ended(self, process: RankProcess) -> None:
        """A rank has ended, for whatever reason."""
        self.processes[process.rank] = None
        if process.rank == 0:
            self.zero = None
        for line in self.lines:
            if process in (line.zero, line.other):
                line.ends(process)
        if self.chance.random() < self.power_is_lost:
            process.lose_power(self.chance)
        # one that has ended in order leaves the others their time
        if not self._is_ending and (not process.is_saved or not any(self.processes)):
            self._is_ending = True
            self.world.after(self.chance.choice(NOTICES_S), self._end_all)

    def _end_all(self) -> None:
        """End who is left, one after the other, and start anew."""
        left = [process for process in self.processes if process is not None]
        if not left:
            self.world.after(self.chance.choice(BETWEEN_S), self._start)
            return
        self.chance.choice(left).kill()
        self.world.after(self.chance.choice(BETWEEN_S), self._end_all)

    # Faults.

    def kill(self, rank: int) -> None:
        """A rank dies."""
        process = self.processes[rank]
        if process is not None:
            process.kill()

    def cut(self, rank: int, *, is_noticed: bool) -> None:
        """The link of a rank above 0 breaks."""
        for line in self.lines:
            if line.other.rank == rank:
                line.cut(is_noticed=is_noticed)

    def stop(self) -> None:
        """All are told to end in order."""
        for process in self.processes:
            if process is not None and self.chance.random() < 0.7:
                process.stop()

    def take_snapshot(self) -> None:
        """An operator, or the time, has all ranks take one."""
        zero = self.zero
        if zero is not None and zero.model is not None and zero.is_ready:
            catalog = zero.catalog

            async def take() -> None:
                with contextlib.suppress(PushstepError):
                    await catalog.snapshot("m", "operator", automatic=True)

            zero.loop.create_task(take())

    def snapshots(self, rank: int) -> list[str]:
        """The snapshots that are on a rank's disk."""
        folder = self._folders[rank] / "models" / "m" / "snapshots"
        return [each.name for each in folder.iterdir()] if folder.is_dir() else []

    def be_calm(self, work_s: dict[str, tuple[float, ...]]) -> None:
        """Nothing goes wrong from here on."""
        self.power_is_lost = 0.0
        self._work_s = work_s
