"""hypothesis trains: in whatever order users do things between steps, the service is equal to local torch, or says by name."""

from __future__ import annotations

import pytest
from hypothesis import Phase

from tests.support.processes.bounded import run_machine
from tests.support.servers.harness import RunningServer
from tests.support.workers.training_machine import Training


def train(server: RunningServer, examples: int, steps: int, *phases: Phase) -> None:
    Training.server = server
    run_machine(Training, examples, steps, phases)


@pytest.mark.timeout(300)  # 25 s of CPU
def test_whatever_is_done_between_steps(server: RunningServer) -> None:
    train(server, 60, 25, Phase.generate)  # to shrink a failure takes longer than a test has


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_whatever_is_done_for_long(server: RunningServer) -> None:
    train(server, 2000, 40, Phase.generate, Phase.shrink)
