"""Parameters that become NaN or infinite are told of, whatever made them so; edits that would do it are refused."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from pushstep.proto.errors import InvalidHyperparameter
from pushstep.server.arenas import finite_watch
from pushstep.server.coordinator.groups import OperatorEdit
from pushstep.server.coordinator.hooks.hook import Point
from pushstep.server.models.edits import Edits
from pushstep.server.models.model import Model
from tests.support.servers.driven import Gradients, Pusher, made
from tests.support.servers.harness import RunningServer
from tests.support.servers.operators import add_hook, restore, show_model, take_snapshot
from tests.support.workers.wire import created

NAN, INF = float("nan"), float("inf")
GOOD: Gradients = {"a": torch.ones(2), "b": torch.ones(1)}


def told(model: Model) -> list[tuple[str, list[str]]]:
    return [(e["kind"], e["parameters"]) for e in model.events if e["kind"].startswith("parameters_")]


@pytest.mark.parametrize(
    ("gradients", "names"),
    [
        ({"a": torch.tensor([1.0, NAN])}, ["a"]),
        ({"a": torch.tensor([INF, 1.0])}, ["a"]),  # inf / inf
        ({"a": (torch.tensor([1]), torch.tensor([[NAN]]))}, ["a"]),
        ({"b": torch.tensor([NAN])}, ["b"]),
        ({"a": torch.tensor([NAN, 0.0]), "b": torch.tensor([NAN])}, ["a", "b"]),
    ],
)
def test_a_step_that_ruins_parameters_is_told_of_once(gradients: Gradients, names: list[str]) -> None:
    async def scenario() -> None:
        model = made()
        worker = Pusher(model)
        model.hooks.add("finite_guard", Point.STEP_PRE, {"action": "apply"}, model.groups, model.name)
        await worker.push(GOOD)
        assert told(model) == []
        await worker.push(gradients)
        await worker.push(GOOD)
        assert told(model) == [("parameters_nonfinite", names)]
        assert list(model.nonfinite) == names
        await model.close()

    asyncio.run(scenario())


def test_one_element_among_many_is_found_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no sample hits is found by the next look at everything."""
    monkeypatch.setattr(finite_watch, "WHOLE_EVERY_STEPS", 3)
    monkeypatch.setattr(finite_watch.FiniteWatch, "_sample", lambda self, parameters, part: False)

    async def scenario() -> None:
        model = made()
        worker = Pusher(model)
        model.hooks.add("finite_guard", Point.STEP_PRE, {"action": "apply"}, model.groups, model.name)
        await worker.push({"a": torch.tensor([NAN, 1.0])})
        await worker.push(GOOD)
        assert told(model) == []
        await worker.push(GOOD)
        assert told(model) == [("parameters_nonfinite", ["a"])]
        await model.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_sample_sees_what_is_everywhere(dtype: torch.dtype) -> None:
    watch = finite_watch.FiniteWatch()
    model = made()
    slot = model.layout.slots[0]
    large = torch.full((100_003,), torch.finfo(dtype).max / 16, dtype=dtype)
    part = finite_watch.DensePart(
        0, 5, (slot.__class__(**{**vars_of(slot), "start": 5, "stop": 100_000}),), large
    )
    assert not watch._sample([large], part)
    for bad in (NAN, INF, -INF):
        assert watch._sample([torch.full_like(large, bad)], part)
    asyncio.run(model.close())


def vars_of(slot: Any) -> dict[str, Any]:
    return {name: getattr(slot, name) for name in slot.__slots__}


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ({"eps": 0.0}, True),  # 0/0 where a gradient is zero and was never another
        ({"lr": 3e38, "eps": 1e-30}, True),
        ({"weight_decay": 3e38}, True),
        ({"eps": 1e-30}, False),
        ({"lr": 1e10}, False),
        ({"lr": 0.0}, False),
    ],
)
def test_values_that_would_ruin_the_next_step_are_refused(values: Mapping[str, float], refused: bool) -> None:
    async def scenario() -> None:
        model = made()
        model.arenas.parameters[0].fill_(2.0)
        before = model.dump()
        if refused:
            with pytest.raises(InvalidHyperparameter, match="group 0"):
                await Edits(model).try_group(0, OperatorEdit(values, True))
        else:
            await Edits(model).try_group(0, OperatorEdit(values, True))
        assert model.dump() == before
        assert model.arenas.parameters[0].tolist() == [2.0, 2.0]
        await model.close()

    asyncio.run(scenario())


def test_over_rest(server: RunningServer, model_name: str) -> None:
    session = created(server, model_name)
    path = f"/v1/models/{model_name}"
    answer = server.rest("PATCH", f"{path}/param-groups/0", json={"lr": 3.4e38})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_hyperparameter")
    snapshot = take_snapshot(server, model_name)["id"]
    add_hook(server, model_name, "finite_guard", "step_pre", {"action": "apply"})
    session.push({"bias": np.full(4, NAN, np.float32)})
    assert show_model(server, model_name)["parameters_nonfinite"] == ["bias"]
    restore(server, model_name, snapshot)
    assert show_model(server, model_name)["parameters_nonfinite"] == []
    events = server.rest("GET", f"{path}/events").json()["events"]
    kinds = [event["kind"] for event in events if event["kind"].startswith("parameters_")]
    assert kinds == ["parameters_nonfinite", "parameters_finite"]
    session.close()


def test_uploaded_values_are_looked_at(server: RunningServer, model_name: str) -> None:
    session = created(server, model_name)
    session.upload({"bias": np.full(4, INF, np.float32)})
    assert show_model(server, model_name)["parameters_nonfinite"] == ["bias"]
    session.close()
