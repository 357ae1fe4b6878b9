"""Servers that are the ranks of one job, started as srun or an operator does it, or by torchrun."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tests.support.deployments.ports import free_port
from tests.support.servers.harness import RunningServer, start_server

START_S = 120.0
# Also the small models of tests are cut.
CUT_ALL = {"PUSHSTEP_PART_BYTES": "0"}


def environment_of(rank: int, world: int, port: int) -> dict[str, str]:
    """What srun or an operator sets for a rank. `port`: of the store where they meet."""
    place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world)}
    return {**os.environ, **CUT_ALL, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


class RankGroup:
    """The ranks that run now, and their addresses, which they keep."""

    def __init__(
        self, data: Path, world: int, *options: str, advertised: Sequence[str | None] | None = None
    ) -> None:
        """`advertised`: where workers reach each rank, if not where it listens."""
        self.data = data
        self.world = world
        self._advertised = advertised or [None] * world
        self._options = options
        self.ports = [free_port() for _ in range(world)]
        self.ranks: list[RunningServer] = []
        self.start()

    @property
    def leader(self) -> RunningServer:
        return self.ranks[0]

    def become(self, *others: int | None) -> None:
        """Have ranks above 0 at these ports from the next start on, however many they are. None: at another one."""
        self.world = 1 + len(others)
        self.ports = [self.ports[0], *(port or free_port() for port in others)]
        self._advertised = [self._advertised[0], *[None] * len(others)]

    def start(self, commands: Mapping[int, Sequence[str | Path]] | None = None) -> None:
        """Start all. `commands`: what runs in place of a server's own command, by rank.

        ExceptionGroup if one does not come up; then none runs.
        """
        port, others = free_port(), commands or {}
        with ThreadPoolExecutor(self.world) as starting:
            begun = [
                starting.submit(self._start, rank, port, others.get(rank, ())) for rank in range(self.world)
            ]
        self.ranks = [rank.result() for rank in begun if rank.exception() is None]
        problems = [problem for rank in begun if isinstance(problem := rank.exception(), Exception)]
        if problems:
            for running in self.ranks:
                running.kill()
            raise ExceptionGroup("not all ranks have come up", problems)

    def _start(self, rank: int, port: int, command: Sequence[str | Path]) -> RunningServer:
        options = [*self._options, "--grpc", f"127.0.0.1:{self.ports[rank]}"]
        shown = self._advertised[rank]
        options += [] if shown is None else ["--advertise", shown]
        environment = environment_of(rank, self.world, port)
        return start_server(self.data, *options, environment=environment, command=command)

    def stop(self) -> list[int]:
        """SIGTERM to all, as torchrun sends it; their exit statuses."""
        for session in self.leader.sessions:
            session.close()
        for rank in self.ranks:
            rank.process.send_signal(signal.SIGTERM)
        statuses = [rank.process.wait(START_S) for rank in self.ranks]
        for rank in self.ranks:
            rank.close_pipe()
        return statuses

    def kill(self, rank: int) -> list[int]:
        """SIGKILL to one. The others end by themselves; their exit statuses."""
        self.ranks[rank].kill()
        return self.ended(rank)

    def ended(self, rank: int) -> list[int]:
        """Wait until all have ended because one has; the others' exit statuses."""
        self.ranks[rank].process.wait(START_S)
        statuses = [other.process.wait(START_S) for other in self.ranks if other is not self.ranks[rank]]
        for other in self.ranks:
            other.close_pipe()
        return statuses

    def logs(self) -> str:
        return "\n".join(rank.log.read_text() for rank in self.ranks)


@contextmanager
def running_ranks(data: Path, world: int, *options: str) -> Iterator[RankGroup]:
    """A group for the length of a block. Its end must be orderly unless the test ended it itself."""
    group = RankGroup(data, world, *options)
    try:
        yield group
    finally:
        if all(rank.process.poll() is None for rank in group.ranks):
            statuses = group.stop()
            assert statuses == [0] * world, group.logs()
        for rank in group.ranks:
            rank.kill()


class Torchrun:
    """A group that torchrun starts, and starts again. Of one rank it is a server alone."""

    def __init__(self, data: Path, world: int, *options: str, restarts: int) -> None:
        data.mkdir(parents=True, exist_ok=True)
        self.grpc, self.world = f"127.0.0.1:{free_port(neighbours=world - 1)}", world
        self.log = data / "torchrun.log"
        self._stderr: IO[str] = self.log.open("w")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
        command += [
            "--master-port",
            str(free_port()),
            "--max-restarts",
            str(restarts),
            "--monitor-interval",
            "0.1",
        ]
        command += [
            "-m",
            "pushstep.server",
            "--grpc",
            self.grpc,
            "--http",
            "127.0.0.1:0",
            "--data",
            str(data),
        ]
        command += options
        environment = {**os.environ, **CUT_ALL}
        self.process = subprocess.Popen(
            command, env=environment, stdout=self._stderr, stderr=self._stderr, text=True
        )
        self.wait_for_start(1)

    def wait_for_start(self, number: int) -> None:
        """Wait until all ranks are ready for the `number`th time."""
        until_s = time.monotonic() + START_S
        while len(self._ready()) < number * self.world:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until_s, self.log.read_text()
            time.sleep(0.05)

    def _ready(self) -> list[dict[str, str]]:
        """What ranks have printed of themselves."""
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("ready ")]
        return [dict(entry.split("=", 1) for entry in shlex.split(line)[1:]) for line in lines]

    @property
    def leader(self) -> RunningServer:
        """Rank 0, as it was started last. Its process is torchrun."""
        (*_, http) = [found["http"] for found in self._ready() if "http" in found]
        return RunningServer(self.process, self.grpc, http, "", self.log.parent, self.log)

    def pids(self) -> list[int]:
        """Its ranks' processes, in order of their start."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in found.stdout.split()]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(START_S)
        self._stderr.close()
