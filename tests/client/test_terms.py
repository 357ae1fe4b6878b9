"""pushstep.optim.keras's and .mlx's optimizers attached: their updates on the server, and what it does not do of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pushstep.optim import RULES
from pushstep.optim import keras as keras
from pushstep.optim import mlx as mlx
from pushstep.proto.errors import InvalidHyperparameter, SparseNotSupported, UnsupportedModule
from tests.support.servers.harness import RunningServer, running_server
from tests.support.servers.operators import download, patch_group, restore, set_policy, take_snapshot
from tests.support.trainings.bits import check_state_dict
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import backward
from tests.support.trainings.twins import Twins

Make = Callable[[nn.Module], torch.optim.Optimizer]
MAKES: dict[str, Make] = {
    "MLX's AdaDelta": lambda model: mlx.AdaDelta(model.parameters(), learning_rate=0.7, rho=0.8),
    "MLX's Adagrad": lambda model: mlx.Adagrad(model.parameters(), learning_rate=0.1, eps=1e-3),
    "Adadelta": lambda model: keras.Adadelta(model.parameters(), learning_rate=0.7, rho=0.8),
    "Adadelta, decayed": lambda model: keras.Adadelta(
        model.parameters(), learning_rate=0.7, weight_decay=0.01
    ),
    "Adagrad": lambda model: keras.Adagrad(model.parameters(), learning_rate=0.1),
    "Adagrad, decayed": lambda model: keras.Adagrad(
        model.parameters(), learning_rate=0.1, weight_decay=0.01, initial_accumulator_value=0.5, epsilon=1e-3
    ),
}


@pytest.mark.parametrize("shared_memory", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", MAKES)
def test_it_is_bit_equal_to_local(
    server: RunningServer, model_name: str, make: str, dtype: torch.dtype, shared_memory: bool
) -> None:
    session = server.connect(model_name, shared_memory=shared_memory)
    twins = Twins(session, Network(dtype=dtype), MAKES[make])
    twins.step(*range(10))
    check(twins)


def check(twins: Twins) -> None:
    """Parameters and state_dicts are those of the local one."""
    twins.check()
    same(twins.remote.state_dict(), twins.local[0].state_dict())


def same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        assert got["state"][number].keys() == state.keys()
        assert all(torch.equal(got["state"][number][name], tensor) for name, tensor in state.items())
    for one, other in zip(got["param_groups"], expected["param_groups"], strict=True):
        assert one.keys() == other.keys()
        assert {k: v or None for k, v in one.items()} == {k: v or None for k, v in other.items()}


@pytest.mark.parametrize("make", MAKES)
def test_its_state_comes_along_and_goes_back(server: RunningServer, model_name: str, make: str) -> None:
    """Attached after some steps; saved; loaded into a local one, and into another session."""
    model, local_model = Network(), Network()
    original, local = MAKES[make](model), MAKES[make](local_model)
    for seed in range(3):
        for each, optimizer in ((model, original), (local_model, local)):
            backward(each, [optimizer], seed)
            optimizer.step()
    remote = server.connect(model_name).attach(original, module=model)
    for seed in range(3, 6):
        for each, optimizer in ((model, remote), (local_model, local)):
            backward(each, [optimizer], seed)
            optimizer.step()
    saved = remote.state_dict()
    same(saved, local.state_dict())
    twin = MAKES[make](local_model)
    twin.load_state_dict(saved)
    same(twin.state_dict(), local.state_dict())
    again = Network()
    again.load_state_dict(model.state_dict())
    other = server.connect(f"{model_name}-2", "w1").attach(MAKES[make](again), module=again)
    other.load_state_dict(saved)
    for each, optimizer in ((again, other), (local_model, local)):
        backward(each, [optimizer], 9)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), local_model.parameters(), strict=True))


def test_beside_torch_s_own_in_one_model(server: RunningServer, model_name: str) -> None:
    def make(model: Any) -> list[torch.optim.Optimizer]:
        dense = [*model.hidden.parameters(), *model.out.parameters()]
        return [
            torch.optim.Adagrad(model.table.parameters(), lr=0.1),
            keras.Adadelta(dense, learning_rate=0.7),
        ]

    session = server.connect(model_name)
    model, local_model = Network(), Network()
    remote = session.attach(make(model), module=model)
    local = make(local_model)
    for seed in range(5):
        backward(model, [remote], seed)
        backward(local_model, local, seed)
        remote.step()
        for optimizer in local:
            optimizer.step()
    one, other = remote.state_dict()
    same(other, local[1].state_dict())
    assert torch.equal(model.out.weight, local_model.out.weight)
    assert one["state"].keys() == {0}


def test_an_operator_and_a_scheduler_steer_it(server: RunningServer, model_name: str) -> None:
    twins = Twins(server.connect(model_name), Network(), MAKES["Adagrad, decayed"])
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (twins.remote, *twins.local)]
    for seed in range(3):
        twins.step(seed)
        for scheduler in schedulers:
            scheduler.step()
    patch_group(server, model_name, 0, epsilon=0.25)
    twins.local[0].param_groups[0]["epsilon"] = 0.25
    for optimizer in (twins.remote, *twins.local):
        optimizer.param_groups[0]["weight_decay"] = None
    twins.step(3, 4)
    answer = server.rest("PATCH", f"/v1/models/{model_name}/param-groups/0", json={"eps": 1.0})
    assert answer.json()["code"] == InvalidHyperparameter.code and "epsilon" in answer.json()["detail"]


def test_snapshots_and_exports_hold_it(data: Path) -> None:
    with running_server(data) as server:
        twins = Twins(server.connect("m"), Network(), MAKES["Adadelta, decayed"])
        twins.step(*range(3))
        kept = take_snapshot(server, "m")["id"]
        exported = torch.load(io.BytesIO(download(server, "m/export", "torch")), weights_only=True)
        same(exported["optimizer"], twins.local[0].state_dict())
        fresh = MAKES["Adadelta, decayed"](Network())
        fresh.load_state_dict(exported["optimizer"])
        twins.step(3)
        restore(server, "m", kept)
        again = torch.load(io.BytesIO(download(server, "m/export", "torch")), weights_only=True)
        same(again["optimizer"], exported["optimizer"])
        twins.remote._session.close()


def test_rounds_of_it(server: RunningServer, model_name: str) -> None:
    twins = Twins(server.connect(model_name), Network(), MAKES["Adagrad"])
    set_policy(server, model_name, policy="sync")
    twins.step(*range(3))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"clipnorm": 1.0}, "clipping: use the hook clipnorm or global_clipnorm"),
    ({"clipvalue": 1.0}, "clipping"),
    ({"global_clipnorm": 1.0}, "clipping"),
    ({"use_ema": True}, "use_ema: use an ema hook"),
    ({"loss_scale_factor": 8.0}, "loss_scale_factor: use a torch.amp.GradScaler"),
    ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
    ({"learning_rate": lambda: 0.1}, "a schedule as learning_rate"),
    ({"state_dtype": "param"}, ""),
]


@pytest.mark.parametrize("kind", [mlx.AdaDelta, mlx.Adagrad])
def test_a_callable_learning_rate_of_mlx_is_refused(
    server: RunningServer, model_name: str, kind: Any
) -> None:
    model = Network()
    with pytest.raises(UnsupportedModule, match="callable learning rates: use a number"):
        server.connect(model_name).attach(kind(model.parameters(), lambda step: 0.1), module=model)


def test_half_parameters_take_mlx_s_rounded_lr_however_gradients_travel(
    server: RunningServer, model_name: str
) -> None:
    """bfloat16 frames of float32 parameters do not round lr to bfloat16."""
    session = server.connect(model_name)
    session.create({"w": torch.ones(3)}, [{"rule": "mlx_adagrad", "params": ["w"], "lr": 0.1}])
    parameter = nn.Parameter(torch.ones(3))
    local = mlx.Adagrad([parameter], learning_rate=0.1)
    for _ in range(3):
        session.push({"w": torch.full((3,), 0.25, dtype=torch.bfloat16)})
        parameter.grad = torch.full((3,), 0.25)
        local.step()
    assert torch.equal(torch.from_numpy(session.pull()["w"]), parameter.detach())


BAD_VALUES = [
    ("rho", 1.5),
    ("rho", -0.1),
    ("eps", 0.0),
    ("lr", -1.0),
    ("weight_decay", 0.1),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_values_out_of_mlx_s_range_are_refused(
    server: RunningServer, model_name: str, name: str, value: float
) -> None:
    session = server.connect(model_name)
    with pytest.raises(InvalidHyperparameter, match="learning rate" if name == "lr" else name):
        session.create({"w": torch.ones(3)}, [{"rule": "mlx_adadelta", "params": ["w"], name: value}])


@pytest.mark.parametrize("kind", [keras.Adadelta, keras.Adagrad])
@pytest.mark.parametrize(("options", "words"), REFUSED, ids=lambda value: str(value)[:20])
def test_what_the_server_does_not_do_of_it(
    server: RunningServer, model_name: str, kind: Any, options: dict[str, Any], words: str
) -> None:
    model = Network()
    optimizer = kind(model.parameters(), **options)
    refusal = f"does not do Keras's {words}" if words else "state_dtype='param' keeps half"
    with pytest.raises(UnsupportedModule, match=refusal):
        server.connect(model_name).attach(optimizer, module=model)
    backward(model, [optimizer], 0)
    optimizer.step()


def test_parameters_that_decay_leaves_alone(server: RunningServer, model_name: str) -> None:
    model = Network()
    optimizer = keras.Adagrad(model.parameters(), weight_decay=0.1)
    optimizer.exclude_from_weight_decay([model.out.bias])
    with pytest.raises(UnsupportedModule, match="exclude_from_weight_decay: use a param group"):
        server.connect(model_name).attach(optimizer, module=model)


def test_rows_are_refused_by_name(server: RunningServer, model_name: str) -> None:
    model = Network(sparse=True)
    remote = server.connect(model_name).attach(keras.Adagrad(model.parameters()), module=model)
    backward(model, [remote], 0)
    with pytest.raises(SparseNotSupported, match=r"'table\.weight'.*keras_adagrad does not support sparse"):
        remote.step()


BY_NAME: dict[str, Any] = {
    "keras_adadelta": keras.Adadelta,
    "keras_adagrad": keras.Adagrad,
    "mlx_adadelta": mlx.AdaDelta,
    "mlx_adagrad": mlx.Adagrad,
}


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.kernel])
def test_by_name_without_an_optimizer(server: RunningServer, model_name: str, name: str) -> None:
    session = server.connect(model_name)
    session.create({"w": torch.ones(3)}, [{"rule": name, "params": ["w"], "lr": 0.5}])
    parameter = nn.Parameter(torch.ones(3))
    local = BY_NAME[name]([parameter], learning_rate=0.5)
    for _ in range(3):
        session.push({"w": torch.full((3,), 0.25)})
        parameter.grad = torch.full((3,), 0.25)
        local.step()
    assert torch.equal(torch.from_numpy(session.pull()["w"]), parameter.detach())


def test_torch_s_state_dicts_are_as_they_were(server: RunningServer, model_name: str) -> None:
    twins = Twins(server.connect(model_name), Network(), lambda m: torch.optim.Adagrad(m.parameters()))
    twins.remote._session.member()
    check_state_dict(twins.remote.state_dict(), twins.local[0].state_dict())
