"""A durable server under load is killed at random instants, again and again: what it holds is a replay of what it acknowledged.

Three workers push at once. Each knows its gradients, and each receipt names the version that the push made. So local torch
can step the same gradients in the order of the versions, and must come to the same bits.
"""

from __future__ import annotations

import random
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from pushstep.client import Session, connect
from pushstep.optim import Adadelta
from tests.support.servers.harness import start_server

WORKERS = 3
SHAPE = (40, 25)
OPTIONS = ("--durability", "durable", "--snapshot-every-s", "0.3")
# An interval between kills; a start takes about as long as the longest.
SHORTEST_S, LONGEST_S = 0.02, 0.4


def _gradient(worker: int, number: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(worker * 1_000_003 + number))


class Pusher:
    """A worker in a thread: what it pushed, by the version that it made."""

    def __init__(self, address: str, number: int) -> None:
        self.number = number
        self.session: Session = connect(
            address, model="m", worker=f"w{number}", retry_for_s=120.0, shared_memory=number == 1
        )
        self.made: dict[int, torch.Tensor] = {}
        self.problem: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.ends = threading.Event()

    def _run(self) -> None:
        pushes = 0
        try:
            while not self.ends.is_set():
                gradient = _gradient(self.number, pushes)
                receipt = self.session.push({"w": gradient})
                assert receipt.outcome == "applied"
                assert receipt.version not in self.made
                self.made[receipt.version] = gradient
                pushes += 1
        except BaseException as problem:  # noqa: BLE001 - the test looks at it
            self.problem = problem


def _replayed(made: dict[int, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The gradients stepped here, in the order of their versions."""
    weight = torch.nn.Parameter(torch.zeros(SHAPE))
    optimizer = Adadelta([weight], lr=0.7)
    for version in range(1, len(made) + 1):
        weight.grad = made[version].clone()
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


def _survives(data: Path, kills: int, seed: int) -> int:
    chance = random.Random(seed)
    server = start_server(data, *OPTIONS)
    address = f"unix:{server.unix}"
    pushers = [Pusher(address, number) for number in range(WORKERS)]
    pushers[0].session.create({"w": torch.zeros(SHAPE)}, [{"rule": "adadelta", "params": ["w"], "lr": 0.7}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pusher in pushers:
            pusher.session.member()
            pusher.thread.start()
        try:
            for _ in range(kills):
                time.sleep(chance.uniform(SHORTEST_S, LONGEST_S))
                server.kill()
                server = start_server(data, "--grpc", server.grpc, *OPTIONS)
        finally:
            for pusher in pushers:
                pusher.ends.set()
            for pusher in pushers:
                pusher.thread.join()
    for pusher in pushers:
        if pusher.problem is not None:
            raise pusher.problem
    made = {version: gradient for pusher in pushers for version, gradient in pusher.made.items()}
    assert sorted(made) == list(range(1, len(made) + 1))
    weight, state = _replayed(made)
    held = pushers[0].session.pull_state()
    for _, name, values in held.dense():
        expected = weight if not name else state[name]
        assert torch.equal(values.view(SHAPE), expected), name
    for pusher in pushers:
        pusher.session.close()
    assert server.stop() == 0
    return len(made)


@pytest.mark.timeout(600)
def test_killed_at_random(data: Path) -> None:
    assert _survives(data, 50, 1) > 200


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_a_thousand_times(data: Path) -> None:
    print(f"{_survives(data, 1000, 2)} pushes")
