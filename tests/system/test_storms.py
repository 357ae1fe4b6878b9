"""Operators at work while workers push through a bad network: whoever is told anything is told the truth, and goes on.

Snapshots are taken, restored and deleted, policies and hyperparameters changed, workers evicted, quarantined and
released, the server restarted, while replies are lost, pushes come twice or late and connections break. Each push has
an element of its own, whose gradient is 1: Adagrad's `sum` says which pushes a model is made of, and how often. After
whatever happens each worker must be applied again: one that is refused for ever is as bad as one that counts twice.
"""

from __future__ import annotations

import random
import re
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pushstep.client import Outcome, Session, connect
from pushstep.client.transport.channel import Transport
from pushstep.proto.errors import (
    FateUnknown,
    Fenced,
    NoAnswer,
    NonfiniteGradient,
    Quarantined,
    Superseded,
)
from tests.support.processes.faulty_worker import Faults
from tests.support.servers.harness import wait_until
from tests.support.servers.host import Host, hosted
from tests.support.servers.operators import (
    delete_snapshot,
    evict,
    patch_group,
    release,
    restore,
    set_gate,
    set_policy,
    show_model,
    show_worker,
    take_snapshot,
)
from tests.support.servers.proxy import Proxy

MODEL = "m"
WORKERS = 6
MOST_PUSHES = 20_000  # of one worker
GROUPS = [{"rule": "adagrad", "params": ["p", "q"], "lr": 0.5}]
# how long anybody may go without an applied push, after whatever happened
GOES_ON_S = 60.0
ROUND = {"policy": "sync", "reduce": "sum", "late": "carry", "min_workers": 1}
POLICIES: list[dict[str, Any]] = [
    {"policy": "async"},
    {"policy": "bounded", "bound": 2},
    {**ROUND, "timeout_s": 1.0, "quorum": None},
    {**ROUND, "timeout_s": 2.0, "quorum": WORKERS - 2},
]
Place = tuple[int, int]  # a timeline and a version


class Diary:
    """What faults note, where test_exactly_once.py's go into a file."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.bad: list[str] = []

    def write(self, kind: str, *words: object) -> None:
        """One line."""
        if kind == "bad":
            self.bad.append(" ".join(map(str, words)))
        elif kind == "fault":
            self.seen[str(words[0])] += 1


@dataclass
class Told:
    """What one worker was told: of its pushes, of its uploads, and of restores."""

    pushes: dict[int, tuple[str, Place | None, tuple[str, ...]]] = field(default_factory=dict)
    uploads: list[tuple[float, str, Place | None]] = field(default_factory=list)
    # timelines, in the order in which it heard of them
    timelines: list[int] = field(default_factory=list)
    applied: int = 0
    mistakes: list[str] = field(default_factory=list)


class Worker:
    """Pushes, exchanges, pulls and uploads; makes a new session when its own is fenced."""

    def __init__(self, index: int, address: str, faults: Faults, seed: int) -> None:
        self.index, self.name, self.address = index, f"w{index}", address
        self.told = Told()
        self.poisoned = threading.Event()
        self.ends = threading.Event()
        self._faults = faults
        self._chance = random.Random(seed)
        self._number = 0

    def work(self) -> None:
        """One session after the other."""
        while not self.ends.is_set():
            with connect(
                self.address,
                model=MODEL,
                worker=self.name,
                timeout_s=10,
                retry_for_s=60,
                shared_memory=False,
                takeover=True,
            ) as session:
                self.told.timelines.append(session.member().timeline)
                self._train(session)

    def _train(self, session: Session) -> None:
        while not self.ends.is_set():
            drawn = self._chance.random()
            if drawn < 0.1:
                session.pull()
            try:
                if drawn > 0.95:
                    self._upload(session)
                self._step(session)
            except (Fenced, FateUnknown):
                return
            except Superseded as error:  # of an upload
                self.heard(int(error.fields["timeline"]))
            except Quarantined:  # of an upload, too
                self.ends.wait(0.01)

    def heard(self, timeline: int) -> None:
        """It is told of a restore."""
        self.told.timelines.append(timeline)

    def _step(self, session: Session) -> None:
        number, self._number = self._number, self._number + 1
        self._faults.trying[self.name] = self.index, number
        ids = np.array([self.index * MOST_PUSHES + number])
        value = np.nan if self.poisoned.is_set() else 1.0
        grads = {"p": (ids, np.full((1, 1), value, np.float32))}
        told = self.told.pushes
        told[number] = ("unknown", None, ())
        try:
            receipt = session.push(grads) if self.index % 2 else session.exchange(grads)[0]
        except (NonfiniteGradient, Quarantined, Fenced) as error:
            told[number] = (error.code, None, ())
            if isinstance(error, Fenced):
                raise
            self.ends.wait(0.01)
            return
        except NoAnswer:
            return
        told[number] = (
            str(receipt.outcome),
            (receipt.timeline, receipt.version),
            tuple(receipt.contributors),
        )
        if receipt.outcome is Outcome.APPLIED:
            self.told.applied += 1
            if receipt.timeline > self.told.timelines[-1]:
                self.told.mistakes.append(
                    f"push {number} is applied in an untold timeline {receipt.timeline}"
                )

    def _upload(self, session: Session) -> None:
        value = float(len(self.told.uploads) + 1)
        self.told.uploads.append((value, "unknown", None))
        try:
            version = session.upload({"q": np.full(1, 100 * self.index + value, np.float32)})
        except (Superseded, Fenced, Quarantined) as error:
            self.told.uploads[-1] = (value, error.code, None)
            raise
        except NoAnswer:
            return
        self.told.uploads[-1] = (value, "applied", (session.member().timeline, version))


class Crew:
    """All workers, behind two proxies."""

    def __init__(self, host: Host, seed: int) -> None:
        self.diary = Diary()
        faults = Faults(self.diary, seed)  # type: ignore[arg-type]  # it writes, as the other one does
        self.proxies = [Proxy(host.server.grpc) for _ in range(2)]
        self.workers = [
            Worker(index, self.proxies[index % 2].address, faults, seed + index) for index in range(WORKERS)
        ]

    def goes_on(self) -> None:
        """Return when each worker was applied twice from now on; nobody may be left behind, or never told so."""
        goals = [worker.told.applied + 2 for worker in self.workers]

        def left() -> list[str]:
            pairs = zip(self.workers, goals, strict=True)
            return [worker.name for worker, goal in pairs if worker.told.applied < goal]

        until_s = time.monotonic() + GOES_ON_S
        while left():
            assert time.monotonic() < until_s, f"{left()} are not applied any more: {self.last_words()}"
            time.sleep(0.01)

    def last_words(self) -> dict[str, Any]:
        """What each was told last."""
        return {worker.name: list(worker.told.pushes.items())[-3:] for worker in self.workers}


@contextmanager
def crew_of(host: Host, seed: int) -> Iterator[Crew]:
    """Everybody at work; each warning goes to the account of the one whose thread it was."""
    crew = Crew(host, seed)
    of_thread: dict[int, Worker] = {}

    def work(worker: Worker) -> None:
        of_thread[threading.get_ident()] = worker
        worker.work()

    def note(message: Warning | str, *_: Any) -> None:
        found = re.search(r"\(timeline (\d+)\); this step was", str(message))
        if found:
            of_thread[threading.get_ident()].heard(int(found[1]))

    with warnings.catch_warnings(), ThreadPoolExecutor(WORKERS) as threads:
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        futures: list[Future[None]] = [threads.submit(work, worker) for worker in crew.workers]
        try:
            yield crew
        finally:
            for worker in crew.workers:
                worker.ends.set()
            for proxy in crew.proxies:
                proxy.release()
            for future in futures:
                future.result(90)
            for proxy in crew.proxies:
                proxy.close()


class Operator:
    """Does one thing after the other, and keeps book of which state each timeline began from."""

    def __init__(self, host: Host, crew: Crew, seed: int) -> None:
        self.host, self.crew = host, crew
        self.timeline = 1
        self.lineage: list[Place] = []
        self.done: Counter[str] = Counter()
        self._chance = random.Random(seed)
        self._kept: dict[str, tuple[list[Place], Place]] = {}

    def do(self, what: str) -> None:
        """One of THINGS."""
        getattr(self, f"_{what}")()
        self.done[what] += 1

    def _snapshot(self) -> str:
        taken = take_snapshot(self.host.server, MODEL)
        place = (taken["timeline"], taken["version"])
        self._kept[taken["id"]] = (list(self.lineage), place)
        return str(taken["id"])

    def _restore(self, snapshot: str) -> None:
        before, place = self._kept[snapshot]
        self.timeline += 1
        self.lineage = [*before, place]
        assert restore(self.host.server, MODEL, snapshot)["timeline"] == self.timeline

    def _restore_recent(self) -> None:
        self._restore(self._snapshot())

    def _restore_old(self) -> None:
        snapshot = self._chance.choice(sorted(self._kept)) if self._kept else self._snapshot()
        self.crew.goes_on()
        self._restore(snapshot)

    def _restore_twice(self) -> None:
        """The second before anybody was told of the first, perhaps."""
        self._restore_old()
        self._restore(self._chance.choice(sorted(self._kept)))

    def _delete_snapshot(self) -> None:
        if len(self._kept) > 1:
            snapshot = self._chance.choice(sorted(self._kept))
            del self._kept[snapshot]
            delete_snapshot(self.host.server, MODEL, snapshot)

    def _evict(self) -> None:
        evict(self.host.server, MODEL, self._chance.choice(self.crew.workers).name)

    def _evict_and_restore(self) -> None:
        self._evict()
        self._restore_recent()

    def _policy(self) -> None:
        set_policy(self.host.server, MODEL, **self._chance.choice(POLICIES))

    def _lr(self) -> None:
        patch_group(self.host.server, MODEL, 0, lr=self._chance.choice((0.25, 0.5)))

    def _quarantine(self) -> None:
        worker = self._chance.choice(self.crew.workers)
        worker.poisoned.set()
        wait_until(lambda: show_worker(self.host.server, MODEL, worker.name)["quarantined"], GOES_ON_S)
        worker.poisoned.clear()
        release(self.host.server, MODEL, worker.name)

    def _restart(self) -> None:
        self.host.restart()

    def _cut(self) -> None:
        """Replies that had left may be lost with the connection."""
        proxy = self._chance.choice(self.crew.proxies)
        proxy.hold("down")
        time.sleep(0.02)
        proxy.cut()
        proxy.release()

    def _delay(self) -> None:
        proxy = self._chance.choice(self.crew.proxies)
        proxy.hold("down")
        time.sleep(0.2)
        proxy.release()

    def _lose_replies_of_before(self) -> None:
        """What was applied and not answered meets a restore."""
        for proxy in self.crew.proxies:
            proxy.hold("down")
        time.sleep(0.02)
        self._restore_recent() if self._chance.random() < 0.5 else self._restore(
            self._chance.choice(sorted(self._kept) or [self._snapshot()])
        )
        for proxy in self.crew.proxies:
            proxy.cut()
            proxy.release()

    def stands(self, place: Place) -> bool:
        """Whether the model is made from this version."""
        timeline, version = place
        return timeline == self.timeline or version <= dict(self.lineage).get(timeline, -1)


THINGS = sorted(
    name[1:] for name in vars(Operator) if re.fullmatch(r"_[a-z]\w*", name) and name != "_restore"
)


def check_versions(workers: Sequence[Worker]) -> None:
    """Each version of a timeline is one step, of those whom its receipts name, or one upload."""
    made: dict[Place, set[str]] = defaultdict(set)
    named: dict[Place, set[tuple[str, ...]]] = defaultdict(set)
    for worker in workers:
        for outcome, place, contributors in worker.told.pushes.values():
            if outcome == Outcome.APPLIED and place is not None:
                assert worker.name not in made[place], f"{worker.name} made {place} twice"
                made[place].add(worker.name)
                named[place].add(contributors)
        for _, outcome, place in worker.told.uploads:
            if outcome == "applied" and place is not None:
                assert place not in made, f"an upload made {place}, and so did {made[place]}"
                made[place], named[place] = {worker.name}, {(worker.name,)}
    for place, names in made.items():
        assert len(named[place]) == 1, f"{place} was made by several: {named[place]}"
        assert names <= set(*named[place])


def check_model(operator: Operator, workers: Sequence[Worker], sums: np.ndarray[Any, Any]) -> None:
    """What was told to be applied is in it once, if its timeline still stands; what was told not to be is not."""
    for worker in workers:
        assert not worker.told.mistakes
        heard = worker.told.timelines
        assert heard == sorted(heard), heard
        for number, (outcome, place, _) in worker.told.pushes.items():
            times = float(sums[worker.index * MOST_PUSHES + number])
            who = f"push {number} of {worker.name}, told {outcome} at {place}, is in the model {times} times"
            if outcome == "unknown":
                assert times in (0, 1), who
            else:
                applied = outcome == Outcome.APPLIED and place is not None and operator.stands(place)
                assert times == applied, who
    assert sums.sum() == sum(
        float(sums[worker.index * MOST_PUSHES + number])
        for worker in workers
        for number in worker.told.pushes
    )


def told_once(workers: Sequence[Worker], evictions: int) -> None:
    """No timeline is heard of twice, but by who came anew in it."""
    again = sum(len(w.told.timelines) - len(set(w.told.timelines)) for w in workers)
    assert again <= evictions


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("seed", "for_s"), [(1, 0.0), pytest.param(2, 180.0, marks=pytest.mark.soak)])
def test_everybody_is_told_the_truth_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, for_s: float
) -> None:
    """The soak takes 3 minutes, and what its last round takes."""
    monkeypatch.setattr(Transport, "push", Transport.push)  # the faults put theirs in its place
    chance = random.Random(seed)
    begun_s = time.monotonic()
    with hosted(tmp_path / "data") as host:
        with connect(host.server.grpc, model=MODEL, worker="creator", shared_memory=False) as session:
            size = WORKERS * MOST_PUSHES
            session.create({"p": np.zeros((size, 1), np.float32), "q": np.zeros(1, np.float32)}, GROUPS)
        set_gate(host.server, MODEL, quarantine_after=3)
        with crew_of(host, seed) as crew:
            operator = Operator(host, crew, seed)
            crew.goes_on()
            while not operator.done or time.monotonic() < begun_s + for_s:
                for what in chance.sample(THINGS, len(THINGS)):
                    operator.do(what)
                    crew.goes_on()
        assert not crew.diary.bad
        with connect(host.server.grpc, model=MODEL, worker="reader", shared_memory=False) as reader:
            sums = next(v for s, name, v in reader.pull_state().dense() if name == "sum" and s.name == "p")
        assert show_model(host.server, MODEL)["timeline"] == operator.timeline
    check_versions(crew.workers)
    check_model(operator, crew.workers, sums.numpy().ravel())
    told_once(crew.workers, operator.done["evict"] + operator.done["evict_and_restore"])
    outcomes = Counter(str(o) for worker in crew.workers for o, _, _ in worker.told.pushes.values())
    assert outcomes[Outcome.SUPERSEDED] > 0
    print(
        f"\n{sum(outcomes.values())} pushes by {WORKERS} sessions in {time.monotonic() - begun_s:.0f} s: {dict(outcomes)}; "
        f"{operator.timeline - 1} restores; {dict(operator.done)}; {dict(crew.diary.seen)}"
    )
