"""One model: what its rooms hold together."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
import torch

from pushstep.optim.kernels import cache as kernel_cache
from pushstep.proto.errors import NonfiniteGradient
from pushstep.proto.training_pb2 import GroupEdit
from pushstep.proto.types_pb2 import Identity, Outcome, Receipt
from pushstep.proto.wire.hyperparameters import wire_values
from pushstep.server.coordinator.groups import OperatorEdit
from pushstep.server.coordinator.hooks.hook import StepContext
from pushstep.server.coordinator.worker import Decided
from pushstep.server.models.edits import Edits
from pushstep.server.requests import receiving
from tests.support.servers.driven import Pusher, made


def test_what_a_snapshot_will_hold_stays_while_training_goes_on() -> None:
    """The files are written in a thread: a table that still grew would not be the one that its digest seals."""

    async def scenario() -> None:
        model = made()
        model.hooks.add(
            "lr_scheduler",
            "step_post",
            {"scheduler": "MultiStepLR", "arguments": {"milestones": [1, 9]}},
            model.groups,
            model.name,
        )
        worker = model.sessions.join("w", 0.0, takeover=False)

        def one_more_step(metric: float) -> None:
            error = NonfiniteGradient(parameter="a", worker="w")
            receipt = Receipt(outcome=Outcome.OUTCOME_APPLIED, identity=Identity(worker="w", epoch=1))
            model.sessions.consume(worker, Decided(1, receipt, error=error))
            error.fields["consumed"] = str(metric)
            context = StepContext("w", 0, 1, 0, metric, {}, {})
            model.hooks.step_post(context, model.groups)
            model.groups.list[1].values["eps"] = metric

        one_more_step(1.0)
        dumped = model.dump()
        text = json.dumps(dumped)
        one_more_step(2.0)
        assert json.dumps(dumped) == text
        assert json.dumps(model.dump()) != text
        await model.close()

    asyncio.run(scenario())


def test_the_first_push_of_a_kind_is_not_taken_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels may have to be compiled, for seconds in which no heartbeat would be heard."""
    where: dict[str, int] = {}
    monkeypatch.setattr(kernel_cache, "_compiled", {})  # as in a process that has just begun

    def noted(name: str, call: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            where[name] = threading.get_ident()
            return call(*arguments, **options)

        return run

    monkeypatch.setattr(receiving, "inspect", noted("inspected", receiving.inspect))

    async def scenario() -> None:
        model = made()
        monkeypatch.setattr(model.arenas, "step", noted("stepped", model.arenas.step))
        worker = Pusher(model)

        async def on_the_loop(wire: torch.dtype, **edit: float) -> tuple[bool, bool]:
            """One push; whether it was inspected and stepped on the event loop."""
            edits = [GroupEdit(group=0, values=wire_values(edit))]
            receipt = await worker.push({"a": torch.ones(2), "b": torch.ones(1)}, wire, edits)
            assert receipt.outcome == Outcome.OUTCOME_APPLIED
            here = threading.get_ident()
            return where["inspected"] == here, where["stepped"] == here

        for wire in (torch.float32, torch.bfloat16):
            assert await on_the_loop(wire) == (False, False)
            assert await on_the_loop(wire) == (True, True)
        # whoever changes a hyperparameter, the kernels are others only if it was off or is now
        Edits(model).patch_group(0, OperatorEdit({"weight_decay": 0.5}, hold=False), "test")
        assert await on_the_loop(torch.float32) == (True, False)
        assert await on_the_loop(torch.float32, weight_decay=0.25) == (True, True)
        assert await on_the_loop(torch.float32, weight_decay=0.0) == (True, True)  # as at first
        assert await on_the_loop(torch.float32, maximize=True) == (True, False)
        await model.close()

    asyncio.run(scenario())
