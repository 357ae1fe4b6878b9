"""Trainings under a fake clock and a bad network, each from a seed, and what they must never do.

Here 80 of them; `make soak` runs ten thousand. A failure names its seed: `python -m tests.simulation SEED` repeats it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import pytest

from tests.simulation.chaos import run
from tests.simulation.seeded_bugs import Bug, found_by
from tests.simulation.story import Replay

SEEDS_FOR_A_BUG = 60


def simulate(seeds: Iterable[int]) -> Counter[str]:
    """Run them all; what happened, in numbers."""
    seen: Counter[str] = Counter()
    for seed in seeds:
        try:
            simulation = run(seed)
        except Exception as error:
            error.add_note(f"to repeat it: python -m tests.simulation {seed}")
            raise
        seen.update(simulation.house.witness.outcomes)
        seen.update(simulation.network.counts)
        seen["versions"] += len(simulation.house.witness.chapters)
        seen["timelines"] += simulation.house.timeline
    return seen


def everything_happened(seen: Counter[str]) -> bool:
    """Every outcome there is, and pushes that never got one."""
    names = ("APPLIED", "SKIPPED", "DROPPED_LATE", "TOO_STALE", "REJECTED")
    return all(seen[f"OUTCOME_{name}"] for name in names) and bool(seen["dropped"] and seen["repeated"])


@pytest.mark.parametrize("first", range(0, 80, 40))
def test_whatever_happens_each_push_is_applied_once_or_not_at_all(first: int) -> None:
    assert everything_happened(simulate(range(first, first + 40)))


def test_a_worker_that_was_forgotten_stays_fenced() -> None:
    """It was evicted, then forgotten, and a snapshot that knew it from before was restored: it joined again."""
    simulate([3772])


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_times() -> None:
    """Takes about 17 minutes."""
    seen = simulate((*range(80, 160), *range(1000, 11_000)))
    assert everything_happened(seen)
    print(f"\n10000 simulated runs: {dict(seen)}")


def test_a_seed_is_a_run() -> None:
    stories = [run(17).house.witness.story for _ in range(2)]
    assert len(stories[0]) > 20
    assert [(c.timeline, c.version, c.lr, c.divisor) for c in stories[0]] == [
        (c.timeline, c.version, c.lr, c.divisor) for c in stories[1]
    ]
    states = [Replay().of(story) for story in stories]
    assert [part.tolist() for part in states[0]] == [part.tolist() for part in states[1]]


@pytest.mark.parametrize("bug", found_by("chaos"), ids=str)
def test_a_seeded_bug_is_found(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what it is; the same seeds pass without it, above."""
    bug.put_in(monkeypatch)
    said = []
    for seed in (bug.seed, *range(SEEDS_FOR_A_BUG)):
        try:
            run(seed)
        except Exception as error:  # noqa: BLE001 - a server that contradicts itself may stumble anywhere
            said.append(f"{seed}: {error}")
            if re.search(bug.says, str(error)):
                return
    pytest.fail(f"{bug}: {SEEDS_FOR_A_BUG} runs did not say {bug.says!r}, only {said}: {bug.put_in.__doc__}")
