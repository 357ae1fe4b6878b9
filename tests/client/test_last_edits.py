"""What was changed after the last step goes with the leave: hyperparameters of the lead, and a worker's own bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from pushstep.client import RemoteOptimizer, Session
from pushstep.optim import Adagrad
from tests.support.servers.harness import RunningServer, wait_until
from tests.support.servers.operators import add_hook, patch_group, restore, show_worker, take_snapshot
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import Make, adadelta, adagrad, backward, both
from tests.support.trainings.twins import Twins


def _groups(server: RunningServer, model: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.rest("GET", f"/v1/models/{model}/param-groups").json()[
        "param_groups"
    ]
    return found


def _attached(server: RunningServer, model: str, worker: str) -> tuple[Session, RemoteOptimizer]:
    session, network = server.connect(model, worker), Network()
    remote = session.attach(Adagrad(network.parameters(), lr=0.1), module=network)
    backward(network, [remote], 0)
    remote.step()
    return session, remote


@pytest.mark.parametrize("shared_memory", [False, True], ids=["tcp", "shared memory"])
@pytest.mark.parametrize("prefetch", [False, True], ids=["", "prefetch"])
@pytest.mark.parametrize("make", [adadelta, adagrad, both])
def test_the_scheduler_s_last_step_is_not_lost(
    server: RunningServer, model_name: str, make: Make, prefetch: bool, shared_memory: bool
) -> None:
    """One script runs to its end; the next one goes on with the lr that a local run would have."""
    session = server.connect(model_name, shared_memory=shared_memory)
    twins = Twins(session, Network(), make, prefetch=prefetch)
    schedulers: list[Any] = [
        lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in (twins.remote, *twins.local)
    ]
    for seed in range(2):
        for model, optimizers in ((twins.model, [twins.remote]), (twins.local_model, twins.local)):
            backward(model, optimizers, seed)
            for optimizer in optimizers:
                optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    twins.remote.param_groups[0]["eps"] = twins.local[0].param_groups[0]["eps"] = 1e-3
    session.close()
    expected = [group for optimizer in twins.local for group in optimizer.param_groups]
    for held, local in zip(_groups(server, model_name), expected, strict=True):
        assert (held["lr"], held["eps"]) == (local["lr"], local["eps"])


def test_only_the_lead_s_are_taken(server: RunningServer, model_name: str) -> None:
    lead_session, lead = _attached(server, model_name, "w0")
    second_session, second = _attached(server, model_name, "w1")
    second.param_groups[0]["lr"] = 0.9
    second_session.close()
    assert _groups(server, model_name)[0]["lr"] == 0.1
    lead.param_groups[0]["lr"] = 0.05
    lead_session.close()
    assert _groups(server, model_name)[0]["lr"] == 0.05
    lead_session.close()  # a second time, which says nothing


def test_who_did_not_know_that_it_leads_overwrites_nothing(server: RunningServer, model_name: str) -> None:
    """Its edit is a difference from values that the lead has changed since."""
    lead_session, lead = _attached(server, model_name, "w0")
    second_session, second = _attached(server, model_name, "w1")
    second.param_groups[0]["lr"] = 0.9
    lead.param_groups[0]["lr"] = 0.05
    lead_session.close()
    second_session.close()
    assert _groups(server, model_name)[0]["lr"] == 0.05


@pytest.mark.parametrize("held_by", ["an operator", "a scheduler"])
def test_what_is_held_stays_and_is_said(server: RunningServer, model_name: str, held_by: str) -> None:
    session, remote = _attached(server, model_name, "w0")
    if held_by == "an operator":
        patch_group(server, model_name, 0, lr=0.2)
    else:
        settings = {"scheduler": "StepLR", "arguments": {"step_size": 100, "gamma": 0.5}}
        add_hook(server, model_name, "lr_scheduler", "step_post", settings)
    held = _groups(server, model_name)[0]["lr"]
    remote.param_groups[0].update(lr=0.7, eps=1e-4)
    with pytest.warns(RuntimeWarning, match=r"ignored \(0\.lr\): an operator or a hook holds them"):
        session.close()
    group = _groups(server, model_name)[0]
    assert (group["lr"], group["eps"]) == (held, 1e-4)


@pytest.mark.parametrize(
    ("value", "says"), [(-1.0, r"ignored \(0\.lr\)"), (None, "hyperparameters are lost")]
)
def test_what_no_rule_takes_is_lost_with_a_word_and_the_worker_goes(
    server: RunningServer, model_name: str, value: Any, says: str
) -> None:
    session, remote = _attached(server, model_name, "w0")
    remote.param_groups[0]["lr"] = value
    with pytest.warns(RuntimeWarning, match=says):
        session.close()
    assert _groups(server, model_name)[0]["lr"] == 0.1
    assert show_worker(server, model_name, "w0")["state"] == "left"


def test_what_later_steps_could_not_be_taken_with_is_not_taken(
    server: RunningServer, model_name: str
) -> None:
    """weight_decay goes with dense gradients only: the other workers' rows are stepped on as before."""
    session, network = server.connect(model_name, "w0"), Network(sparse=True)
    remote = session.attach(Adagrad(network.parameters(), lr=0.1), module=network)
    others_session, others = server.connect(model_name, "w1"), Network(sparse=True)
    other = others_session.attach(Adagrad(others.parameters(), lr=0.1), module=others)
    for model, optimizer in ((network, remote), (others, other)):
        backward(model, [optimizer], 0)
        optimizer.step()
    remote.param_groups[0]["weight_decay"] = 0.1
    with pytest.warns(RuntimeWarning, match=r"ignored \(0\.weight_decay\)"):
        session.close()
    assert _groups(server, model_name)[0]["weight_decay"] == 0
    backward(others, [other], 1)
    other.step()


def test_of_an_epoch_that_is_over_nothing_is_taken(server: RunningServer, model_name: str) -> None:
    """A restore has brought the groups back as they were, and this worker does not know it yet."""
    session, remote = _attached(server, model_name, "w0")
    snapshot = take_snapshot(server, model_name)["id"]
    remote.param_groups[0]["lr"] = 0.05
    restore(server, model_name, snapshot)
    with pytest.warns(RuntimeWarning, match=r"ignored \(0\.lr\): .*a restore came first"):
        session.close()
    assert _groups(server, model_name)[0]["lr"] == 0.1


def test_worker_state_set_after_the_last_push_is_there_again(server: RunningServer, model_name: str) -> None:
    session, _ = _attached(server, model_name, "w0")
    session.worker_state = b"epoch 1, batch 7"
    session.close()
    again = server.connect(model_name, "w0")
    again.member()
    assert again.worker_state == b"epoch 1, batch 7"
    again.worker_state = bytes(64 * 1024 + 1)
    with pytest.warns(RuntimeWarning, match=r"last worker_state is lost.*65536"):
        again.close()
    wait_until(lambda: show_worker(server, model_name, "w0")["state"] == "left")
    third = server.connect(model_name, "w0")
    third.member()
    assert third.worker_state == b"epoch 1, batch 7"


def test_a_skipped_last_step_keeps_its_edit_for_the_leave(server: RunningServer, model_name: str) -> None:
    """The edit of a push that was not applied travels again, with the leave if there is no other."""
    session, network = server.connect(model_name), Network()
    remote = session.attach(Adagrad(network.parameters(), lr=0.1), module=network)
    server.rest("PATCH", f"/v1/models/{model_name}/gate", json={"nonfinite": "skip"})
    remote.param_groups[0]["lr"] = 0.3
    network.out.bias.grad = torch.full((1,), float("nan"))
    remote.step()
    assert remote.last_receipt is not None and remote.last_receipt.outcome == "skipped"
    session.close()
    assert _groups(server, model_name)[0]["lr"] == 0.3


def test_a_skipped_step_brings_what_others_changed(server: RunningServer, model_name: str) -> None:
    """Not over an edit of one's own, which still travels."""
    _, lead = _attached(server, model_name, "w0")
    session, network = server.connect(model_name, "w1"), Network()
    second = session.attach(Adagrad(network.parameters(), lr=0.1), module=network)
    server.rest("PATCH", f"/v1/models/{model_name}/gate", json={"nonfinite": "skip"})
    patch_group(server, model_name, 0, eps=1e-3)
    for optimizer, lr in ((second, 0.1), (lead, 0.3)):
        if optimizer is lead:
            lead.param_groups[0]["lr"] = lr
        optimizer.param_groups[0]["params"][-1].grad = torch.full((1,), float("nan"))
        optimizer.step()
        assert optimizer.last_receipt is not None and optimizer.last_receipt.outcome == "skipped"
        assert (optimizer.param_groups[0]["eps"], optimizer.param_groups[0]["lr"]) == (1e-3, lr)
