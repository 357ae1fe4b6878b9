"""Operators steer while workers push: a quarantined worker, a frozen group, and a PATCH as everybody sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pushstep.client import Session
from pushstep.proto.errors import Quarantined
from tests.support.servers.harness import RunningServer, running_server, start_server
from tests.support.servers.operators import patch_group, release, set_policy, show_worker
from tests.support.workers.wire import created, state_of, untouched

ONES = {"bias": np.ones(4, np.float32)}


def quarantine(server: RunningServer, model: str, worker: str) -> dict[str, Any]:
    answer = server.rest("POST", f"/v1/models/{model}/workers/{worker}/quarantine")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def is_refused(session: Session) -> bool:
    with pytest.raises(Quarantined, match="by an operator"):
        session.push(ONES)
    return True


def test_a_quarantined_worker_is_refused_until_it_is_released(server: RunningServer, model_name: str) -> None:
    owner = created(server, model_name)
    bad = server.connect(model_name, "bad")
    bad.push(ONES)
    answer = quarantine(server, model_name, "bad")
    assert answer == {"name": "bad", "effective_version": 3}
    shown = show_worker(server, model_name, "bad")
    assert (shown["quarantined"], shown["quarantined_by_hand"]) == (True, True)
    with untouched(server, model_name):
        assert is_refused(bad)
    assert owner.push(ONES).version == 3
    release(server, model_name, "bad")
    assert bad.push(ONES).version == 4
    assert not show_worker(server, model_name, "bad")["quarantined_by_hand"]


def test_no_round_waits_for_a_quarantined_worker(server: RunningServer, model_name: str) -> None:
    owner = created(server, model_name)
    server.connect(model_name, "bad").push(ONES)
    set_policy(server, model_name, policy="sync", min_workers=1)
    quarantine(server, model_name, "bad")
    assert owner.push(ONES).version == 3


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_quarantine_and_freeze_outlast_the_server(how: str, data: Path) -> None:
    server = start_server(data, "--durability", "durable")
    owner = created(server, "m")
    server.connect("m", "bad").push(ONES)
    quarantine(server, "m", "bad")
    patch_group(server, "m", 1, frozen=True)
    owner.push(ONES)  # the journal has a step of a frozen group
    before = state_of(server, "m")
    if how == "stop":
        assert server.stop() == 0
    else:
        server.kill()
    with running_server(data) as again:
        after = state_of(again, "m")
        assert [key for key in before if before[key] != after[key]] == []
        assert show_worker(again, "m", "bad")["quarantined_by_hand"]
        assert is_refused(again.connect("m", "bad", takeover=True))


def test_a_frozen_group_stays_as_it_is(server: RunningServer, model_name: str) -> None:
    session = created(server, model_name)
    everything = {"table": np.ones((5, 3), np.float32), **ONES}
    patch_group(server, model_name, 1, frozen=True)
    before = session.pull()
    receipt = session.push(everything)
    after = session.pull()
    assert receipt.version == 2
    assert (receipt.effective_lr[0] > 0, receipt.effective_lr[1]) == (True, 0.0)
    assert after["bias"].tobytes() == before["bias"].tobytes()
    assert after["table"].tobytes() != before["table"].tobytes()
    steps = server.rest("GET", f"/v1/models/{model_name}/parameters").json()["parameters"]
    assert {p["name"]: p["steps"] for p in steps} == {"table": 2, "weight": 1, "bias": 1, "scale": 1}
    patch_group(server, model_name, 1, frozen=False)
    session.push(everything)
    assert session.pull()["bias"].tobytes() != before["bias"].tobytes()


@pytest.mark.parametrize("shared", [False, True])
def test_a_frozen_group_through_every_transport(shared: bool, server: RunningServer, model_name: str) -> None:
    """Also where the step's kernel writes the worker's copy."""
    module = torch.nn.Linear(64, 64)
    session = server.connect(model_name, shared_memory=shared)
    optimizer = session.attach(torch.optim.Adagrad(module.parameters(), lr=0.1), module=module)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        module(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        return module.weight.detach().clone()

    moved = step()
    patch_group(server, model_name, 0, frozen=True)
    assert torch.equal(step(), moved)
    patch_group(server, model_name, 0, frozen=False)
    assert not torch.equal(step(), moved)


def test_a_patch_is_seen_by_the_next_receipt_the_events_and_torch(
    server: RunningServer, model_name: str
) -> None:
    module = torch.nn.Linear(2, 1)
    session = server.connect(model_name)
    optimizer = session.attach(torch.optim.Adadelta(module.parameters(), lr=1.0), module=module)

    def step() -> Any:
        optimizer.zero_grad()
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return optimizer.last_receipt

    assert step().effective_lr == [1.0]
    changed = patch_group(server, model_name, 0, lr=0.5, rho=0.75)
    receipt = step()
    assert (receipt.version, receipt.effective_lr) == (changed["effective_version"], [0.5])
    (group,) = optimizer.state_dict()["param_groups"]
    assert (group["lr"], group["rho"]) == (0.5, 0.75)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["rho"]) == (0.5, 0.75)
    events = server.rest("GET", f"/v1/models/{model_name}/events", params={"kind": "param_group_changed"})
    (event,) = events.json()["events"]
    assert (event["version"], event["edit"], event["actor"]) == (receipt.version - 1, 1, "local")
    assert event["values"] == {"lr": 0.5, "rho": 0.75}
