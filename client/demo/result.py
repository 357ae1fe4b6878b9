"""The demo's result: one run per policy, and whether each is good enough."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

AUC_FLOOR: Final = 0.72
AUC_APART: Final = 0.015
_BAR_WIDTH: Final = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyRun:
    """The figures of one training under one policy, and of the local training that it is compared with."""

    policy: str
    auc_remote: float
    auc_local: float
    local_batch: int
    """Flights per step of the local training: as many as a round has under `sync`, else as many as a push has."""
    pushes: int
    """Pushes that the service applied."""
    pushes_per_s: float
    """Measured from the first receipt to the last. It includes the workers' computing, but not their start."""
    staleness: Mapping[int, int]
    """The number of applied pushes by their staleness."""
    contributors: Mapping[int, int]
    """The number of versions by the number of pushes in each."""
    checkpoint: Path

    def shortcomings(self) -> list[str]:
        """Why this run is not good enough; empty when it is."""
        short = [
            f"{self.policy}: the held-out AUC of {where} is {auc:.4f}, below {AUC_FLOOR}"
            for where, auc in (("the service", self.auc_remote), ("the local training", self.auc_local))
            if not auc >= AUC_FLOOR
        ]
        apart = abs(self.auc_remote - self.auc_local)
        if not apart <= AUC_APART:
            short.append(f"{self.policy}: the two AUCs are {apart:.4f} apart, more than {AUC_APART}")
        return short

    def as_values(self) -> dict[str, Any]:
        """The run as values for JSON."""
        return {
            "policy": self.policy,
            "auc_remote": round(self.auc_remote, 6),
            "auc_local": round(self.auc_local, 6),
            "local_batch": self.local_batch,
            "pushes": self.pushes,
            "pushes_per_s": round(self.pushes_per_s, 3),
            "versions": sum(self.contributors.values()),
            "staleness": dict(sorted(self.staleness.items())),
            "contributors": dict(sorted(self.contributors.items())),
            "checkpoint": str(self.checkpoint),
        }

    def as_lines(self) -> Iterator[str]:
        """The run as lines for a person."""
        versions = sum(self.contributors.values())
        yield (
            f"{self.policy}: held-out AUC {self.auc_remote:.4f} served, {self.auc_local:.4f} local "
            f"in batches of {self.local_batch}"
        )
        yield f"  {self.pushes} pushes made {versions} versions, {self.pushes_per_s:.1f} pushes/s"
        yield from bars("staleness", self.staleness)
        if self.policy == "sync":
            yield from bars("contributors of a round", self.contributors)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """The runs in order, the total seconds and the picture."""

    runs: tuple[PolicyRun, ...]
    seconds: float
    picture: Path

    def shortcomings(self) -> list[str]:
        """Why this result is not good enough; empty when it is."""
        return [reason for run in self.runs for reason in run.shortcomings()]

    def as_json(self) -> str:
        """One line of JSON. Figures outside `policies` are those of the first run, or of the whole demo."""
        first = self.runs[0].as_values()
        return json.dumps(
            {
                **{key: first[key] for key in ("auc_remote", "auc_local", "pushes", "checkpoint")},
                "seconds": round(self.seconds, 3),
                "picture": str(self.picture),
                "policies": [run.as_values() for run in self.runs],
            }
        )


def bars(what: str, counts: Mapping[int, int]) -> Iterator[str]:
    """A bar chart in text: one line per value that occurred, with at least one mark."""
    longest = max(counts.values(), default=0)
    for value, count in sorted(counts.items()):
        bar = "#" * max(1, round(_BAR_WIDTH * count / longest))
        yield f"  {what} {value:>3}  {bar:<{_BAR_WIDTH}}  {count}"
