"""Attaching: who creates the model, what later workers get and are told, and whose hyperparameters count."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from torch import nn

from pushstep.client import RemoteOptimizer
from pushstep.optim import Adadelta, Adagrad
from pushstep.proto import training_pb2, training_pb2_grpc
from pushstep.proto.errors import (
    BeingCreated,
    InvalidHyperparameter,
    ManifestMismatch,
    NoAnswer,
    UnsupportedModule,
)
from pushstep.proto.errors.status import from_rpc_error
from pushstep.proto.types_pb2 import Manifest, Parameter, ParamGroup
from tests.support.servers.harness import RunningServer, wait_until
from tests.support.servers.proxy import Proxy
from tests.support.trainings.bits import check_state_dict
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import Make, adadelta, adagrad, backward, both
from tests.support.trainings.twins import Twins


def attach(
    server: RunningServer, model: str, worker: str, lr: float = 0.1
) -> tuple[Network, RemoteOptimizer]:
    """A worker with an Adagrad network of its own values."""
    network = Network(seed=sum(worker.encode()))
    remote = server.connect(model, worker).attach(Adagrad(network.parameters(), lr=lr), module=network)
    return network, remote


def step(network: Network, remote: RemoteOptimizer, seed: int = 0) -> None:
    backward(network, [remote], seed)
    remote.step()


def lr_of(server: RunningServer, model: str) -> float:
    return float(server.rest("GET", f"/v1/models/{model}/param-groups/0").json()["lr"])


@pytest.mark.parametrize("make", [adadelta, adagrad, both])
@pytest.mark.parametrize("sparse", [False, True])
def test_attach_in_mid_training_goes_on_bit_for_bit(
    server: RunningServer, model_name: str, make: Make, sparse: bool
) -> None:
    """The first worker's optimizer state is uploaded, step counts included."""
    local_model, made = Network(sparse=sparse), []

    def trained(model: nn.Module) -> Any:
        optimizers = make(model)
        every = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        for seed in range(3):
            backward(model, every, seed)
            for optimizer in every:
                optimizer.step()
            if not made:
                model.out.bias.grad = None  # type: ignore[union-attr,assignment]
        made.append(optimizers)
        return optimizers

    twins = Twins(server.connect(model_name), local_model, trained)
    twins.check_state()
    twins.step(3, 4)
    twins.check_state()


def test_the_second_worker_takes_the_server_s_values(server: RunningServer, model_name: str) -> None:
    first_model, first = attach(server, model_name, "w0")
    step(first_model, first)
    second_model = Network(seed=5)
    trained = Adagrad(second_model.parameters(), lr=0.1)
    backward(second_model, [trained], 0)
    trained.step()
    session = server.connect(model_name, "w1")
    with pytest.warns(RuntimeWarning, match=r"at version 1: .* not this worker's, which has taken 1 steps"):
        second = session.attach(trained, module=second_model)
    assert (first.values_from, second.values_from) == ("worker", "server")
    for one, other in zip(second_model.parameters(), first_model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert trained.state == {}
    check_state_dict(second.state_dict(), first.state_dict())
    # and its step goes on from the server's state, not from its own
    step(second_model, second, 1)
    assert float(second.state_dict()["state"][0]["step"]) == 2.0


@pytest.mark.parametrize(
    ("settings", "differing"),
    [({"lr": 0.5}, "lr"), ({"lr": 0.1, "eps": 1e-3, "maximize": True}, "eps, maximize")],
)
def test_the_second_worker_is_told_what_differs(
    server: RunningServer, model_name: str, settings: dict[str, Any], differing: str
) -> None:
    attach(server, model_name, "w0")
    network = Network()
    original = Adagrad(network.parameters(), **settings)
    session = server.connect(model_name, "w1")
    with pytest.warns(RuntimeWarning, match=f"other values of {differing} than this worker's") as caught:
        second = session.attach(original, module=network)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    group = second.param_groups[0]
    assert (group["lr"], group["eps"], group["maximize"]) == (0.1, 1e-10, False)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: Adagrad([m.table.weight]), ["only the server has 'hidden.weight'"]),
        (lambda m: Adagrad([*m.parameters()][::-1]), ["parameter 0", "'table.weight'", "'out.bias'"]),
        (lambda m: Adadelta(m.parameters()), ["group 0: the server has adagrad, this worker adadelta"]),
        (lambda m: Adagrad(m.double().parameters()), ["torch.float32", "torch.float64"]),
        (lambda m: Adagrad(m.parameters()), ["only this worker has 'more.weight'"]),
        (
            lambda m: Adagrad([{"params": [m.table.weight]}, {"params": [*m.parameters()][1:5]}]),
            ["in group 0", "in group 1"],
        ),
    ],
    ids=["missing", "order", "rule", "dtype", "more", "groups"],
)
def test_a_mismatching_model_lists_the_differences(
    server: RunningServer, model_name: str, make: Any, words: list[str]
) -> None:
    attach(server, model_name, "w0")
    network = Network()
    if "more" in words[0]:
        network.more = nn.Linear(1, 1)
    optimizer = make(network)
    optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(ManifestMismatch) as caught:
        server.connect(model_name, "w1").attach(optimizer, module=network)
    for word in words:
        assert word in caught.value.message
    # the optimizer is as good as before
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = network.table.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(network.table.weight, before)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    workers = server.rest("GET", f"/v1/models/{model_name}/workers").json()["workers"]
    assert [worker["name"] for worker in workers] == ["w0"]


def test_a_long_list_of_differences_is_cut(server: RunningServer, model_name: str) -> None:
    for number, shape in enumerate(((1,), (2,))):
        parameters = [nn.Parameter(torch.zeros(shape)) for _ in range(14)]
        session = server.connect(model_name, f"w{number}")
        if number == 0:
            session.attach(Adagrad(parameters))
            continue
        with pytest.raises(ManifestMismatch, match="and 4 more"):
            session.attach(Adagrad(parameters))


def test_a_value_out_of_range_creates_nothing(server: RunningServer, model_name: str) -> None:
    network = Network()
    optimizer = Adagrad(network.parameters())
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(InvalidHyperparameter, match="learning rate"):
        server.connect(model_name).attach(optimizer, module=network)
    assert server.rest("GET", f"/v1/models/{model_name}").status_code == 404


def test_a_session_steps_one_model(server: RunningServer, model_name: str) -> None:
    """A second optimizer is refused in words, and the first one goes on; another session may take the name."""
    for epoch in (1, 2):
        session = server.connect(model_name)
        network = Network(seed=epoch)
        remote = session.attach(Adagrad(network.parameters(), lr=0.1), module=network)
        twin = Network(seed=epoch + 7)
        original = Adagrad(twin.parameters(), lr=0.1)
        before = [p.detach().clone() for p in twin.parameters()]
        with pytest.raises(UnsupportedModule, match="attach a list of optimizers, or connect again"):
            session.attach(original, module=twin)
        with pytest.raises(UnsupportedModule, match="already steps model"):
            session.create({"w": np.zeros(1, np.float32)})
        assert all(torch.equal(*pair) for pair in zip(before, twin.parameters(), strict=True))
        backward(twin, [original], 0)
        original.step()
        step(network, remote)
        assert remote.last_receipt is not None
        assert (remote.last_receipt.epoch, remote.last_receipt.version) == (epoch, epoch)
        session.close()


# --- whose hyperparameters count


def test_only_the_lead_s_edits_count(server: RunningServer, model_name: str) -> None:
    lead_model, lead = attach(server, model_name, "w0")
    second_model, second = attach(server, model_name, "w1")
    second.param_groups[0]["lr"] = 0.9
    with pytest.warns(RuntimeWarning, match=r"ignored \(0\.lr\): only the lead worker's count") as caught:
        step(second_model, second)
    assert caught[0].filename == __file__
    assert second.param_groups[0]["lr"] == 0.1  # overwritten
    assert second.last_receipt is not None
    assert second.last_receipt.ignored_edits == ["0.lr"] and not second.last_receipt.lead
    second.param_groups[0]["lr"] = 0.8
    assert second.state_dict()["param_groups"][0]["lr"] == 0.1
    step(second_model, second, 1)  # warned about once: another warning would be an error
    assert second.last_receipt.ignored_edits == ["0.lr"]
    lead.param_groups[0]["lr"] = 0.05
    step(lead_model, lead, 2)
    assert lr_of(server, model_name) == 0.05
    step(second_model, second, 3)
    assert second.param_groups[0]["lr"] == 0.05
    assert second.last_receipt.ignored_edits == []


def test_n_schedulers_decay_once(server: RunningServer, model_name: str) -> None:
    """Every worker runs the same StepLR, as their script says; the lr decays as with one."""
    workers = [attach(server, model_name, f"w{number}") for number in range(3)]
    schedulers = [torch.optim.lr_scheduler.StepLR(remote, 1, gamma=0.5) for _, remote in workers]
    for seed in range(3):
        for number, (network, remote) in enumerate(workers):
            if number and seed == 1:
                with pytest.warns(RuntimeWarning, match="only the lead"):
                    step(network, remote, seed)
            else:
                step(network, remote, seed)
        for scheduler in schedulers:
            scheduler.step()
    assert lr_of(server, model_name) == 0.1 * 0.5**2


def test_the_longest_joined_leads_next(server: RunningServer, model_name: str) -> None:
    _, first = attach(server, model_name, "w0")
    second_model, second = attach(server, model_name, "w1")
    attach(server, model_name, "w2")
    first._session.close()
    second.param_groups[0]["lr"] = 0.3
    step(second_model, second)
    assert second.last_receipt is not None and second.last_receipt.lead
    assert lr_of(server, model_name) == 0.3


def test_a_patch_pins_until_it_is_let_go(server: RunningServer, model_name: str) -> None:
    network, lead = attach(server, model_name, "w0")
    path = f"/v1/models/{model_name}/param-groups/0"
    server.rest("PATCH", path, json={"lr": 0.2})
    lead.param_groups[0].update(lr=0.7, eps=1e-4)
    with pytest.warns(RuntimeWarning, match=r"ignored \(0\.lr\): an operator or a hook holds them"):
        step(network, lead)
    # the other field of the same edit counts
    assert (lead.param_groups[0]["lr"], lead.param_groups[0]["eps"]) == (0.2, 1e-4)
    lead.param_groups[0]["lr"] = 0.6
    assert lead.state_dict()["param_groups"][0]["lr"] == 0.2
    server.rest("PATCH", f"{path}?hold=false", json={"lr": 0.4})
    step(network, lead, 1)
    assert lead.param_groups[0]["lr"] == 0.6
    assert lr_of(server, model_name) == 0.6


# --- two at once


def _stub(server: RunningServer) -> tuple[grpc.Channel, Any]:
    channel = grpc.insecure_channel(server.grpc)
    return channel, training_pb2_grpc.TrainingServiceStub(channel)  # type: ignore[no-untyped-call]


def test_of_many_at_once_one_creates(server: RunningServer, model_name: str) -> None:
    barrier = threading.Barrier(4)

    def run(number: int) -> tuple[Network, RemoteOptimizer]:
        network = Network(seed=number)
        session = server.connect(model_name, f"w{number}")
        barrier.wait()
        return network, session.attach(adagrad(network), module=network)

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(run, range(4)))
    values = [[p.detach().clone() for p in network.parameters()] for network, _ in made]
    for others in values[1:]:
        assert all(torch.equal(a, b) for a, b in zip(values[0], others, strict=True))
    assert any(
        all(torch.equal(a, b) for a, b in zip(values[0], Network(seed=number).parameters(), strict=True))
        for number in range(4)
    )
    events = server.rest("GET", f"/v1/models/{model_name}/events").json()["events"]
    assert [event["kind"] for event in events].count("created") == 1


def test_a_creator_that_dies_in_mid_upload_is_followed(server: RunningServer, model_name: str) -> None:
    """The second one waits for the first; when that breaks off, it creates the model from its own values."""
    size = 1 << 20
    weights = [nn.Parameter(torch.full((size,), float(number))) for number in (1, 2)]
    channel, stub = _stub(server)
    probe = training_pb2.JoinRequest(
        model=model_name,
        worker="probe",
        manifest=Manifest(
            groups=[ParamGroup(rule="adagrad")],
            parameters=[Parameter(name="w", shape=[1], dtype="DTYPE_FLOAT32", group=0)],
        ),
    )

    def refusal() -> Any:
        try:
            stub.Join(probe)
        except grpc.RpcError as error:
            return from_rpc_error(error)
        return None

    with Proxy(server.grpc) as proxy, ThreadPoolExecutor(2) as pool:
        first = server.connect(model_name, "first", address=proxy.address, retry_for_s=0.5)
        second = server.connect(model_name, "second")
        proxy.hold("up")
        joined = pool.submit(first.attach, Adagrad([weights[0]]), names=["w"])
        # let the join through, then stop in the middle of the body
        proxy.stop_after("up", size)
        proxy.release()
        wait_until(lambda: proxy.stopped)
        assert isinstance(refusal(), BeingCreated)
        following = pool.submit(second.attach, Adagrad([weights[1]]), names=["w"])
        proxy.refuse()
        with pytest.raises(NoAnswer):
            joined.result(30)
        remote = following.result(30)
        first._worker.membership.closed = True
    assert bool((weights[1] == 2.0).all())
    assert second.pull_rows("w", [0, size - 1]).tolist() == [2.0, 2.0]
    weights[1].grad = torch.ones(size)
    remote.step()
    channel.close()
