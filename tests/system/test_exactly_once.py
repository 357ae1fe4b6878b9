"""Pushes through a real server on a bad network, by processes that are killed: each applied exactly once.

Replies are lost, pushes come twice or much later, behind ones that were sent after them, streams and connections break,
the worker processes are killed and come back under their names, the server is stopped in order and started again.
Adagrad's `sum` of the element that each session has to itself says how often its pushes
were applied; the parameters, replayed in the order of the versions that the receipts name, must be the server's bits.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pushstep.client import connect
from pushstep.optim import Adagrad
from tests.support.processes import faulty_worker
from tests.support.processes.faulty_worker import SHARED, gradient, model_of
from tests.support.processes.nursery import Nursery, Script, nursery
from tests.support.servers.harness import RunningServer
from tests.support.servers.host import Host, hosted
from tests.support.servers.proxy import Proxy

SESSIONS_EACH = 12
PROCESSES = 2
SESSIONS = SESSIONS_EACH * PROCESSES
WORKER = f"import runpy; runpy.run_path({faulty_worker.__file__!r}, run_name='__main__')"


class Crew:
    """One process after another of the same sessions, behind a proxy of their own."""

    def __init__(
        self, server: RunningServer, scripts: Nursery, number: int, pushes: int, folder: Path
    ) -> None:
        self._scripts = scripts
        self.proxy = Proxy(server.grpc)
        self.diary = folder / f"diary-{number}"
        self.kills = self.cuts = self._written = 0
        self._first = number * SESSIONS_EACH
        self._pushes = pushes
        self.script = self._start()

    def _start(self) -> Script:
        where = [self.proxy.address, "m", self._first, SESSIONS_EACH, SESSIONS, self._pushes]
        arguments = (*where, self.diary, self._first + self.kills)
        return self._scripts.start(WORKER, *map(str, arguments))

    def kill(self) -> None:
        """SIGKILL, and another process under the same names."""
        self.script.kill()
        self.kills += 1
        self.script = self._start()

    def cut(self, chance: random.Random) -> None:
        """Break every connection; half of the time replies that had left are lost with them."""
        if chance.random() < 0.5:
            self.proxy.hold("down")
            time.sleep(0.01)
        self.proxy.cut()
        self.proxy.release("down")
        self.cuts += 1

    def gets_on(self) -> bool:
        """Whether anything has been written since the last cut: on a slow machine connecting takes a while."""
        before, self._written = self._written, self.diary.stat().st_size if self.diary.exists() else 0
        return self._written > before

    def told(self) -> int:
        """How many pushes have been answered."""
        return self.diary.read_text().count("\ntold ") if self.diary.exists() else 0

    def close(self) -> None:
        """End it."""
        self.script.process.kill()
        self.script.wait()
        self.proxy.close()


@contextmanager
def crews_of(server: RunningServer, pushes: int, folder: Path) -> Iterator[list[Crew]]:
    crews: list[Crew] = []
    with nursery(folder) as scripts:
        try:
            crews += [Crew(server, scripts, number, pushes, folder) for number in range(PROCESSES)]
            yield crews
        finally:
            for crew in crews:
                crew.close()


def torment(host: Host, crews: list[Crew], kills_each: int, total: int, cuts_s: float) -> None:
    """Cut, kill and restart until everybody is through; kills and restarts are spread over the pushes."""
    chance = random.Random(1)
    due = [kill * total // len(crews) // (kills_each + 1) for kill in range(1, kills_each + 1)]
    while any(crew.script.process.poll() is None for crew in crews):
        threading.Event().wait(chance.uniform(0.2, 1.8) * cuts_s)
        # between the kills
        if sum(crew.told() for crew in crews) >= (host.restarts + 0.5) * total / kills_each:
            host.restart()
        for crew in crews:
            if crew.script.process.poll() is not None:
                continue
            if crew.kills < kills_each and crew.told() >= due[crew.kills]:
                crew.kill()
            elif chance.random() < 0.5 and crew.gets_on():
                crew.cut(chance)
    assert [crew.script.wait() for crew in crews] == [0] * len(crews), [crew.script.said() for crew in crews]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("total", "kills_each"), [(2_520, 1), pytest.param(100_080, 12, marks=pytest.mark.soak)]
)
def test_each_push_is_applied_exactly_once(tmp_path: Path, total: int, kills_each: int) -> None:
    """100,080 pushes take at most an hour."""
    each = total // SESSIONS
    with hosted(tmp_path / "data") as host:
        server = host.server
        with connect(server.grpc, model="m", worker="creator") as session:
            session.create(*model_of(SESSIONS))
        begun_s = time.monotonic()
        with crews_of(server, each, tmp_path) as crews:
            torment(host, crews, kills_each, total, 0.4)
            seconds = time.monotonic() - begun_s
            seen: Counter[str] = Counter()
            order: dict[int, tuple[int, int]] = {}
            for crew in crews:
                for line in crew.diary.read_text().splitlines():
                    kind, *words = line.split()
                    assert kind != "bad", line
                    seen[kind if kind not in ("fault", "doubt") else words[0]] += 1
                    if kind == "told":
                        assert words[2:] == ["1", words[3], "applied"], line
                        assert order.setdefault(int(words[3]), (int(words[0]), int(words[1]))) == (
                            int(words[0]),
                            int(words[1]),
                        )
            kills, cuts = sum(crew.kills for crew in crews), sum(crew.cuts for crew in crews)
        with connect(server.grpc, model="m", worker="reader") as session:
            state = {name: values for _, name, values in session.pull_state().dense()}
    # every version is some session's step, and every step is one version
    assert sorted(order) == list(range(1, total + 1))
    assert Counter(order.values()) == Counter((s, n) for s in range(SESSIONS) for n in range(1, each + 1))
    squares = sum(float(1 + number % 3) ** 2 for number in range(1, each + 1))
    assert state["sum"][SHARED:].tolist() == [squares] * SESSIONS
    check_replay(order, state)
    faults = {name: seen[name] for name in ("lost_reply", "sent_twice", "sent_much_later", "broken_off")}
    assert min(faults.values()) > 0
    assert (kills, host.restarts) == (kills_each * PROCESSES, kills_each)
    assert cuts > 0
    print(
        f"\n{total} pushes by {SESSIONS} sessions in {seconds:.0f} s ({total / seconds:.0f}/s), each applied exactly "
        f"once: {faults}, {cuts} connections cut, {kills} processes killed, of their pushes in doubt "
        f"{seen['applied']} had been applied and {seen['not_applied']} not, {host.restarts} restarts of the server"
    )


def check_replay(order: dict[int, tuple[int, int]], state: dict[str, torch.Tensor]) -> None:
    """The same steps here, in the same order: the same bits. In another order there are others."""
    parameter, sums = replayed([order[version] for version in sorted(order)])
    assert torch.equal(state[""], parameter)
    assert torch.equal(state["sum"], sums)
    backwards, _ = replayed([order[version] for version in sorted(order, reverse=True)])
    assert not torch.equal(state[""], backwards)


def replayed(steps: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The parameters and `sum` that these steps make."""
    parameter = torch.nn.Parameter(torch.zeros(SHARED + SESSIONS))
    optimizer = Adagrad([parameter], lr=0.125)
    for step in steps:
        parameter.grad = torch.from_numpy(gradient(*step, SESSIONS))
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]["sum"]
