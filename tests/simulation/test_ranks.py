"""Jobs of several ranks under a fake clock, on links that break and machines that die, each from a seed.

Here 26 of them; `make soak` runs ten thousand. A failure names its seed: `python -m tests.simulation.ranks SEED` repeats it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import pytest

from tests.simulation.ranks.chaos import run
from tests.simulation.ranks.seeded_bugs import BUGS, Bug

# a process that is killed leaves coroutines that it never began
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def simulate(seeds: Iterable[int]) -> Counter[str]:
    """Run them all; what happened, in numbers."""
    seen: Counter[str] = Counter()
    for seed in seeds:
        try:
            done = run(seed)
        except Exception as error:
            error.add_note(f"to repeat it: python -m tests.simulation.ranks {seed}")
            raise
        seen.update(done.group.witness.outcomes)
        seen["versions"] += done.versions
        seen["starts"] += done.group.starts
        seen["timelines"] += done.group.witness.timeline
    return seen


def test_whatever_happens_each_push_is_applied_in_all_ranks_or_in_none() -> None:
    # the last two: machines that die while a rank starts, and a worker that dies between its parts
    runs = (*range(172, 196), 912, 1407)
    seen = simulate(runs)
    assert seen["APPLIED"] > 100
    assert seen["starts"] > len(runs)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_ten_thousand_times() -> None:
    """Takes about 25 minutes."""
    seen = simulate((*range(148, 172), *range(1000, 11_000)))
    print(f"\n10000 simulated jobs of ranks: {dict(seen)}")


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_seeded_bug_is_found(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what it is; the same seeds pass without it."""
    bug.put_in(monkeypatch)
    said = []
    for seed in bug.seeds:
        try:
            run(seed)
        except Exception as error:  # noqa: BLE001 - ranks that contradict each other may stumble anywhere
            said.append(f"{seed}: {error}")
            if re.search(bug.says, str(error)):
                return
    pytest.fail(f"{bug}: no run said {bug.says!r}, only {said}: {bug.put_in.__doc__}")
