"""hypothesis trains: in whatever order users do things between steps, the service is equal to local torch, or says by name."""

from __future__ import annotations

import pytest
from harness import RunningServer
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from training_machine import Training


def train(server: RunningServer, examples: int, steps: int, *phases: Phase) -> None:
    """The same ones each time; a failure prints what was done."""
    Training.server = server
    run_state_machine_as_test(
        Training,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            phases=phases,
            derandomize=True,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.timeout(300)  # 40 s of CPU
def test_whatever_is_done_between_steps(server: RunningServer) -> None:
    train(server, 100, 25, Phase.generate)  # to shrink a failure takes longer than a test has


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_whatever_is_done_for_long(server: RunningServer) -> None:
    train(server, 2000, 40, Phase.generate, Phase.shrink)
