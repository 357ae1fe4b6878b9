"""state_dict, load_state_dict and add_param_group of a remote optimizer: torch's formats, the server's truth."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from pushstep.optim import Adadelta, Adagrad
from pushstep.proto.errors import OtherWorkersLive, UnsupportedModule
from tests.support.servers.harness import RunningServer
from tests.support.trainings.bits import check_state_dict
from tests.support.trainings.local_training import LocalTraining
from tests.support.trainings.network import Network, loss_of
from tests.support.trainings.optimizers import Make, adadelta, adagrad, backward, both
from tests.support.trainings.twins import Twins

MAKES = pytest.mark.parametrize("make", [adadelta, adagrad, both])


def _timeline(server: RunningServer, model: str) -> int:
    return int(server.rest("GET", f"/v1/models/{model}").json()["timeline"])


def _load_locally(twins: Twins, state_dict: Any) -> None:
    dicts = [state_dict] if isinstance(state_dict, dict) else state_dict
    for optimizer, entry in zip(twins.local, dicts, strict=True):
        optimizer.load_state_dict(entry)


@MAKES
def test_a_state_dict_is_a_copy(server: RunningServer, model_name: str, make: Make) -> None:
    twins = Twins(server.connect(model_name), Network(), make)
    twins.step(0, 1)
    state_dict = twins.remote.state_dict()
    kept = copy.deepcopy(state_dict)
    twins.step(2)
    for one, other in zip(*(d if isinstance(d, list) else [d] for d in (state_dict, kept)), strict=True):
        check_state_dict(one, other)


@MAKES
def test_torch_saves_and_loads_it(server: RunningServer, model_name: str, make: Make) -> None:
    """Out to plain torch, weights only, and a local run goes on from there bit for bit."""
    twins = Twins(server.connect(model_name), Network(), make)
    twins.step(0, 1)
    file = io.BytesIO()
    torch.save(twins.remote.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    twins.beside = LocalTraining(twins.local_model, make)
    _load_locally(twins, loaded)
    twins.step(2, 3)
    twins.check_state()


@MAKES
def test_loading_what_was_returned_changes_nothing(
    server: RunningServer, model_name: str, make: Make
) -> None:
    """Accelerate does so in every worker at its start, others live or not."""
    twins = Twins(server.connect(model_name, "w0"), Network(), make)
    twins.step(0)
    other = Network()
    second = server.connect(model_name, "w1").attach(make(other), module=other)
    for remote in (twins.remote, second):
        remote.load_state_dict(remote.state_dict())
        moved = torch.utils._pytree.tree_map(
            lambda x: x.clone() if torch.is_tensor(x) else x, remote.state_dict()
        )
        remote.load_state_dict(moved)
    assert _timeline(server, model_name) == 1
    twins.step(1)
    assert twins.remote.last_receipt is not None and twins.remote.last_receipt.version == 2


@MAKES
def test_a_replaced_state_goes_on_as_locally(server: RunningServer, model_name: str, make: Make) -> None:
    twins = Twins(server.connect(model_name), Network(), make)
    twins.step(0)
    saved = twins.remote.state_dict()
    twins.step(1, 2)
    # not the last one returned, so this is a load and not a no-op
    changed = twins.remote.state_dict()
    assert changed is not saved
    _load_locally(twins, copy.deepcopy(saved))
    twins.remote.load_state_dict(saved)
    assert _timeline(server, model_name) == 2
    twins.check_state()
    twins.step(3, 4)
    twins.check_state()


def test_loaded_hyperparameters_hold_for_the_server_and_here(server: RunningServer, model_name: str) -> None:
    twins = Twins(server.connect(model_name), Network(), adagrad)
    twins.step(0)
    state_dict = twins.remote.state_dict()
    state_dict["param_groups"][0].update(lr=0.5, initial_lr=3.0, eps=1e-6)
    state_dict["state"][0]["sum"].fill_(2.0)
    state_dict["state"][0]["step"].fill_(70.0)
    _load_locally(twins, copy.deepcopy(state_dict))
    twins.remote.load_state_dict(state_dict)
    assert twins.remote.param_groups[0]["lr"] == 0.5
    assert twins.remote.param_groups[0]["initial_lr"] == 3.0
    group = server.rest("GET", f"/v1/models/{model_name}/param-groups/0").json()
    assert (group["lr"], group["eps"]) == (0.5, 1e-6)
    assert "initial_lr" not in group
    twins.step(1)
    twins.check_state()
    assert float(twins.remote.state_dict()["state"][0]["step"]) == 71.0


def test_torch_s_own_state_comes_in(server: RunningServer, model_name: str) -> None:
    """A run of plain torch, taken over by load_state_dict."""
    model = Network()
    plain = torch.optim.Adadelta(model.parameters(), lr=0.7)
    for seed in range(3):
        backward(model, [plain], seed)
        plain.step()
    saved = copy.deepcopy(plain.state_dict())
    twins = Twins(server.connect(model_name), copy.deepcopy(model), adadelta)
    twins.remote.load_state_dict(saved)
    _load_locally(twins, saved)
    twins.check_state()
    twins.step(3, 4)


def test_others_are_asked_for_first(server: RunningServer, model_name: str) -> None:
    twins = Twins(server.connect(model_name, "w0"), Network(), adagrad)
    twins.step(0)
    second_model = Network()
    second = server.connect(model_name, "w1").attach(adagrad(second_model), module=second_model)
    state_dict = twins.remote.state_dict()
    state_dict["state"][1]["sum"].fill_(4.0)
    with pytest.raises(OtherWorkersLive, match=r"1 other.*w1.*force=True"):
        twins.remote.load_state_dict(state_dict)
    assert _timeline(server, model_name) == 1
    twins.step(1)
    _load_locally(twins, copy.deepcopy(state_dict))
    twins.remote.load_state_dict(state_dict, force=True)
    assert _timeline(server, model_name) == 2
    twins.step(2)
    # the other worker's step is not applied, and it is told
    loss_of(second_model, 5).backward()
    with pytest.warns(RuntimeWarning, match="restored to version 3"):
        second.step()
    for one, other in zip(second_model.parameters(), twins.model.parameters(), strict=True):
        assert torch.equal(one, other)
    twins.step(3)
    twins.check_state()


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda d: d["param_groups"].append(d["param_groups"][0]), "different number of parameter groups"),
        (lambda d: d["param_groups"][0]["params"].pop(), "doesn't match the size of optimizer's group"),
        (lambda d: d["state"][1].update(sum=torch.zeros(3)), r"'hidden.weight' has shape \(3,\)"),
        (lambda d: d["state"][1].pop("sum"), "lacks"),
    ],
    ids=["groups", "parameters", "shape", "missing state"],
)
def test_a_state_dict_of_another_optimizer_is_refused_whole(
    server: RunningServer, model_name: str, spoil: Any, match: str
) -> None:
    twins = Twins(server.connect(model_name), Network(), adagrad)
    twins.step(0)
    state_dict = twins.remote.state_dict()
    state_dict["param_groups"][0].update(lr=9.0, initial_lr=9.0)
    spoil(state_dict)
    with pytest.raises(ValueError, match=match):
        twins.remote.load_state_dict(state_dict)
    assert _timeline(server, model_name) == 1
    assert "initial_lr" not in twins.remote.param_groups[0]
    twins.check_state()
    twins.step(1)


def test_a_list_wants_a_list(server: RunningServer, model_name: str) -> None:
    twins = Twins(server.connect(model_name), Network(), both)
    twins.step(0)
    with pytest.raises(ValueError, match="1 state dicts for 2 optimizers"):
        twins.remote.load_state_dict(twins.remote.state_dict()[:1])


# --- further param groups


def _extra(value: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.full((3,), value))


@pytest.mark.parametrize("make", [adadelta, adagrad])
def test_a_group_added_to_one_optimizer(server: RunningServer, model_name: str, make: Make) -> None:
    twins = Twins(server.connect(model_name), Network(), make)
    twins.step(0)
    extras = [_extra(), _extra()]
    for parameter, optimizer in zip(extras, (twins.remote, twins.local[0]), strict=True):
        optimizer.add_param_group({"params": [parameter], "lr": 0.01})
    assert twins.remote.param_groups[1]["eps"] == twins.local[0].param_groups[1]["eps"]
    assert _timeline(server, model_name) == 1
    for seed in (1, 2):
        for parameter in extras:
            parameter.grad = torch.tensor([1.0, -2.0, 0.5])
        loss_of(twins.model, seed).backward()
        loss_of(twins.local_model, seed).backward()
        for optimizer in (twins.remote, twins.local[0]):
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(*extras)
        twins.check_state()
    assert len(server.rest("GET", f"/v1/models/{model_name}/param-groups").json()["param_groups"]) == 2


@pytest.mark.parametrize(("rule", "number"), [("adagrad", 0), ("adadelta", 1)])
def test_a_group_added_to_a_list_says_its_rule(
    server: RunningServer, model_name: str, rule: str, number: int
) -> None:
    """It joins the optimizer of that rule, as it would have been added there."""
    twins = Twins(server.connect(model_name), Network(), both)
    with pytest.raises(UnsupportedModule, match=r"rule=.*adagrad, adadelta"):
        twins.remote.add_param_group({"params": [_extra()]})
    assert len(twins.remote.param_groups) == 2
    extras = [_extra(), _extra()]
    twins.remote.add_param_group({"params": extras[:1], "rule": rule, "lr": 0.3})
    twins.local[number].add_param_group({"params": extras[1:], "lr": 0.3})
    for parameter in extras:
        parameter.grad = torch.ones(3)
    for optimizer in (twins.remote, *twins.local):
        optimizer.step()
    assert torch.equal(*extras)
    twins.check_state()
    exported = server.rest("GET", f"/v1/models/{model_name}/export?format=torch").content
    optimizers = torch.load(io.BytesIO(exported), weights_only=True)["optimizer"]
    for got, local in zip(optimizers, twins.local, strict=True):
        check_state_dict(got, local.state_dict())


def test_an_added_group_goes_by_its_own_names(server: RunningServer, model_name: str) -> None:
    session = server.connect(model_name)
    first = nn.Parameter(torch.zeros(2))
    remote = session.attach(torch.optim.Adadelta([("first", first)]))
    remote.add_param_group({"params": [("late", _extra(5.0))]})
    assert remote.state_dict()["param_groups"][1]["param_names"] == ["late"]
    assert session.pull()["late"].tolist() == [5.0, 5.0, 5.0]


def test_every_worker_adds_the_group(server: RunningServer, model_name: str) -> None:
    """The first one makes it; the second, adding the same, takes its values."""
    models = [Network(), Network()]
    remotes = [
        server.connect(model_name, f"w{number}").attach(adagrad(model), module=model)
        for number, model in enumerate(models)
    ]
    for model, remote in zip(models, remotes, strict=True):
        loss_of(model, 0).backward()
        remote.step()
    extras = [_extra(1.0), _extra(7.0)]
    for parameter, remote in zip(extras, remotes, strict=True):
        remote.add_param_group({"params": [parameter]})
    assert torch.equal(extras[1], torch.ones(3))
    for number in (0, 1, 0):
        remotes[number].zero_grad()
        extras[number].grad = torch.full((3,), 2.0)
        remotes[number].step()
    remotes[1].zero_grad()
    extras[1].grad = torch.full((3,), 2.0)
    remotes[1].step()
    sums = remotes[0].state_dict()["state"][5]["sum"]
    assert torch.equal(sums, torch.full((3,), 16.0))


def test_a_reader_sees_the_new_group(server: RunningServer, model_name: str) -> None:
    model = Network()
    remote = server.connect(model_name, "w0").attach(adagrad(model), module=model)
    reader = server.connect(model_name, "reader")
    assert len(reader.pull()) == 5
    remote.add_param_group({"params": [_extra(4.0)]})
    pulled = reader.pull()
    assert len(pulled) == 6
    assert pulled["1.0"].tolist() == [4.0, 4.0, 4.0]
    assert reader.pull_rows("1.0", [2]).tolist() == [4.0]


def test_a_group_s_parameters_are_named_by_the_module(server: RunningServer, model_name: str) -> None:
    model = Network()
    remote = server.connect(model_name).attach(Adadelta(model.hidden.parameters()), module=model)
    remote.add_param_group({"params": model.out.parameters(), "rho": 0.5})
    groups = server.rest("GET", f"/v1/models/{model_name}/param-groups").json()["param_groups"]
    assert groups[1]["params"] == ["out.weight", "out.bias"]
    assert groups[1]["rho"] == 0.5


def test_a_group_that_cannot_be_added_leaves_all_as_it_was(server: RunningServer, model_name: str) -> None:
    twins = Twins(server.connect(model_name), Network(), adagrad)
    twins.step(0)
    with pytest.raises(ValueError, match="more than one parameter group"):
        twins.remote.add_param_group({"params": [twins.model.out.bias]})
    with pytest.raises(Exception, match="learning rate"):
        twins.remote.add_param_group({"params": [_extra()], "lr": -1.0})
    assert len(twins.remote.param_groups) == 1
    twins.step(1)
    twins.check_state()


def test_a_group_may_be_of_sparse_gradients(server: RunningServer, model_name: str) -> None:
    table, local_table = nn.Embedding(5, 2, sparse=True), nn.Embedding(5, 2, sparse=True)
    local_table.load_state_dict(table.state_dict())
    twins = Twins(server.connect(model_name), Network(), adagrad)
    local = Adagrad(local_table.parameters(), lr=0.1, lr_decay=0.01)
    twins.remote.add_param_group({"params": table.parameters(), "lr": 0.1})
    for _ in range(2):
        for one in (table, local_table):
            one.zero_grad()
            one(torch.tensor([3, 1, 3])).square().sum().backward()
        twins.remote.step()
        local.step()
        assert torch.equal(table.weight, local_table.weight)
