"""hypothesis tells stories, event by event, in which a push is never applied twice, nor half, nor after its time.

`make soak` tells more and longer ones, and has one shrunk: what is left of a failure are the few events that matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import Phase

from tests.simulation.seeded_bugs import Bug, dedupe_is_dropped, found_by
from tests.simulation.storyteller import POLICIES, WAITS_S, Story
from tests.simulation.witness import Violation
from tests.support.processes.bounded import run_machine

TELL, SHORTEN = Phase.generate, Phase.shrink


def tell(stories: int, events: int, phases: Sequence[Phase] = (TELL,)) -> None:
    run_machine(Story, stories, events, phases)


def test_whatever_is_told() -> None:
    tell(150, 40, (TELL, SHORTEN))


@pytest.mark.parametrize("comes_back", [False, True], ids=["a name not known", "a worker that is back"])
def test_a_snapshot_that_knows_more_than_the_worker_table(comes_back: bool) -> None:
    """A crash has taken the table back to the snapshot before it; its workers are told of their pushes all the same."""
    story = Story()
    story.begin(POLICIES[0], 1, "reject")
    back = (lambda: story.wait(WAITS_S[-1]), story.flow) if comes_back else ()
    for event in (
        lambda: story.step("w0"),
        lambda: story.command("snapshot"),
        lambda: story.command("restore"),  # of the one at the creation: the other is not written yet
        story.flow,
        lambda: story.command("kill"),
        *back,
        lambda: story.command("restore"),
    ):
        event()
        story.the_state_is_what_was_decided()
    story.teardown()


def test_a_snapshot_that_goes_while_its_restore_waits() -> None:
    """Two newer ones, under way, took its place. It was restored all the same, and a start had nothing to go on from."""
    story = Story()
    story.begin(POLICIES[0], 1, "reject")
    for event in (
        lambda: story.command("kill"),
        lambda: story.command("snapshot"),
        lambda: story.command("snapshot"),
        lambda: story.command("restore"),
        lambda: story.retire(name="w0"),
        lambda: story.command("kill"),
    ):
        event()
        story.the_state_is_what_was_decided()
    story.teardown()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_whatever_is_told_for_long() -> None:
    """Takes at most an hour."""
    tell(20_000, 80, (TELL, SHORTEN))


@pytest.mark.parametrize("bug", found_by("stories"), ids=str)
def test_a_seeded_bug_is_found(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    bug.put_in(monkeypatch)
    with pytest.raises(Violation, match=bug.says):
        tell(600, 50)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_failure_is_a_short_story(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes at most an hour, most of it to shrink the failure."""
    dedupe_is_dropped(monkeypatch)
    with pytest.raises(Violation) as failure:
        tell(600, 50, (TELL, SHORTEN))
    told = "\n".join(failure.value.__notes__)
    events = [line for line in told.splitlines() if line.startswith("state.") and "the_state_is" not in line]
    print(f"\n{told}")
    assert 2 < len(events) <= 8  # begin, a push, its repetition, and teardown
