"""Numbers that a plain loop reports, and what is said when a hook waits for one that nobody does."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pushstep.client import RemoteOptimizer, Session
from tests.support.servers.harness import RunningServer
from tests.support.servers.operators import add_hook, remove_hook, show_worker

PLATEAU = {"scheduler": "ReduceLROnPlateau", "arguments": {"patience": 0, "factor": 0.5}}


def attached(session: Session, **options: Any) -> tuple[nn.Module, RemoteOptimizer]:
    module = nn.Linear(2, 1)
    return module, session.attach(torch.optim.Adagrad(module.parameters(), lr=1.0), module=module, **options)


def step(module: nn.Module, optimizer: RemoteOptimizer) -> torch.Tensor:
    optimizer.zero_grad()
    loss: torch.Tensor = module(torch.ones(1, 2)).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_plain_loop_reports_its_loss(server: RunningServer, model_name: str, prefetch: bool) -> None:
    """As torch's own scheduler, step by step."""
    module, optimizer = attached(server.connect(model_name), prefetch=prefetch)
    add_hook(server, model_name, "lr_scheduler", "step_post", PLATEAU)
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(stand_in, patience=0, factor=0.5)
    for loss in (3.0, 2.0, 2.5, 2.5, 1.0, 4.0):
        step(module, optimizer)
        optimizer.report(loss=loss)
        optimizer.step()
        optimizer.synchronize()
        scheduler.step(loss)
        lr = server.rest("GET", f"/v1/models/{model_name}/param-groups/0").json()["lr"]
        assert lr == stand_in.param_groups[0]["lr"]
    assert lr == 0.125


def test_what_is_reported_travels_once(server: RunningServer, model_name: str) -> None:
    module, optimizer = attached(server.connect(model_name))
    for value in (1.5, torch.tensor(1.5), np.float32(1.5), torch.tensor([1.5], requires_grad=True)):
        step(module, optimizer)
        optimizer.report(loss=value, accuracy=1)
        optimizer.step()
        assert show_worker(server, model_name, "w0")["metrics"] == {"loss": 1.5, "accuracy": 1.0}
        step(module, optimizer)
        optimizer.step()
        assert show_worker(server, model_name, "w0")["metrics"] == {}
    optimizer.report(accuracy=0.5)
    loss = float(optimizer.step(lambda: step(module, optimizer)).detach())
    metrics = show_worker(server, model_name, "w0")["metrics"]
    assert math.isclose(metrics.pop("loss"), loss) and metrics == {"accuracy": 0.5}


@pytest.mark.parametrize("value", ["1.0", None, torch.zeros(2), [1.0]])
def test_what_is_no_number(server: RunningServer, model_name: str, value: object) -> None:
    module, optimizer = attached(server.connect(model_name))
    with pytest.raises(TypeError, match="a metric is one number, and loss is"):
        optimizer.report(accuracy=1.0, loss=value)
    step(module, optimizer)
    optimizer.step()
    assert show_worker(server, model_name, "w0")["metrics"] == {}


# --- nobody reports


@pytest.mark.parametrize("kind", ["plain", "prefetch", "arrays"])
def test_a_hook_that_waits_in_vain_is_told_of_once(server: RunningServer, model_name: str, kind: str) -> None:
    session = server.connect(model_name)
    if kind == "arrays":
        session.create({"w": np.zeros(3, np.float32)})
    else:
        module, optimizer = attached(session, prefetch=kind == "prefetch")
    hook = add_hook(server, model_name, "lr_scheduler", "step_post", PLATEAU)["id"]

    def push() -> None:
        if kind == "arrays":
            session.push({"w": np.ones(3, np.float32)})
        else:
            step(module, optimizer)
            optimizer.step()
            optimizer.synchronize()

    with pytest.warns(
        RuntimeWarning, match=r"waits for loss, which no push has reported.*report\(loss="
    ) as caught:
        for _ in range(3):
            push()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    remove_hook(server, model_name, hook)
    push()
    assert session.last_receipt is not None and session.last_receipt.missing_metrics == []


def test_no_word_where_somebody_reports(server: RunningServer, model_name: str) -> None:
    """One worker does; another, the lead of nothing, need not."""
    one, other = server.connect(model_name), server.connect(model_name, "w1")
    for session in (one, other):
        session.create({"w": np.zeros(3, np.float32)})
    add_hook(server, model_name, "lr_scheduler", "step_post", PLATEAU)
    add_hook(server, model_name, "clip_grad_norm", "step_pre", {"max_norm": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.push({"w": np.ones(3, np.float32)}, metrics={"loss": 1.0})
        for _ in range(2):
            assert other.push({"w": np.ones(3, np.float32)}).missing_metrics == []
