"""A model's events as a list and as a stream: filtered, a page at a time, gone on with, and of bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pushstep.server.models.events import EVENTS_KEPT, Events
from pushstep.server.operator_door.answers import event_stream
from pushstep.server.operator_door.answers.event_stream import MOST_BEHIND, MOST_LISTENERS, frames_of
from tests.support.servers.harness import RunningServer, running_server, start_server
from tests.support.servers.operators import evict, patch_group, set_gate
from tests.support.workers.wire import created

STREAM = {"Accept": "text/event-stream"}


def read(lines: Iterator[str]) -> dict[str, Any]:
    """The next frame of a stream: its fields, with `data` parsed. Keep-alives are passed over."""
    found: dict[str, Any] = {}
    for line in lines:
        if not line and "data" in found:
            return {**found, "data": json.loads(found["data"])}
        if not line:
            found = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            found[name] = value
    return {}


@contextlib.contextmanager
def listening(
    server: RunningServer, model: str, last: str = "", **query: Any
) -> Iterator[tuple[Iterator[str], httpx.Response]]:
    headers = {**STREAM, **({"Last-Event-ID": last} if last else {})}
    url = f"http://{server.http}/v1/models/{model}/events"
    with (
        httpx.Client(timeout=20, trust_env=False) as client,
        client.stream("GET", url, headers=headers, params=query) as answer,
    ):
        yield answer.iter_lines(), answer


def test_edits_arrive_as_they_are_made_with_their_actor(server: RunningServer, model_name: str) -> None:
    created(server, model_name)
    with listening(server, model_name) as (lines, answer):
        assert answer.headers["content-type"].startswith("text/event-stream")
        kinds = [read(lines)["data"]["kind"] for _ in range(2)]
        assert kinds == ["created", "snapshot_taken"]
        patch_group(server, model_name, 0, lr=0.5)
        frame = read(lines)
        assert frame["data"]["kind"] == "param_group_changed"
        assert (frame["data"]["by"], frame["data"]["actor"]) == ("operator", "local")
        assert frame["id"].endswith(f"-{frame['data']['id']}")
    with listening(server, model_name, last=frame["id"]) as (lines, _):
        set_gate(server, model_name, norm_outlier=3.0)
        following = read(lines)["data"]
        assert (following["kind"], following["id"]) == ("gate_changed", frame["data"]["id"] + 1)


def test_a_stream_ends_with_its_model_and_with_the_server(data: Path) -> None:
    server = start_server(data)
    for model in ("gone", "kept"):
        created(server, model)
    with listening(server, "gone", after=2) as (lines, _), listening(server, "kept", after=2) as (others, _):
        assert server.rest("DELETE", "/v1/models/gone").status_code == 204
        assert read(lines)["data"]["kind"] == "deleted"
        frame = read(lines)
        assert (frame["event"], frame["data"]) == ("ended", {"why": "deleted"})
        assert read(lines) == {}
        assert server.stop() == 0
        last = {}
        while frame := read(others):
            last = frame
        assert (last["event"], last["data"]) == ("ended", {"why": "draining"})
    with running_server(data) as again, listening(again, "kept", last=last["id"]) as (lines, _):
        assert read(lines)["event"] == "restarted"
        assert read(lines)["data"]["kind"] == "loaded"


def test_lists_are_filtered_and_paged(server: RunningServer, model_name: str) -> None:
    session = created(server, model_name)
    path = f"/v1/models/{model_name}/events"

    def ask(**query: Any) -> dict[str, Any]:
        answer = server.rest("GET", path, params=query)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    for number in range(5):
        patch_group(server, model_name, 0, lr=0.5 + number)
    with pytest.raises(Exception, match="NaN"):
        session.push({"bias": np.full(4, np.nan, np.float32)})
    changed = ask(kind="param_group_changed")["events"]
    assert [event["values"]["lr"] for event in changed] == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert [event["kind"] for event in ask(worker="owner")["events"]] == ["created", "push_rejected"]
    assert {event["kind"] for event in ask(actor="worker:owner")["events"]} == {"created", "push_rejected"}
    assert ask(actor="nobody")["events"] == []
    seen, page = [], ask(limit=2, kind="param_group_changed")
    while True:
        seen += page["events"]
        if page["next"] is None:
            break
        patch_group(server, model_name, 1, lr=0.5)  # what comes meanwhile comes last, once
        page = ask(limit=2, kind="param_group_changed", cursor=page["next"])
        if len(seen) > 8:
            break
    ids = [event["id"] for event in seen]
    assert ids == sorted(set(ids))
    assert ids[:5] == [event["id"] for event in changed]


def test_no_line_of_a_stream_can_be_forged(server: RunningServer, model_name: str) -> None:
    """What a worker or an operator names stands in JSON, in one line."""
    created(server, model_name)
    hook = {"name": "json_log", "point": "step_post", "settings": {"every": 5}}
    assert server.rest("POST", f"/v1/models/{model_name}/hooks", json=hook).status_code == 201
    with listening(server, model_name, kind="worker_evicted\n\ndata: forged") as (lines, answer):
        assert answer.status_code == 200
        evict(server, model_name, "owner")
        assert next(lines) == "retry: 2000"


async def frames(events: Events, last: str, stop_after: int, **options: Any) -> list[str]:
    found = []
    async for frame in frames_of(events, last, options.pop("after", 0), lambda event: True):
        found.append(frame)
        if len(found) == stop_after:
            break
    return found


def noted(count: int) -> Events:
    events = Events()
    for number in range(count):
        events.record("edited", "operator", {"number": number})
    return events


def named(frame: str) -> str:
    return next(line.removeprefix("event: ") for line in frame.splitlines() if line.startswith("event: "))


def test_a_listener_that_is_too_slow_is_cut_off_and_comes_again() -> None:
    events = noted(1)

    async def scenario() -> None:
        stream = frames_of(events, "", 0, lambda event: True)
        assert (await anext(stream)).startswith("retry:")
        assert '"number": 0' in await anext(stream)
        for number in range(MOST_BEHIND + 1):
            events.record("edited", "operator", {"number": number})
        last = await anext(stream)
        assert named(last) == "too_slow"
        assert f"id: {events.log}-1\n" in last
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        resumed = await frames(events, f"{events.log}-1", 2)
        assert f"id: {events.log}-2\n" in resumed[1]

    asyncio.run(scenario())


def test_what_is_no_longer_kept_is_told() -> None:
    events = noted(EVENTS_KEPT + 10)
    _, missed, first = asyncio.run(frames(events, f"{events.log}-4", 3))
    assert (named(missed), '"missed": 6' in missed) == ("missed", True)
    assert f"id: {events.log}-11\n" in first
    _, restarted, _ = asyncio.run(frames(events, "00000000-5", 3))
    assert named(restarted) == "restarted"
    _, ahead = asyncio.run(ended(noted(3), "9999999999"))
    assert named(ahead) == "ended"


async def ended(events: Events, number: str) -> list[str]:
    events.end("deleted")
    return await frames(events, f"{events.log}-{number}", 2)


def test_a_stream_without_events_is_kept_alive_and_moves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "KEEP_ALIVE_S", 0.01)
    events = noted(3)

    async def scenario() -> list[str]:
        stream = frames_of(events, "", 0, lambda event: False)
        return [await anext(stream), await anext(stream)]

    assert asyncio.run(scenario())[1] == f": keep-alive\nid: {events.log}-3\n\n"


def test_listeners_are_few_and_leave_room_for_requests(server: RunningServer, model_name: str) -> None:
    created(server, model_name)
    host, _, port = server.http.rpartition(":")
    request = f"GET /v1/models/{model_name}/events HTTP/1.1\r\nHost: {server.http}\r\nAccept: text/event-stream\r\n\r\n"
    with contextlib.ExitStack() as held:
        for _ in range(MOST_LISTENERS):
            connection = held.enter_context(socket.create_connection((host, int(port)), timeout=20))
            connection.sendall(request.encode())
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
        refused = server.rest("GET", f"/v1/models/{model_name}/events", headers=STREAM)
        assert (refused.status_code, refused.json()["code"]) == (503, "busy")
        assert server.rest("GET", f"/v1/models/{model_name}/events").status_code == 200
        assert server.rest("GET", f"/v1/models/{model_name}").status_code == 200
