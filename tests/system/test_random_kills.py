"""A server under load is killed at random instants, again and again: what it holds is a replay of what it acknowledged.

Three workers push at once to each model. Each knows its gradients, and each receipt names the version that the push made. So
local torch can step the same gradients in the order of the versions, and must come to the same bits. A kill leaves what the
kernel was given, so that holds at `everysec` as at `durable`.
"""

from __future__ import annotations

import random
import threading
import time
import warnings
from collections.abc import Callable, Sequence
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

    def __init__(self, address: str, model: str, number: int) -> None:
        self.number = number
        self.session: Session = connect(
            address, model=model, worker=f"w{number}", retry_for_s=120.0, shared_memory=number == 1
        )
        # by the version that it made, the number of a push
        self.made: dict[int, int] = {}
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
                self.made[receipt.version] = pushes
                pushes += 1
        except BaseException as problem:  # noqa: BLE001 - the test looks at it
            self.problem = problem


def _replayed(pushers: list[Pusher]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The gradients of one model's workers stepped here, in the order of their versions: each once, and none is missing."""
    made = sorted((at, worker.number, push) for worker in pushers for at, push in worker.made.items())
    assert [version for version, _, _ in made] == list(range(1, len(made) + 1))
    weight = torch.nn.Parameter(torch.zeros(SHAPE))
    optimizer = Adadelta([weight], lr=0.7)
    for _, worker, push in made:
        weight.grad = _gradient(worker, push)
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


def _survives(
    data: Path, seed: int, levels: Sequence[str], goes_on: Callable[[int, int], bool], longest_s: float
) -> tuple[int, int]:
    """Kill a server with a model at each level for as long as `goes_on(kills, pushes)`; how many there were of both."""
    chance = random.Random(seed)
    server = start_server(data, *OPTIONS)
    address = f"unix:{server.unix}"
    models = {level: [Pusher(address, level, number) for number in range(WORKERS)] for level in levels}
    pushers = [pusher for of_model in models.values() for pusher in of_model]
    for level, of_model in models.items():
        of_model[0].session.create(
            {"w": torch.zeros(SHAPE)}, [{"rule": "adadelta", "params": ["w"], "lr": 0.7}]
        )
        assert (
            server.rest("PATCH", f"/v1/models/{level}/durability", json={"level": level}).status_code == 200
        )
    kills = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pusher in pushers:
            pusher.session.member()
            pusher.thread.start()
        try:
            while goes_on(kills, sum(len(pusher.made) for pusher in pushers)):
                time.sleep(chance.uniform(SHORTEST_S, longest_s))
                server.kill()
                kills += 1
                server = start_server(data, "--grpc", server.grpc, *OPTIONS)
        finally:
            for pusher in pushers:
                pusher.ends.set()
            for pusher in pushers:
                pusher.thread.join()
    for pusher in pushers:
        if pusher.problem is not None:
            raise pusher.problem
    for of_model in models.values():
        weight, state = _replayed(of_model)
        for _, name, values in of_model[0].session.pull_state().dense():
            assert torch.equal(values.view(SHAPE), state[name] if name else weight), name
    for pusher in pushers:
        pusher.session.close()
    assert server.stop() == 0
    return kills, sum(len(pusher.made) for pusher in pushers)


@pytest.mark.timeout(600)
def test_killed_at_random(data: Path) -> None:
    assert _survives(data, 1, ["durable"], lambda kills, _: kills < 50, LONGEST_S)[1] > 200


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_a_thousand_times(data: Path) -> None:
    """Takes about 9 minutes."""
    print(f"{_survives(data, 2, ['durable'], lambda kills, _: kills < 1000, LONGEST_S)[1]} pushes")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_pushes_are_applied_exactly_once(data: Path) -> None:
    """At both levels that have a journal, with fewer kills and more pushes between two of them. Takes at most an hour."""
    begun_s = time.monotonic()
    kills, pushes = _survives(data, 3, ["durable", "everysec"], lambda _, pushes: pushes < 100_000, 2.0)
    print(f"{pushes} pushes, {kills} kills, {time.monotonic() - begun_s:.0f} s")
