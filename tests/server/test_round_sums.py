"""What a round is added up into counts in the budget, from before it is made until its step is done."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pushstep.server.coordinator.policies.synchronous import SyncSettings
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


def test_the_changed_rows_of_every_parameter_are_charged() -> None:
    """Whatever is pushed as rows, the table of when each changed is in what the model counts for."""
    model = driven.made()
    before = model.held_bytes

    async def scenario() -> None:
        await driven.Pusher(model).push(parameters())
        await model.close()

    asyncio.run(scenario())
    made = sum(table.nbytes for table in model.arenas.row_changed.values())
    buffers = model.arenas.bytes_needed(model.layout)
    assert made > 0
    assert model.held_bytes == before >= buffers + made
