"""A training through the service: starts the demo's workers, follows what they report, and sets the policy.

Every policy gets the same flights in the same pushes. Under `async` and `bounded` each push is a step. Under `sync` a
round of one push per worker is a step, so the run is compared with a local training in batches as large as a round.
Rounds open once every worker has joined, so that no worker starts alone. After the first round that condition is
lifted, since a worker that has finished its share leaves and the others continue without it.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .data import Flights
from .display import Display
from .processes import Child, Processes
from .service import Service
from .training import BATCH, batch_count

SILENT_FOR_S: Final = 120.0
POLICIES: Final = ("async", "bounded", "sync")


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """The plan of one training: its policy, model, epochs, workers and wire dtype."""

    policy: str
    model: str
    epochs: int
    workers: int
    wire: str

    @property
    def local_batch(self) -> int:
        """Flights per step of the local training that this one is compared with."""
        return BATCH * self.workers if self.policy == "sync" else BATCH

    @property
    def settings(self) -> dict[str, Any]:
        """The policy and settings with which the model is created."""
        return {"policy": self.policy, **({"min_workers": self.workers} if self.policy == "sync" else {})}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedTraining:
    """The workers' reports, added up."""

    losses: list[float]
    """The loss of each push, in the order of the versions that the pushes made."""
    pushes: int
    pushes_per_s: float
    staleness: Counter[int]
    contributors: Counter[int]


def train_served(
    processes: Processes, service: Service, flights: Flights, course: Course, display: Display
) -> ServedTraining:
    """Start the workers and follow them until each has finished its share; otherwise ProcessFailed."""
    summaries = {
        processes.start(f"{course.model}-w{index}", _command(service, processes, course, index)): (
            _summary(processes, course, index)
        )
        for index in range(course.workers)
    }
    steps: list[dict[str, Any]] = []
    heard_s: list[float] = []
    with display.progress(course.policy, batch_count(flights, course.epochs)) as show:
        for step in _steps(processes, service, set(summaries)):
            if not steps and course.policy == "sync":
                service.change_policy(course.model, {"min_workers": 1})
            steps.append(step)
            heard_s.append(time.monotonic())
            show(
                len(steps),
                f"loss {step['loss']:.4f}  version {step['version']}  staleness {step['staleness']}",
            )
    finished = [json.loads(path.read_text()) for path in summaries.values()]
    return _summed_up(steps, heard_s, finished)


def _summed_up(
    steps: list[dict[str, Any]], heard_s: list[float], finished: list[dict[str, Any]]
) -> ServedTraining:
    steps = sorted(steps, key=lambda step: int(step["version"]))
    applied = [step for step in steps if step["outcome"] == "applied"]
    rounds = {step["version"]: step["contributors"] for step in applied}
    took_s = heard_s[-1] - heard_s[0] if len(heard_s) > 1 else 0.0
    return ServedTraining(
        losses=[step["loss"] for step in steps],
        pushes=sum(summary["outcomes"].get("applied", 0) for summary in finished),
        pushes_per_s=(len(applied) - 1) / took_s if took_s > 0 else 0.0,
        staleness=Counter(step["staleness"] for step in applied),
        contributors=Counter(rounds.values()),
    )


def _summary(processes: Processes, course: Course, index: int) -> Path:
    return processes.folder / f"{course.model}-w{index}.json"


def _command(service: Service, processes: Processes, course: Course, index: int) -> list[str]:
    options = {
        "--server": service.grpc,
        "--model": course.model,
        "--policy": json.dumps(course.settings),
        "--worker": f"w{index}",
        "--index": str(index),
        "--of": str(course.workers),
        "--epochs": str(course.epochs),
        "--wire": course.wire,
        "--out": str(_summary(processes, course, index)),
    }
    command = [sys.executable, "-m", "pushstep.client.demo.worker"]
    return command + [word for option in options.items() for word in option]


def _steps(processes: Processes, service: Service, working: set[Child]) -> Iterator[dict[str, Any]]:
    """Each step as it is reported, until every worker has exited with status 0; otherwise ProcessFailed."""
    heard_at = time.monotonic()
    while working:
        line = processes.next_line(timeout_s=0.5)
        for server in (service.child, *service.others):
            if server.process.poll() is not None:
                raise server.failure("ended while the workers were training")
        if line is None:
            if time.monotonic() - heard_at > SILENT_FOR_S:
                raise next(iter(working)).failure(f"was silent for {SILENT_FOR_S:.0f} s")
            continue
        heard_at = time.monotonic()
        child, text = line
        if child not in working:
            continue
        if text is None:
            child.expect_end()
            working.remove(child)
            continue
        try:
            step: dict[str, Any] = json.loads(text)
        except ValueError:
            raise child.failure(f"printed {text!r} where a step belongs") from None
        yield step
