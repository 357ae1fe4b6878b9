"""Ranks that wait for one another at the start: for how long, for whom, and how they end when they are told to."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from pushstep.server.process.exit_status import ExitStatus
from tests.support.deployments.ports import free_port
from tests.support.processes.forked import Forked, serve
from tests.support.ranks.group import environment_of
from tests.support.servers.harness import wait_until

WORLD = 3
AGENT = {"TORCHELASTIC_USE_AGENT_STORE": "True"}


@dataclass
class Coming:
    """A rank that was started, and what it has said so far."""

    process: Forked
    log: Path

    def has_said(self, words: str) -> bool:
        return words in self.log.read_text()

    def is_ready(self) -> bool:
        """Waits until it serves, or ends."""
        return self.process.stdout is not None and self.process.stdout.readline().startswith("ready ")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[int], Coming]]:
    """Starts one rank of three, as the agent of torchrun does, which has the store. None is left at the end."""
    port = free_port()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    with ExitStack() as ends:
        ends.callback(lambda: store)

        def started(rank: int) -> Coming:
            log = tmp_path / f"{rank}-{len(list(tmp_path.iterdir()))}.log"
            options = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", str(tmp_path / "data")]
            with log.open("w") as stderr:
                process = serve(options, stderr, environment=environment_of(rank, WORLD, port) | AGENT)
            ends.callback(process.end)
            return Coming(process, log)

        yield started


def test_a_rank_that_waits_for_the_others_heeds_a_signal(start: Callable[[int], Coming]) -> None:
    """One that waits for the store, one that waits for the last rank at rank 0, and rank 0."""
    early = start(1)
    wait_until(lambda: early.has_said("rank 1 of 3 waits for the others"), 60)
    early.process.send_signal(signal.SIGTERM)
    assert early.process.wait(20) == ExitStatus.SAVED
    zero, one = start(0), start(1)
    wait_until(lambda: zero.has_said("rank 1 of 3 is here"), 60)
    for rank in (one, zero):
        rank.process.send_signal(signal.SIGTERM)
        assert rank.process.wait(20) == ExitStatus.SAVED
        assert rank.has_said("not all ranks had come")


def test_a_rank_that_has_come_may_come_again_until_all_are_there(start: Callable[[int], Coming]) -> None:
    zero, one = start(0), start(1)
    wait_until(lambda: zero.has_said("rank 1 of 3 is here"), 60)
    one.process.kill()
    wait_until(lambda: zero.has_said("it may come again"), 60)
    ranks = [zero, start(1), start(2)]
    assert all(rank.is_ready() for rank in ranks)
    for rank in ranks:
        rank.process.send_signal(signal.SIGTERM)
    assert [rank.process.wait(60) for rank in ranks] == [ExitStatus.SAVED] * WORLD
