"""The budget of bytes in flight: all or nothing, in turn, and never for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pushstep.proto.errors import MemoryShort, OverBudget, OverCapacity
from pushstep.server.staging.budget import (
    HEADED_BYTES,
    MAX_WAITING,
    READING_BYTES,
    RETRY_AFTER_S,
    WAITING_SHARE,
    WINDOW_BYTES,
    Budget,
    charge,
)
from tests.support.processes.bounded import run

MIB = 1 << 20


async def claimed(budget: Budget, owner: str, body_bytes: int) -> asyncio.Task[int]:
    """A claim that has been made; granted if the task is done."""
    task = asyncio.ensure_future(budget.claim(owner, body_bytes))
    for _ in range(3):
        await asyncio.sleep(0)
    return task


def test_what_is_reserved_at_once_is_all_or_nothing() -> None:
    budget = Budget(100)
    budget.reserve(60)
    with pytest.raises(OverBudget) as caught:
        budget.reserve(41)
    assert caught.value.retry_after_s is not None
    assert (caught.value.fields["need"], caught.value.fields["free"]) == ("41", "40")
    budget.reserve(40)
    budget.reserve(0)
    budget.release(60)
    budget.release(40)
    assert budget.used_bytes == 0


@pytest.mark.parametrize(
    ("body", "charged"),
    [
        (0, 0),
        (HEADED_BYTES, HEADED_BYTES),
        (HEADED_BYTES + 1, 2 * (HEADED_BYTES + 1)),
        (READING_BYTES, 2 * READING_BYTES),
        (READING_BYTES + 1, 2 * READING_BYTES + 1),
        (64 * MIB, 64 * MIB + READING_BYTES),
    ],
)
def test_a_body_is_charged_with_what_is_on_its_way_too(body: int, charged: int) -> None:
    assert charge(body) == charged


def test_more_than_there_is_is_refused_for_good() -> None:
    async def case() -> None:
        budget = Budget(64 * MIB)
        with pytest.raises(OverCapacity):
            await budget.claim("w", 64 * MIB)
        assert await budget.claim("w", 64 * MIB - READING_BYTES) == 64 * MIB

    run(case)


def test_a_waiting_worker_comes_before_another_ones_second_push() -> None:
    async def case() -> None:
        budget = Budget(100)
        order: list[str] = []
        await budget.claim("a", 100)
        waiting = []
        for owner in ("a", "a", "b", "c", "b", "c", "a"):
            waiting.append(await claimed(budget, owner, 100))
            waiting[-1].add_done_callback(lambda _, owner=owner: order.append(owner))
        for _ in waiting:
            budget.release(100)
            for _ in range(3):
                await asyncio.sleep(0)
        assert order == ["b", "c", "a", "b", "c", "a", "a"]
        budget.release(100)
        assert budget.used_bytes == 0

    run(case)


def test_a_large_push_is_not_overtaken_by_small_ones() -> None:
    async def case() -> None:
        budget = Budget(100)
        await budget.claim("a", 60)
        large = await claimed(budget, "large", 90)
        small = await claimed(budget, "small", 10)
        assert not large.done()
        assert not small.done()
        with pytest.raises(OverBudget):
            budget.reserve(10)
        budget.release(60)
        assert await large == 90
        assert await small == 10

    run(case)


def test_waiting_is_bounded_and_the_delay_grows_with_the_queue() -> None:
    async def case() -> None:
        budget = Budget(100, wait_s=0.05)
        await budget.claim("a", 100)
        delays = []
        for others in (0, 8):
            waiting = [await claimed(budget, f"w{n}", 1) for n in range(others)]
            with pytest.raises(OverBudget) as caught:
                budget.reserve(1)
            assert caught.value.retry_after_s is not None
            delays.append(caught.value.retry_after_s)
            for task in waiting:
                with pytest.raises(OverBudget):
                    await task
        assert delays[0] < delays[1]
        budget.release(100)
        assert budget.used_bytes == 0

    run(case)


@pytest.mark.parametrize("granted", [False, True], ids=["waiting", "granted in that moment"])
def test_who_goes_away_leaves_nothing_behind(granted: bool) -> None:
    async def case() -> None:
        budget = Budget(100)
        await budget.claim("a", 100)
        gone = await claimed(budget, "b", 50)
        next_one = await claimed(budget, "c", 100)
        if granted:
            budget.release(100)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        if not granted:
            budget.release(100)
        assert await next_one == 100
        budget.release(100)
        assert budget.used_bytes == 0

    run(case)


def test_too_many_waiting_are_turned_away_by_turn() -> None:
    """Who pushed last goes first: a newcomer is not turned away for somebody who has just been served."""

    async def case() -> None:
        budget = Budget(100)
        await budget.claim("greedy", 100)
        greedy = await claimed(budget, "greedy", 100)
        others = [await claimed(budget, f"w{n}", 100) for n in range(MAX_WAITING)]
        with pytest.raises(OverBudget):
            await greedy
        assert not any(task.done() for task in others)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        budget.release(100)
        assert budget.used_bytes == 0

    run(case)


def test_the_windows_of_those_who_wait_count() -> None:
    async def case() -> None:
        budget = Budget(40 * MIB)
        held = await budget.claim("a", 20 * MIB)
        may_wait = (
            1 + int(WAITING_SHARE * 40 * MIB) // WINDOW_BYTES
        )  # one whose turn it is, and its share of the rest
        waiting = [await claimed(budget, f"w{n}", 30 * MIB) for n in range(may_wait + 4)]
        assert [task.done() for task in waiting] == [False] * may_wait + [True] * 4
        assert budget.used_bytes == held + may_wait * WINDOW_BYTES
        for task in waiting[may_wait:]:
            with pytest.raises(OverBudget):
                await task
        for task in waiting[1:may_wait]:
            task.cancel()
        await asyncio.gather(*waiting[1:may_wait], return_exceptions=True)
        budget.release(held)
        assert await waiting[0] == charge(30 * MIB)
        budget.release(charge(30 * MIB))
        assert budget.used_bytes == 0

    run(case)


def test_windows_alone_never_keep_a_push_out() -> None:
    """A push of all the budget is granted, though it takes turning others away."""

    async def case() -> None:
        budget = Budget(40 * MIB)
        whole = 40 * MIB - READING_BYTES
        held = await budget.claim("a", 20 * MIB)
        waiting = [await claimed(budget, f"w{n}", whole) for n in range(4)]
        budget.release(held)
        assert await waiting[0] == 40 * MIB
        for task in waiting[1:]:
            with pytest.raises(OverBudget):
                await task
        budget.release(40 * MIB)
        assert budget.used_bytes == 0

    run(case)


def test_idle_memory_gives_way() -> None:
    """What is kept of finished pushes and what is taken stay within the budget together."""
    budget = Budget(10 * MIB)
    budget.reserve(6 * MIB)
    held = budget.buffer(6 * MIB)
    del held
    budget.release(6 * MIB)
    assert sum(memory.size for memory in budget._pool._idle) == 6 * MIB
    budget.reserve(2 * MIB)
    second = budget.buffer(2 * MIB)
    assert sum(memory.size for memory in budget._pool._idle) == 6 * MIB
    budget.reserve(3 * MIB)
    third = budget.buffer(3 * MIB)  # from the 6 MiB that lay idle
    assert budget._pool._idle == []
    del second, third


def test_room_without_memory_is_told_apart() -> None:
    """What was kept for later is let go of first; then the push is told to come again, and of how many bytes it was."""
    asked: list[int] = []

    def make(size_bytes: int) -> Any:
        asked.append(size_bytes)
        raise MemoryError

    budget = Budget(100 << 20, make=make)
    with pytest.raises(MemoryShort) as caught:
        budget.buffer(10 << 20)
    assert asked == [10 << 20] * 2
    assert caught.value.fields["need"] == str(10 << 20)
    assert caught.value.retry_after_s == RETRY_AFTER_S
