"""Pushes to several ranks through lost replies, cuts and kills: each applied exactly once, on every rank.

The parameter lies in all ranks, and each push leaves its own digit in every element of Adagrad's `sum`: an element that
another rank holds would show a push that is missing there, or twice. A push that some ranks have on their disks and others have
not is applied in none: its worker is told that it is superseded, and pushes it again.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from pushstep.client import Session, connect
from pushstep.optim import Adagrad
from tests.support.ranks.group import RankGroup
from tests.support.servers.proxy import Proxy

RANKS = 3
ELEMENTS = 40_000
RETRY_S = 120.0


class Job:
    """A group whose ranks are all started again when one has ended, as torchrun does; each behind a proxy."""

    def __init__(self, data: Path) -> None:
        # the proxies' targets are known once the ranks have taken their ports, which they keep
        self.proxies = [Proxy("127.0.0.1:1") for _ in range(RANKS)]
        advertised = [None, *(proxy.address for proxy in self.proxies[1:])]
        self.group = RankGroup(data, RANKS, "--durability", "durable", advertised=advertised)
        for proxy, rank in zip(self.proxies, self.group.ranks, strict=True):
            proxy.target = rank.grpc
        self.restarts = 0

    @property
    def address(self) -> str:
        """Where workers reach rank 0."""
        return self.proxies[0].address

    def kill(self, rank: int) -> None:
        """SIGKILL to one rank; the others end by themselves, and all are started again."""
        self.group.kill(rank)
        self.group.start()
        self.restarts += 1

    def close(self) -> None:
        """End it."""
        for rank in self.group.ranks:
            rank.kill()
        for proxy in self.proxies:
            proxy.close()


@contextmanager
def running(data: Path) -> Iterator[Job]:
    with ExitStack() as ends:
        job = Job(data)
        ends.callback(job.close)
        yield job


def gradient(worker: int, number: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Small whole numbers, others for each worker and push: sums of squares are exact, and tell the order."""
    return np.full(ELEMENTS, 1 + (7 * worker + number) % 5, np.float32)


class Pusher(threading.Thread):
    """A worker that makes its pushes, one after the other."""

    def __init__(self, address: str, number: int, pushes: int) -> None:
        super().__init__(name=f"pusher-{number}", daemon=True)
        self.number = number
        self.versions: list[int] = []
        self.fault: BaseException | None = None
        # pushes that were applied in no rank because one died
        self.superseded = 0
        # it waits in front of this push: on a fast machine all would be made before the next rank is killed
        self.limit = 1
        self._address = address
        self._pushes = pushes

    def run(self) -> None:
        try:
            with self._session() as session:
                session.create({"w": np.zeros(ELEMENTS, np.float32)}, GROUPS)
                while (push := len(self.versions)) < self._pushes:
                    while push >= self.limit:
                        threading.Event().wait(0.01)
                    given = {"w": gradient(self.number, push)}
                    receipt = session.push(given) if push % 2 else session.exchange(given)[0]
                    if receipt.outcome == "superseded":
                        self.superseded += 1
                        continue
                    assert receipt.outcome == "applied", receipt
                    self.versions.append(receipt.version)
        except BaseException as fault:  # noqa: BLE001 - the test raises it
            self.fault = fault

    def _session(self) -> Session:
        return connect(
            self._address,
            model="m",
            worker=f"w{self.number}",
            timeout_s=10.0,
            retry_for_s=RETRY_S,
            shared_memory=False,
        )


GROUPS = [{"rule": "adagrad", "params": ["w"], "lr": 0.125}]


def torment(job: Job, pushers: list[Pusher], kills: int, total: int) -> int:
    """Cut connections and kill ranks, each rank in turn, until all pushes are made; how many cuts there were."""
    chance, cuts = random.Random(1), 0
    while any(pusher.is_alive() for pusher in pushers):
        done = sum(len(pusher.versions) for pusher in pushers)
        for pusher in pushers:
            part = (job.restarts + 1) * total // (kills + 1) // len(pushers) + 1
            pusher.limit = total if job.restarts >= kills else part
        if job.restarts < kills and done >= (job.restarts + 1) * total // (kills + 1):
            job.kill(job.restarts % RANKS)
        else:
            proxy = chance.choice(job.proxies)
            proxy.hold("down")
            threading.Event().wait(0.01)
            proxy.cut()
            proxy.release("down")
            cuts += 1
        threading.Event().wait(chance.uniform(0.1, 0.8))
    return cuts


@pytest.mark.timeout(7200)
@pytest.mark.filterwarnings("ignore:.*this step was .* going on from there:RuntimeWarning")
@pytest.mark.parametrize(
    ("workers", "each", "kills"), [(2, 20, 2), pytest.param(4, 5_000, 60, marks=pytest.mark.soak)]
)
def test_each_push_is_applied_exactly_once_on_every_rank(
    tmp_path: Path, workers: int, each: int, kills: int
) -> None:
    with running(tmp_path / "data") as job:
        pushers = [Pusher(job.address, number, each) for number in range(workers)]
        for pusher in pushers:
            pusher.start()
        cuts = torment(job, pushers, kills, workers * each)
        assert [pusher.fault for pusher in pushers] == [None] * workers
        with connect(job.address, model="m", worker="reader", shared_memory=False) as session:
            values = session.pull()
    order = {version: (p.number, push) for p in pushers for push, version in enumerate(p.versions)}
    # every version is some worker's push, and every push is one version
    assert sorted(order) == list(range(1, workers * each + 1))
    parameter = torch.nn.Parameter(torch.zeros(ELEMENTS))
    optimizer = Adagrad([parameter], lr=0.125)
    for version in sorted(order):
        parameter.grad = torch.from_numpy(gradient(*order[version]))
        optimizer.step()
    assert np.array_equal(values["w"], parameter.detach().numpy())
    assert job.restarts == kills
    superseded = sum(pusher.superseded for pusher in pushers)
    assert superseded <= kills * workers
    print(f"{workers * each} pushes, {kills} kills, {cuts} cuts, {superseded} superseded")
    assert cuts > 0
