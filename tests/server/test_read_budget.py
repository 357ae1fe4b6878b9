"""The readers' budget: granted in order, never for ever, and what REST answers with counts in it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from pushstep.proto.errors import OverBudget, OverCapacity
from pushstep.server.config import Config
from pushstep.server.models.catalog import Catalog
from pushstep.server.operator_door.answers.outlet import PART_BYTES, Outlet
from pushstep.server.operator_door.app import create_app
from pushstep.server.staging.read_budget import MAX_WAITING, ReadBudget
from tests.support.processes.bounded import run


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_all_or_nothing_at_once() -> None:
    budget = ReadBudget(100)
    assert budget.take(60)
    assert not budget.take(41)
    assert budget.take(40)
    budget.give_back(100)
    assert budget.used_bytes == 0


def test_those_who_wait_are_granted_in_order() -> None:
    async def case() -> None:
        budget, granted = ReadBudget(100), []

        async def claim(name: str, need: int) -> None:
            await budget.claim(need)
            granted.append(name)

        assert budget.take(100)
        waiting = [
            asyncio.ensure_future(claim(name, need)) for name, need in (("a", 80), ("b", 10), ("c", 10))
        ]
        await turns()
        waiting[1].cancel()
        budget.give_back(30)
        await turns()
        assert granted == []  # small ones do not overtake a large one for ever
        threading.Thread(target=budget.give_back, args=(70,)).start()  # as a finalizer does
        await asyncio.gather(*waiting, return_exceptions=True)
        assert granted == ["a", "c"]
        assert budget.used_bytes == 90

    run(case)


def test_a_wait_has_an_end_and_says_when_to_come_back() -> None:
    async def case() -> None:
        budget = ReadBudget(100, wait_s=0.01)
        assert budget.take(60)
        with pytest.raises(OverBudget) as caught:
            await budget.claim(50)
        fields = caught.value.fields
        assert (fields["need"], fields["free"], fields["setting"]) == ("50", "40", "read-bytes")
        assert caught.value.retry_after_s
        with pytest.raises(OverCapacity, match="--read-bytes"):
            await budget.claim(101)
        await budget.claim(40)
        budget.give_back(100)
        assert budget.used_bytes == 0

    run(case)


def test_whoever_goes_away_while_waiting_keeps_nothing() -> None:
    async def case() -> None:
        budget = ReadBudget(100)
        assert budget.take(100)
        first, second = (asyncio.ensure_future(budget.claim(100)) for _ in range(2))
        await turns()
        budget.give_back(100)
        first.cancel()  # granted already, or about to be
        await second
        second.cancel()
        budget.give_back(100)
        assert budget.used_bytes == 0

    run(case)


def test_so_many_may_wait() -> None:
    async def case() -> None:
        budget = ReadBudget(1)
        assert budget.take(1)
        waiting = [asyncio.ensure_future(budget.claim(1)) for _ in range(MAX_WAITING)]
        await turns()
        with pytest.raises(OverBudget):
            await budget.claim(1)
        for claim in waiting:
            claim.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert budget.used_bytes == 1

    run(case)


def answered(
    budget: ReadBudget, *bodies: bytes, begin: Callable[[Message], None] = lambda _: None
) -> list[Message]:
    """What an application's answer becomes on its way out."""
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number, body in enumerate(bodies):
            more = number + 1 < len(bodies)
            await send({"type": "http.response.body", "body": body, "more_body": more})

    async def send(message: Message) -> None:
        begin(message)
        sent.append(message)

    async def case() -> None:
        async def receive() -> Message:
            return {"type": "http.disconnect"}

        await Outlet(app, budget)({"type": "http"}, receive, send)

    run(case)
    return sent


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES + 1, 5 * PART_BYTES])
def test_answers_go_out_in_parts_and_whole(size: int) -> None:
    body, budget, held = bytes(range(256)) * (size // 256 + 1), ReadBudget(1 << 20), []
    body = body[:size]
    head, *parts = answered(budget, body, begin=lambda _: held.append(budget.used_bytes))
    assert head["type"] == "http.response.start"
    assert b"".join(part["body"] for part in parts) == body
    assert [part["more_body"] for part in parts] == [True] * (len(parts) - 1) + [False]
    assert all(len(part["body"]) <= PART_BYTES for part in parts)
    assert set(held) == {size if size > PART_BYTES else 0}
    assert budget.used_bytes == 0


def test_an_answer_in_pieces_goes_through() -> None:
    _, *parts = answered(ReadBudget(1), b"a" * PART_BYTES, b"b", b"")
    assert b"".join(part["body"] for part in parts) == b"a" * PART_BYTES + b"b"
    assert not parts[-1]["more_body"]


def test_an_answer_for_which_there_is_no_room_is_not_begun() -> None:
    budget, begun = ReadBudget(3 * PART_BYTES), []
    assert budget.take(2 * PART_BYTES)
    with pytest.raises(OverBudget):
        answered(budget, bytes(2 * PART_BYTES), begin=begun.append)
    assert begun == []
    assert budget.used_bytes == 2 * PART_BYTES


def test_who_finds_no_room_is_told_so(tmp_path: Path) -> None:
    """By an application that takes its answer for begun."""
    catalog = Catalog(Config(data=tmp_path))
    assert catalog.reading.take(catalog.reading.total_bytes)

    async def case() -> None:
        app = create_app(catalog, None)
        app.add_api_route("/large", lambda: Response(bytes(2 * PART_BYTES)))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            refused = await client.get("/large")
            assert (refused.status_code, refused.json()["code"]) == (503, "over_budget")
            assert refused.headers["retry-after"]
            catalog.reading.give_back(catalog.reading.total_bytes)
            assert len((await client.get("/large")).content) == 2 * PART_BYTES
        assert catalog.reading.used_bytes == 0

    run(case)
