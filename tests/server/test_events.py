"""The events of a model: numbered, in order, and of bounded number and size."""

from __future__ import annotations

import json

from pushstep.server.models.events import EVENT_BYTES, EVENTS_BYTES, EVENTS_KEPT, Events


def test_the_last_are_kept_in_order() -> None:
    events = Events()
    for number in range(EVENTS_KEPT + 5):
        events.note({"kind": "edited", "number": number})
    kept = list(events)
    assert [event["id"] for event in kept] == list(range(6, EVENTS_KEPT + 6))
    assert [event["number"] for event in kept] == list(range(5, EVENTS_KEPT + 5))


def test_a_large_one_is_cut_and_says_what_it_was() -> None:
    events = Events()
    events.note({"kind": "edited", "by": "operator", "values": {str(n): n for n in range(100_000)}})
    events.note({"kind": "odd", **{f"fact-{n}": n for n in range(10_000)}})
    edited, odd = events
    assert (edited["id"], edited["kind"], edited["by"]) == (1, "edited", "operator")
    assert edited["values"].endswith("[cut]")
    assert odd["kind"] == "odd"
    assert all(len(json.dumps(event)) <= EVENT_BYTES for event in events)


def test_all_together_have_a_bound() -> None:
    events = Events()
    for _ in range(EVENTS_KEPT):
        events.note({"kind": "edited", "text": "x" * (EVENT_BYTES - 100)})
    kept = list(events)
    assert sum(len(json.dumps(event)) for event in kept) <= EVENTS_BYTES
    assert len(kept) > EVENTS_BYTES // EVENT_BYTES - 2
    assert kept[-1]["id"] == EVENTS_KEPT
