"""Every scheduler of torch's without callables, installed over REST: 20 steps with torch's own beside it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from pushstep.server.coordinator.hooks.schedulers import KINDS
from tests.server.test_hooks import ARGUMENTS, torchs
from tests.support.servers.harness import RunningServer
from tests.support.servers.operators import add_hook, remove_hook
from tests.support.workers.wire import GROUPS, PARAMETERS

STEPS = 20
LOSSES = [3.0] * 6 + [2.0] * 14
# Those that take a function, and the base of all.
NOT_OFFERED = {"LambdaLR", "MultiplicativeLR", "LRScheduler"}
LONG: Mapping[str, dict[str, Any]] = {**ARGUMENTS, "OneCycleLR": {"max_lr": 0.7, "total_steps": STEPS + 1}}


def test_all_of_torchs_are_offered() -> None:
    assert set(KINDS) == set(lr_scheduler.__all__) - NOT_OFFERED


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "rows"])
def test_each_lr_is_torchs(server: RunningServer, model_name: str, name: str, sparse: bool) -> None:
    gradients: dict[str, Any] = {"bias": np.ones(4, np.float32)}
    if sparse:
        gradients["table"] = (np.array([1, 4]), np.ones((2, 3), np.float32))
    lrs = [float(group["lr"]) for group in GROUPS]
    optimizer = torch.optim.SGD([{"params": [torch.zeros(())], "lr": lr} for lr in lrs], lr=0.0)
    expected = torchs(name, copy.deepcopy(LONG[name]), optimizer)
    with server.connect(model_name) as session:
        session.create(PARAMETERS, GROUPS)
        body = {"scheduler": name, "arguments": LONG[name]}
        hook = add_hook(server, model_name, "lr_scheduler", "step_post", body)["id"]
        seen = set()
        for loss in LOSSES:
            stepped = [group["lr"] for group in optimizer.param_groups]
            optimizer.step()
            expected.step(loss) if name == "ReduceLROnPlateau" else expected.step()
            receipt = session.push(gradients, metrics={"loss": loss})
            # the step was taken with the lr of before, the groups are those of the next
            assert [group["lr"] for group in receipt.groups] == [g["lr"] for g in optimizer.param_groups]
            assert receipt.effective_lr == pytest.approx(stepped, rel=1e-12)
            seen.add(tuple(stepped))
        assert len(seen) > 1
        assert server.rest("GET", f"/v1/models/{model_name}/hooks/{hook}").json()["failures"] == 0
        remove_hook(server, model_name, hook)
        assert [g["lr"] for g in session.push(gradients).groups] == [g["lr"] for g in optimizer.param_groups]
