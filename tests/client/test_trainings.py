"""hypothesis trains: in whatever order users do things between steps, the service is equal to local torch, or says by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import Phase

from tests.support.processes.bounded import run_machine
from tests.support.servers.harness import RunningServer
from tests.support.trainings.training_machine import Training


def train(server: RunningServer, examples: int, steps: int, *phases: Phase) -> None:
    Training.server = server
    run_machine(Training, examples, steps, phases)


@pytest.mark.timeout(300)
def test_whatever_is_done_between_steps(server: RunningServer) -> None:
    train(server, 50, 25, Phase.generate)  # to shrink a failure takes longer than a test has


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_whatever_is_done_for_long(server: RunningServer) -> None:
    """Takes about 8 minutes; to shrink a failure takes longer."""
    train(server, 2000, 40, Phase.generate, Phase.shrink)


TCP: dict[str, Any] = {"overlap": False, "shared_memory": False}
# What hypothesis has found once: after the beginning, what is called with what.
STORIES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "another tensor with the same values, and back to the checkpoint": [
        ("save", {}),
        ("attach_again", {**TCP, "edits": "sample", "rewinds": False, "seed": 0}),
        ("replace", {"name": "table.weight", "same": True}),
        ("load_optimizer", {}),
    ],
    "a group's edit that no step has carried, and back to the checkpoint": [
        ("save", {}),
        ("edit_group", {"group": 0, "key": "eps", "tensor": False}),
        ("attach_again", {**TCP, "edits": "sample", "rewinds": True, "seed": 0}),
        ("second_joins", {**TCP, "edits": "sample"}),
    ],
    "a step that one leaves out, after another's edit": [
        ("edit_group", {"group": 0, "key": "eps", "tensor": False}),
        ("second_joins", {**TCP, "edits": "sample"}),
        ("scaled", {"who": 0, "seed": 0, "inf": False, "unscale": False}),
        ("scaled", {"who": 1, "seed": 0, "inf": True, "unscale": False}),
    ],
    "buffers go back with the state, though no parameter differs": [
        ("save", {}),
        ("scaled", {"who": 0, "seed": 0, "inf": False, "unscale": False}),
        ("attach_again", {**TCP, "edits": "upload", "rewinds": False, "seed": 0}),
        ("load_module", {"who": 0}),
        ("write_extra", {"who": 0, "what": "norm.running_mean"}),
        ("attach_again", {**TCP, "edits": "sample", "rewinds": True, "seed": 0}),
    ],
}


@pytest.mark.parametrize("story", STORIES)
def test_what_was_found_once(server: RunningServer, story: str) -> None:
    Training.server = server
    training = Training()
    training.begin(**TCP, make="adadelta", sparse=False, edits="sample")
    for rule, arguments in STORIES[story]:
        getattr(training, rule)(**arguments)
    training.teardown()
