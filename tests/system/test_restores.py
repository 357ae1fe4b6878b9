"""Snapshots restored while four workers push, under each policy: everybody is told once, and nothing of before comes back.

Each push has an element of its own, which its gradient alone moves: what was applied, and in which timeline, can be
read off the parameters. The receipts and the model's events say which versions there were.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from pushstep.client import Outcome, Receipt, connect
from tests.support.servers.harness import RunningServer, wait_until
from tests.support.servers.operators import restore, show_model, take_snapshot

WORKERS = 4
MOST_PUSHES = 1000  # of one worker
LAST = WORKERS - 1  # the worker that a test makes wait
GROUPS = [{"rule": "adagrad", "params": ["p"], "lr": 0.5}]
SYNC = {"policy": "sync", "reduce": "sum", "timeout_s": None, "min_workers": WORKERS}
POLICIES = [{"policy": "async"}, {"policy": "bounded", "bound": 1}, SYNC]
Key = tuple[int, int]  # whose push, and which of theirs


@dataclass
class Crew:
    """Four workers at work, what they were told, and what each of their exchanges returned."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    begun: int = 0  # the highest number of a push that anybody has begun
    last: int = MOST_PUSHES - 1
    goes_on: threading.Event = field(default_factory=threading.Event)
    receipts: dict[Key, Receipt] = field(default_factory=dict)
    seen: dict[Key, frozenset[Key]] = field(default_factory=dict)
    warned: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))

    def work(self, address: str, model: str, index: int, there: threading.Barrier) -> None:
        """Push one element after the other."""
        grads = np.zeros(WORKERS * MOST_PUSHES, np.float32)
        with connect(
            address, model=model, worker=f"w{index}", timeout_s=20, retry_for_s=60, shared_memory=False
        ) as session:
            session.create({"p": np.zeros_like(grads)}, GROUPS)
            there.wait(30)
            for number in range(MOST_PUSHES):
                if not self.begins(number):
                    break
                if index == LAST:
                    self.goes_on.wait(60)
                mine = index * MOST_PUSHES + number
                grads[mine] = 1
                receipt, arrays = session.exchange({"p": grads})
                grads[mine] = 0
                self.seen[index, number] = elements(arrays["p"])
                self.receipts[index, number] = receipt

    def begins(self, number: int) -> bool:
        """Whether a worker is to make one push more."""
        with self.lock:
            self.begun = max(self.begun, number)
            return number <= self.last

    def finish(self) -> None:
        """Have each come as far as the first of them: who stopped before would be waited for in a round."""
        with self.lock:
            self.last = min(self.last, self.begun)
        self.goes_on.set()

    def told(self, outcome: Outcome) -> dict[int, list[int]]:
        """By worker, which of its pushes came to this."""
        found: dict[int, list[int]] = defaultdict(list)
        for (index, number), receipt in sorted(dict(self.receipts).items()):
            if receipt.outcome is outcome:
                found[index].append(number)
        return found

    def applied(self, timeline: int, until: int = 1 << 62) -> frozenset[Key]:
        """The pushes that receipts say were applied in a timeline, up to a version."""
        return frozenset(
            key
            for key, receipt in dict(self.receipts).items()
            if receipt.outcome is Outcome.APPLIED
            and receipt.timeline == timeline
            and receipt.version <= until
        )


def elements(parameter: np.ndarray[Any, Any]) -> frozenset[Key]:
    """Whose gradients have moved a parameter: each once, or it would not be where it is."""
    moved = np.flatnonzero(parameter)
    np.testing.assert_allclose(parameter[moved], -0.5, rtol=1e-6)
    return frozenset((int(at) // MOST_PUSHES, int(at) % MOST_PUSHES) for at in moved)


@contextmanager
def crew_of(server: RunningServer, model: str, policy: dict[str, Any]) -> Iterator[Crew]:
    """Four workers; each warning goes to the account of the one whose thread it was."""
    crew, there = Crew(), threading.Barrier(WORKERS)
    names: dict[int, int] = {}
    crew.goes_on.set()
    with connect(server.grpc, model=model, worker="creator") as creator:
        creator.create({"p": np.zeros(WORKERS * MOST_PUSHES, np.float32)}, GROUPS, policy=policy)

    def work(index: int) -> None:
        names[threading.get_ident()] = index
        crew.work(server.grpc, model, index, there)

    def note(message: Warning | str, *_: Any) -> None:
        crew.warned[names[threading.get_ident()]].append(str(message))

    with warnings.catch_warnings(), ThreadPoolExecutor(WORKERS) as threads:
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        futures: list[Future[None]] = [threads.submit(work, index) for index in range(WORKERS)]
        try:
            yield crew
        finally:
            crew.finish()
        for future in futures:
            future.result(60)


def let_wait(server: RunningServer, model: str, crew: Crew, policy: str) -> None:
    """Stop one worker, until the others wait for it where the policy has them wait."""
    crew.goes_on.clear()

    def waiting() -> bool:
        shown = server.rest("GET", f"/v1/models/{model}/workers").json()["workers"]
        others = [worker for worker in shown if worker["name"] not in ("creator", f"w{LAST}")]
        if policy == "sync":
            return all(worker["round"] == "present" for worker in others)
        return all(worker["clocks_ahead"] == 2 for worker in others)

    if policy != "async":
        wait_until(waiting, 30)


def check_versions(crew: Crew, timeline: int, first: int) -> None:
    """One after the other from `first` on; each made once, by those whom its receipts name."""
    made: dict[int, set[str]] = defaultdict(set)
    named: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    for index, number in crew.applied(timeline):
        receipt = crew.receipts[index, number]
        assert f"w{index}" not in made[receipt.version]
        made[receipt.version].add(f"w{index}")
        named[receipt.version].add(tuple(receipt.contributors))
    assert sorted(made) == list(range(first, first + len(made)))
    for version, workers in made.items():
        assert named[version] == {tuple(sorted(workers))}


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["policy"])
def test_a_snapshot_restored_under_four_workers(
    server: RunningServer, model_name: str, policy: dict[str, Any]
) -> None:
    """Twice: while the others wait for one of them, and in the middle of everything."""

    def reached(version: int) -> None:
        wait_until(lambda: show_model(server, model_name)["version"] >= version, 60)

    with crew_of(server, model_name, policy) as crew:
        reached(12)
        snapshot = take_snapshot(server, model_name)
        reached(snapshot["version"] + 8)
        let_wait(server, model_name, crew, policy["policy"])
        assert restore(server, model_name, snapshot["id"])["timeline"] == 2
        crew.goes_on.set()
        wait_until(lambda: len(crew.told(Outcome.SUPERSEDED)) == WORKERS, 60)
        reached(snapshot["version"] + 8)
        assert restore(server, model_name, snapshot["id"])["timeline"] == 3
        wait_until(lambda: sum(map(len, crew.told(Outcome.SUPERSEDED).values())) == 2 * WORKERS, 60)
        reached(snapshot["version"] + 8)
    assert {receipt.outcome for receipt in crew.receipts.values()} == {Outcome.APPLIED, Outcome.SUPERSEDED}

    # each was told of each restore, by one outcome and one warning
    told = crew.told(Outcome.SUPERSEDED)
    assert {index: len(numbers) for index, numbers in told.items()} == dict.fromkeys(range(WORKERS), 2)
    for index in range(WORKERS):
        for timeline, warning in zip((2, 3), crew.warned[index], strict=True):
            assert re.search(rf"restored to version \d+ \(timeline {timeline}\)", warning)

    # what the model is made of: the snapshot, and what came in the last timeline
    kept = crew.applied(1, snapshot["version"])
    ended = [crew.applied(1) - kept, crew.applied(2)]
    assert all(ended)
    with server.connect(model_name, "reader") as reader:
        assert elements(reader.pull()["p"]) == kept | crew.applied(3)
        assert reader.version == snapshot["version"] + len(
            {crew.receipts[k].version for k in crew.applied(3)}
        )

    # whoever was told went on from the snapshot: nothing that had ended is in what it was given from then on
    superseded = {(index, number) for index, numbers in told.items() for number in numbers}
    for index, (first, second) in told.items():
        for number in range(first, max(n for i, n in crew.receipts if i == index) + 1):
            past = ended[0] if number < second else ended[0] | ended[1]
            assert kept <= crew.seen[index, number]
            assert not crew.seen[index, number] & (past | superseded)

    for timeline, first in ((1, 1), (2, snapshot["version"] + 1), (3, snapshot["version"] + 1)):
        check_versions(crew, timeline, first)
    events = server.rest("GET", f"/v1/models/{model_name}/events").json()["events"]
    at = [(event["timeline"], event["version"]) for event in events]
    assert at == sorted(at)
    restored = [place for place, event in zip(at, events, strict=True) if event["kind"] == "restored"]
    assert restored == [(2, snapshot["version"]), (3, snapshot["version"])]
    joined = [event["by"] for event in events if event["kind"] == "joined" and event["timeline"] > 1]
    assert all(joined.count(f"w{index}") == 2 for index in range(WORKERS))
