"""Hundreds of trainings under a fake clock and a bad network, each from a seed, and what they must never do.

`make soak` runs ten thousand. A failure names its seed: `python -m tests.simulation SEED` repeats it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import pytest
from simulation.chaos import run
from simulation.seeded_bugs import BUGS
from simulation.witness import replay

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


@pytest.mark.parametrize("first", range(0, 500, 125))
def test_whatever_happens_each_push_is_applied_once_or_not_at_all(first: int) -> None:
    assert everything_happened(simulate(range(first, first + 125)))


@pytest.mark.soak
def test_ten_thousand_times() -> None:
    seen = simulate(range(1000, 11_000))
    assert everything_happened(seen)
    print(f"\n10000 simulated runs: {dict(seen)}")


def test_a_seed_is_a_run() -> None:
    stories = [run(17).house.witness.story for _ in range(2)]
    assert len(stories[0]) > 20
    assert [(c.timeline, c.version, c.lr, c.divisor) for c in stories[0]] == [
        (c.timeline, c.version, c.lr, c.divisor) for c in stories[1]
    ]
    states = [replay(story) for story in stories]
    assert [part.tolist() for part in states[0]] == [part.tolist() for part in states[1]]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_seeded_bug_is_found(
    bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else is: the same seeds pass without it, above."""
    bug(monkeypatch)
    for seed in range(SEEDS_FOR_A_BUG):
        try:
            run(seed)
        except Exception:  # noqa: BLE001 - a judge that contradicts itself is found out, too
            return
    pytest.fail(f"{bug.__name__}: {SEEDS_FOR_A_BUG} runs found nothing: {bug.__doc__}")
