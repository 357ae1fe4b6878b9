"""Workers die, or freeze, before and after their push and at random moments: rounds go on in time, nothing counts twice.

The victims are processes of their own, the survivors are threads here; all push under `sync` with `reduce = sum` into
one Adagrad parameter. An element that all share grows by the square of each round's contributors, and every push has
one of its own, which is 1 if it was applied once, in whatever epoch its worker came back.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pushstep.client import Receipt, Session, connect
from tests.support.processes.victim import MOST_PUSHES, SHARED, Told, Victim, model_of
from tests.support.servers.harness import RunningServer, running_server, wait_until
from tests.support.servers.operators import set_policy

LEASE_S = 1.5
# What a machine with far too much to do may add to it.
BUSY_S = 20.0
SYNC = {"policy": "sync", "reduce": "sum", "timeout_s": None, "min_workers": 2}
SURVIVORS = ("a", "b")
AT_ONCE = 25
WITHIN_S = 0.3


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose leases are short."""
    with running_server(tmp_path_factory.mktemp("deaths") / "data", "--lease-s", str(LEASE_S)) as running:
        yield running


@dataclass
class House:
    """A model, the processes that push to it, and what its survivors were told."""

    server: RunningServer
    model: str
    processes: int
    folder: Path
    victims: list[Victim]
    receipts: list[Receipt]
    waited_s: list[float]

    def start(self, name: str, *options: str) -> Victim:
        """A new process under a name."""
        where = (self.server.grpc, self.model, name, len(self.victims), self.processes, self.folder)
        self.victims.append(Victim(*where, *options))
        return self.victims[-1]

    def workers(self) -> dict[str, dict[str, Any]]:
        shown = self.server.rest("GET", f"/v1/models/{self.model}/workers").json()["workers"]
        return {worker["name"]: worker for worker in shown}

    def push(self, session: Session) -> Receipt:
        """One push of a survivor's, timed."""
        grads = np.zeros(SHARED + self.processes * MOST_PUSHES, np.float32)
        grads[0] = 1
        begun_s = time.monotonic()
        receipt, _ = session.exchange({"p": grads})
        self.waited_s.append(time.monotonic() - begun_s)
        self.receipts.append(receipt)
        return receipt

    def check(self, struck_within_s: float) -> tuple[dict[int, tuple[str, ...]], list[bool]]:
        """That all is as everybody was told, and that nobody waited for too long.

        Each version's contributors, and of each push of whose fate nobody was told whether it had been applied.
        """
        assert max(self.waited_s) <= struck_within_s + LEASE_S + BUSY_S
        rounds: dict[int, tuple[str, ...]] = {}
        told = {element: said for victim in self.victims for element, said in victim.told().items()}
        own = [Told(str(r.outcome), r.version, tuple(r.contributors)) for r in self.receipts]
        for said in (*told.values(), *own):
            assert said.outcome in (None, "applied", "dropped_late", "fenced")
            if said.outcome == "applied":
                assert rounds.setdefault(said.version, said.contributors) == said.contributors
                assert len(set(said.contributors)) == len(said.contributors)
        assert sorted(rounds) == list(range(1, len(rounds) + 1))
        with connect(self.server.grpc, model=self.model, worker="reader") as reader:
            state = {name: values for _, name, values in reader.pull_state().dense()}
        sums = state["sum"].tolist()
        assert sums[0] == sum(len(names) ** 2 for names in rounds.values())
        doubts: list[bool] = []
        for element, applied in list(enumerate(sums))[SHARED:]:
            if element not in told:
                assert applied == 0
            elif told[element].outcome in (None, "fenced"):  # its worker does not know
                assert applied in (0, 1)
                doubts.append(applied == 1)
            else:
                assert applied == (told[element].outcome == "applied"), (element, told[element])
        return rounds, doubts


@contextmanager
def house_of(
    server: RunningServer, model: str, processes: int, folder: Path
) -> Iterator[tuple[House, list[Session]]]:
    """A model with its survivors' sessions; every victim is ended."""
    house = House(server, model, processes, folder, [], [], [])
    with ExitStack() as stack:
        sessions = []
        for name in SURVIVORS:
            session = connect(server.grpc, model=model, worker=name, timeout_s=5, retry_for_s=60)
            sessions.append(stack.enter_context(session))
            session.create(*model_of(processes), policy=SYNC)
            session.pull()
        try:
            yield house, sessions
        finally:
            for victim in house.victims:
                victim.end()


def test_struck_before_and_after_their_pushes(short: RunningServer, model_name: str, tmp_path: Path) -> None:
    """What was handed in counts; who had handed nothing in is waited for as long as its lease; both come back."""
    blows = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
    with house_of(short, model_name, 6, tmp_path) as (house, sessions), ThreadPoolExecutor(2) as threads:

        def a_round(*pushers: Victim) -> tuple[str, ...]:
            """One push of each survivor's, and of these; who contributed."""
            for victim in pushers:
                victim.push()
            first, second = [f.result() for f in [threads.submit(house.push, s) for s in sessions]]
            assert first.contributors == second.contributors
            return tuple(first.contributors)

        victims = [f"{how}-{when}" for how in blows for when in ("after", "before")]
        held = {name: house.start(name, "asked") for name in victims}
        wait_until(lambda: len(house.workers()) == 6, BUSY_S)
        assert a_round(*held.values()) == ("a", "b", *sorted(victims))
        for name in victims:
            if name.endswith("after"):
                held[name].push()
                wait_until(lambda name=name: house.workers()[name].get("round") == "present", BUSY_S)
        for name, victim in held.items():
            victim.strike(blows[name.partition("-")[0]])
        assert a_round() == ("a", "b", "kill-after", "stop-after")
        assert house.waited_s[-1] > LEASE_S / 2  # they had been waited for
        assert a_round() == ("a", "b")

        killed, stopped = ([name for name in victims if name.startswith(how)] for how in blows)
        for name in killed:
            held[name] = house.start(name, "asked")
        for name in stopped:
            held[name].strike(signal.SIGCONT)
        wait_until(lambda: held["stop-after"].settled() == 2, BUSY_S)
        wait_until(lambda: all(house.workers()[name]["epoch"] == 2 for name in killed), BUSY_S)

        def present(name: str) -> bool:
            return house.workers()[name].get("round") == "present"

        for name in stopped:
            while not present(name):  # a push whose round is over is dropped, and the next one is not
                settled = held[name].settled()
                held[name].push()
                wait_until(
                    lambda name=name, before=settled: present(name) or held[name].settled() > before, BUSY_S
                )
        assert a_round(*(held[name] for name in killed)) == ("a", "b", *sorted(victims))
        wait_until(lambda: all(victim.settled() for victim in house.victims[-2:]), BUSY_S)
        house.check(0)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("waves", [2, pytest.param(20, marks=pytest.mark.soak)])
def test_struck_at_random_moments(short: RunningServer, model_name: str, tmp_path: Path, waves: int) -> None:
    """25 at once, each at a moment of its own; then half of them go on, and new processes come for the others.

    20 waves take at most 20 minutes.
    """
    chance = random.Random(waves)
    enough = threading.Event()
    with (
        house_of(short, model_name, AT_ONCE * (waves + 1), tmp_path) as (house, sessions),
        ThreadPoolExecutor(2) as threads,
    ):

        def survive(session: Session) -> None:
            with session:  # the other may have begun another round, which expects this one
                while not enough.is_set():
                    house.push(session)

        surviving: list[Future[None]] = [threads.submit(survive, session) for session in sessions]
        try:
            pushing = [house.start(f"v{number:02}") for number in range(AT_ONCE)]
            for _ in range(waves):
                pushing = strike(house, pushing, chance)
            until_all_push(house, pushing)
            for victim in house.victims:
                victim.end()
            reached = len(house.receipts)
            wait_until(lambda: len(house.receipts) > reached + 10, BUSY_S + LEASE_S)
        finally:
            # or who pushes when the other has left would wait for a second worker
            set_policy(short, model_name, **{**SYNC, "min_workers": 1})
            enough.set()
        for future in surviving:
            future.result(BUSY_S + LEASE_S)
        rounds, doubts = house.check(WITHIN_S)
    outcomes = {said.outcome for victim in house.victims for said in victim.told().values()}
    assert {"applied", "dropped_late", "fenced"} <= outcomes
    assert max(map(len, rounds.values())) > AT_ONCE / 2
    print(
        f"\n{AT_ONCE * waves} workers struck at random moments in {len(rounds)} rounds: each push applied once or not at "
        f"all, of {len(doubts)} in doubt {sum(doubts)} had been; the longest round took {max(house.waited_s):.2f} s with "
        f"leases of {LEASE_S} s"
    )


def until_all_push(house: House, victims: list[Victim]) -> None:
    """Until each of them is in the rounds; who is not, and whom the server waits for, is said otherwise."""
    try:
        wait_until(lambda: all(victim.is_pushing() for victim in victims), 3 * BUSY_S)
    except AssertionError as error:
        missing = [(v.name, v.number, v.settled(), v.is_alive()) for v in victims if not v.is_pushing()]
        raise AssertionError(
            f"not in the rounds: {missing}; the server's table: {house.workers()}"
        ) from error


def strike(house: House, pushing: list[Victim], chance: random.Random) -> list[Victim]:
    """Kill or stop each, let the rounds go on, and have each back in one of the ways that there are."""
    until_all_push(house, pushing)
    begun_s = time.monotonic()
    back, frozen = [], []
    for after_s, victim in sorted(
        [(chance.uniform(0, WITHIN_S), victim) for victim in pushing], key=itemgetter(0)
    ):
        threading.Event().wait(max(0.0, begun_s + after_s - time.monotonic()))
        stops = chance.random() < 0.5
        victim.strike(signal.SIGSTOP if stops else signal.SIGKILL)
        if chance.random() < 0.3:
            back.append(
                house.start(victim.name, "takeover")
            )  # while its lease is live, and its push perhaps held
        elif stops and chance.random() < 0.7:
            back.append(victim)
        else:
            back.append(house.start(victim.name))  # which waits for the lease to end
        if stops:
            frozen.append((victim, back[-1]))
    reached = len(house.receipts)
    wait_until(lambda: len(house.receipts) >= reached + 4, LEASE_S + BUSY_S)
    for victim, successor in frozen:
        if victim is not successor:
            wait_until(successor.is_pushing, BUSY_S)  # the one that goes on now is fenced
        victim.strike(signal.SIGCONT)
    return back
