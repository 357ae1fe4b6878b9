"""What a round is added up into counts in the budget, from before it is made until its step is done."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pushstep.server.coordinator.policies.asynchronous import AsyncSettings
from pushstep.server.coordinator.policies.synchronous import SyncSettings
from pushstep.server.models.edits import Edits
from pushstep.server.staging import reduction
from pushstep.server.staging.gradient import StagedPush
from tests.support.servers import driven


def parameters() -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """A gradient for each parameter: rows for every second that has some."""
    found: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
    for slot in driven.LAYOUT.slots:
        rows = torch.arange(min(slot.rows, 2)), torch.ones(min(slot.rows, 2), *slot.shape[1:])
        found[slot.name] = rows if slot.rows and slot.index % 2 == 0 else torch.ones(slot.shape)
    return found


@pytest.mark.parametrize("fails", [False, True])
def test_a_sum_is_counted_while_it_is_there(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    add_up = reduction.add_up

    async def scenario() -> None:
        model = driven.made()
        model.begin_under(SyncSettings(policy="sync", min_workers=2))
        pushers = [driven.Pusher(model, name) for name in ("a", "b")]
        held = model.staging

        def watched(pushes: Sequence[StagedPush], *rest: Any) -> StagedPush:
            bodies = sum(push.bytes() for push in pushes)
            result = add_up(pushes, *rest)
            seen.append((held.used_bytes - bodies, result.bytes()))
            if fails:
                raise RuntimeError("harmed")
            return result

        monkeypatch.setattr(reduction, "add_up", watched)
        for _ in range(3):
            tasks = [pusher.later(parameters()) for pusher in pushers]
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert [isinstance(each, Exception) for each in done] == [fails, fails]
        await model.close()
        assert held.used_bytes == 0

    asyncio.run(scenario())
    assert len(seen) == 3
    assert all(counted >= made > 0 for counted, made in seen)


@pytest.mark.parametrize("few", [True, False], ids=["at once", "measured in threads"])
@pytest.mark.parametrize("nonfinite", [False, True], ids=["ended", "not finite"])
def test_a_sum_that_nobody_steps_counts_no_more(
    few: bool, nonfinite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round has ended meanwhile, also more than once, or its sum is infinite: its bytes do not wait for another."""
    may_add_up = threading.Event()
    add_up = reduction.add_up

    def waiting(*arguments: Any) -> StagedPush:
        may_add_up.wait()
        return add_up(*arguments)

    async def scenario() -> None:
        model = driven.made()
        model.begin_under(SyncSettings(policy="sync", min_workers=3))
        names = ["a", "b", "c"]
        pushers = [driven.Pusher(model, name) for name in names]
        held = model.staging
        largest = torch.finfo(torch.float32).max
        value = largest if nonfinite else 1.0
        gradients = {slot.name: torch.full(slot.shape, value) for slot in driven.LAYOUT.slots}
        tasks = [pusher.later(gradients) for pusher in pushers]
        while model.coordinator.pending_pushes.reducing is None:
            await asyncio.sleep(0)
        if not nonfinite:  # the round is added up again without them, one by one, and then never
            for name in names:
                Edits(model).evict(name, "operator")
                await asyncio.sleep(0)
        may_add_up.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        model.executor.apply(model.coordinator.switch(AsyncSettings(policy="async"), time.monotonic()))
        if model.executor._tasks:
            await asyncio.wait(model.executor._tasks)
        assert held.used_bytes == 0
        await model.close()

    monkeypatch.setattr(reduction, "add_up", waiting)
    monkeypatch.setattr(StagedPush, "is_of_few", property(lambda self: few))
    asyncio.run(scenario())


def test_the_changed_rows_of_every_parameter_are_charged() -> None:
    """Whatever is pushed as rows, the table of when each changed is in what the model counts for."""
    model = driven.made()
    before = model.held_bytes

    async def scenario() -> None:
        await driven.Pusher(model).push(parameters())
        await model.close()

    asyncio.run(scenario())
    made = sum(table.nbytes for table in model.arenas.row_changes.versions.values())
    buffers = model.arenas.bytes_needed(model.layout)
    assert made > 0
    assert model.held_bytes == before >= buffers + made
