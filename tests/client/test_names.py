"""What parameters are called on the server, and which modules, tensors and optimizers are refused with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed
from harness import RunningServer
from safetensors.torch import load
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from twin import Network, Twins, adadelta, adagrad, both

from pushstep.client.names import clean
from pushstep.optim import Adadelta, Adagrad
from pushstep.proto.errors import InvalidManifest, UnsupportedModule, WrongDtype

NETWORK_NAMES = ["table.weight", "hidden.weight", "hidden.bias", "out.weight", "out.bias"]


def names_on(server: RunningServer, model: str) -> list[str]:
    """What the server calls a model's parameters, in order."""
    entries = server.rest("GET", f"/v1/models/{model}/parameters").json()["parameters"]
    return [entry["name"] for entry in entries]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("weight", "weight"),
        ("module.net.0.weight", "net.0.weight"),
        ("_orig_mod.net.0.weight", "net.0.weight"),
        ("module._orig_mod.net.0.weight", "net.0.weight"),
        ("_orig_mod.module.net.0.weight", "net.0.weight"),
        ("net._orig_mod.0.weight", "net.0.weight"),
        ("net.module.weight", "net.module.weight"),  # a user's own child of that name
        ("modules.weight", "modules.weight"),
    ],
)
def test_wrappers_leave_no_trace(given: str, expected: str) -> None:
    assert clean(given) == expected


def test_names_come_from_the_module(server: RunningServer, model_name: str) -> None:
    """In the order of the optimizer's groups, not of the module."""
    model = Network()
    reverse = list(model.parameters())[::-1]
    server.connect(model_name).attach(Adadelta(reverse), module=model)
    assert names_on(server, model_name) == NETWORK_NAMES[::-1]


@pytest.mark.parametrize("what", ["whole", "part"])
def test_a_compiled_module_has_the_plain_one_s_names(
    server: RunningServer, model_name: str, what: str
) -> None:
    model = Network()
    compiled: Any = torch.compile(model, backend="eager") if what == "whole" else model
    if what == "part":
        model.hidden = torch.compile(model.hidden, backend="eager")  # type: ignore[assignment]
    assert any("_orig_mod" in name for name, _ in compiled.named_parameters())
    server.connect(model_name, "w0").attach(adadelta(compiled), module=compiled)
    assert names_on(server, model_name) == NETWORK_NAMES
    # so a worker that does not compile is the same model
    plain = Network(seed=1)
    server.connect(model_name, "w1").attach(adadelta(plain), module=plain)
    assert torch.equal(plain.table.weight, model.table.weight)


@pytest.mark.parametrize("form", ["list", "mapping"])
def test_names_given_by_hand(server: RunningServer, model_name: str, form: str) -> None:
    parameters = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2))]
    names = ["a", "b.c"]
    given: Any = names if form == "list" else dict(zip(parameters, names, strict=True))
    server.connect(model_name).attach(Adagrad(parameters), names=given)
    assert names_on(server, model_name) == names


def test_torch_s_own_param_names(server: RunningServer, model_name: str) -> None:
    model = Network()
    session = server.connect(model_name)
    remote = session.attach(torch.optim.Adadelta(model.named_parameters(prefix="module")))
    assert names_on(server, model_name) == NETWORK_NAMES
    assert remote.state_dict()["param_groups"][0]["param_names"] == [f"module.{n}" for n in NETWORK_NAMES]


def test_without_any_name_it_is_group_and_index(server: RunningServer, model_name: str) -> None:
    model = Network()
    server.connect(model_name).attach(both(model))
    assert names_on(server, model_name) == ["0.0", "1.0", "1.1", "1.2", "1.3"]


class Tied(nn.Module):
    """A table that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3)
        self.project = nn.Linear(3, 6, bias=False)
        self.project.weight = self.table.weight

    def forward(self, ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """As Network's."""
        result: torch.Tensor = self.project(self.table(ids)) + numbers.sum()
        return result


def test_a_tied_weight_is_one_parameter_under_both_names(server: RunningServer, model_name: str) -> None:
    torch.manual_seed(0)
    session = server.connect(model_name)
    twins = Twins(session, Tied(), adagrad)
    twins.step(0, 1)
    assert names_on(server, model_name) == ["table.weight"]
    for name in ("table.weight", "project.weight"):
        assert (session.pull_rows(name, [4, 0]) == twins.model.table.weight.detach()[[4, 0]].numpy()).all()
    exported = load(server.rest("GET", f"/v1/models/{model_name}/export").content)
    fresh = Tied()
    fresh.load_state_dict(exported)
    assert torch.equal(fresh.table.weight, twins.model.table.weight)  # type: ignore[union-attr,arg-type]
    # a worker that ties nothing has another model
    loose = Tied()
    loose.project.weight = nn.Parameter(torch.zeros(6, 3))
    with pytest.raises(Exception, match=r"only this worker has 'project\.weight'"):
        server.connect(model_name, "w1").attach(adagrad(loose), module=loose)


# --- refusals: before anything is sent, in words


def _refused(server: RunningServer, name: str, make: Any, match: str, **attach: Any) -> None:
    session = server.connect(name)
    with pytest.raises(UnsupportedModule, match=match) as caught:
        session.attach(make, **attach)
    assert caught.value.code == "unsupported_module"
    assert server.rest("GET", f"/v1/models/{name}").status_code == 404


def _weights(count: int = 1) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2)) for _ in range(count)]


def test_a_parameter_in_two_optimizers(server: RunningServer, model_name: str) -> None:
    shared = _weights()
    _refused(server, model_name, [Adadelta(shared), Adagrad(shared)], "in two optimizers")


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.Rprop])
def test_a_rule_that_the_server_has_not(server: RunningServer, model_name: str, kind: Any) -> None:
    _refused(
        server, model_name, kind(_weights(), lr=0.1), f"{kind.__name__} is not a rule.*Adadelta or Adagrad"
    )
    _refused(server, model_name, [Adadelta(_weights()), kind(_weights(), lr=0.1)], kind.__name__)


def test_no_optimizer_at_all(server: RunningServer, model_name: str) -> None:
    _refused(server, model_name, [], "at least one optimizer")


def test_a_remote_optimizer_again(server: RunningServer, model_name: str) -> None:
    model = Network()
    remote = server.connect(f"{model_name}-first").attach(adadelta(model), module=model)
    _refused(server, model_name, remote, "RemoteOptimizer is not a rule")


def test_a_module_that_it_was_not_made_from(server: RunningServer, model_name: str) -> None:
    _refused(
        server, model_name, adadelta(Network()), "parameter 0 .* not one of the module's", module=Network()
    )


@pytest.mark.parametrize(
    ("names", "match"),
    [(["a"], "1 names for 2 parameters"), ({}, "names lacks parameter 0 of 2")],
    ids=["too few", "mapping without them"],
)
def test_names_that_do_not_cover(server: RunningServer, model_name: str, names: Any, match: str) -> None:
    _refused(server, model_name, Adadelta(_weights(2)), match, names=names)


def test_one_name_for_two_parameters(server: RunningServer, model_name: str) -> None:
    with pytest.raises((InvalidManifest, UnsupportedModule, ValueError), match="'a'"):
        server.connect(model_name).attach(Adadelta(_weights(2)), names=["a", "a"])
    assert server.rest("GET", f"/v1/models/{model_name}").status_code == 404


def test_a_dtype_that_cannot_travel(server: RunningServer, model_name: str) -> None:
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(WrongDtype, match=r"'phase' has dtype torch\.complex64"):
        server.connect(model_name).attach(Adadelta([parameter]), names=["phase"])
    assert server.rest("GET", f"/v1/models/{model_name}").status_code == 404


@pytest.fixture
def process_group() -> Iterator[None]:
    """torch.distributed with this process alone in it."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_wrappers_and_tensors(server: RunningServer, model_name: str) -> None:
    wrapped = nn.parallel.DistributedDataParallel(Network())
    _refused(server, model_name, adadelta(wrapped), "DistributedDataParallel.*average", module=wrapped)
    outer = nn.Sequential(wrapped)
    _refused(server, model_name, adadelta(outer), "DistributedDataParallel", module=outer)

    mesh = init_device_mesh("cpu", (1,))
    sharded = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Replicate()]))
    _refused(server, model_name, Adadelta([sharded]), "'w' is a DTensor.*attach the whole one", names=["w"])

    # the module inside a DistributedDataParallel is an ordinary one
    server.connect(model_name).attach(adadelta(wrapped), module=wrapped.module)
    assert names_on(server, model_name) == NETWORK_NAMES


def test_row_wise_state_is_refused(server: RunningServer, model_name: str) -> None:
    _refused(
        server,
        model_name,
        Adagrad([nn.Parameter(torch.zeros(4, 2))], row_wise=True),
        "one accumulator per row",
    )
