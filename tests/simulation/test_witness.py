"""What the witness must not take for a mistake: a round stays what it was closed as, whatever is changed behind that."""

from __future__ import annotations

from typing import Any

import pytest

from tests.simulation.simulation import Settings
from tests.simulation.storyteller import Story

SUM: Settings = {"policy": "sync", "timeout_s": 3.0, "reduce": "sum"}


def close_a_round(kinds: dict[str, dict[str, Any]]) -> Story:
    """A story in which everybody has pushed, and the sum of the round is still to be made."""
    story = Story()
    story.begin(SUM, window=1, nonfinite="reject")
    story.flow()
    for name, kind in kinds.items():
        story.push(name, kind)
    hand, pending = story.hand, story.simulation.house.model.coordinator.pending_pushes
    while pending.reducing is None:
        hand.let(0)
        story.simulation.advance(0.0)
    return story


@pytest.mark.parametrize("goes", ["w0", "w2"])
@pytest.mark.parametrize("skips", ["", "w2"])
@pytest.mark.parametrize(
    "to", [{"policy": "sync", "reduce": "mean"}, {"policy": "async"}, {"policy": "bounded"}], ids=str
)
def test_a_round_is_added_up_again_as_it_was_closed(to: Settings, skips: str, goes: str) -> None:
    story = close_a_round({name: {"skip": name == skips} for name in ("w0", "w1", "w2")})
    story.simulation.switch(to if to["policy"] != "bounded" else {**to, "bound": 1})
    story.simulation.evict(goes)
    story.flow()
    first = story.simulation.house.witness.chapters[1, 1]
    expected = {"w0", "w1", "w2"} - {goes, skips}
    assert ({intent.worker for intent, _ in first.intents}, first.divisor) == (expected, 1.0)
    story.teardown()
