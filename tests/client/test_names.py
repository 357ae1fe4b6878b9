"""What parameters are called on the server, and which modules, tensors and optimizers are refused with a reason."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
import torch.distributed
from safetensors.torch import load
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from pushstep.client.attachment.names import CleanNames, clean_list
from pushstep.optim import Adadelta, Adagrad
from pushstep.proto.errors import (
    InvalidManifest,
    InvalidText,
    NonfiniteGradient,
    PushstepError,
    TooLong,
    UnsupportedModule,
    WrongDtype,
)
from pushstep.proto.types_pb2 import Manifest, ParamGroup
from tests.support.servers.harness import RunningServer
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import adadelta, adagrad, both
from tests.support.trainings.twins import Twins

NETWORK_NAMES = ["table.weight", "hidden.weight", "hidden.bias", "out.weight", "out.bias"]


def names_on(server: RunningServer, model: str) -> list[str]:
    """What the server calls a model's parameters, in order."""
    entries = server.rest("GET", f"/v1/models/{model}/parameters").json()["parameters"]
    return [entry["name"] for entry in entries]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["weight"], ["weight"]),
        (["module.net.0.weight", "module.bias"], ["net.0.weight", "bias"]),
        (["_orig_mod.net.0.weight"], ["net.0.weight"]),
        (["module._orig_mod.net.0.weight"], ["net.0.weight"]),
        (["_orig_mod.module.net.0.weight"], ["net.0.weight"]),
        (["net._orig_mod.0.weight"], ["net.0.weight"]),
        (["net.module.weight"], ["net.module.weight"]),  # a user's own child of that name
        (["module.weight", "head.weight"], ["module.weight", "head.weight"]),
        (["modules.weight"], ["modules.weight"]),
        ([], []),
    ],
)
def test_of_names_alone_wrappers_are_guessed(given: list[str], expected: list[str]) -> None:
    assert clean_list(given) == expected


class Holder(nn.Module):
    """A child that a user calls `module`, and which wraps nothing."""

    def __init__(self, *, beside: bool) -> None:
        super().__init__()
        self.module = nn.Linear(3, 2)
        if beside:
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("module_mean", torch.zeros(2))

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """A number per row."""
        result: torch.Tensor = self.module(numbers).sum()
        return result


class DataParallel(nn.Module):
    """As torch's: it wraps a module under the name `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


WRAPS: dict[str, Any] = {
    "itself": lambda m: m,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "data parallel": DataParallel,
    "both": lambda m: DataParallel(torch.compile(m, backend="eager")),
    "the other way round": lambda m: torch.compile(DataParallel(m), backend="eager"),
    "further in": lambda m: nn.ModuleDict({"net": DataParallel(m)}),
}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a weight"])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_child_called_module_keeps_its_name(
    server: RunningServer, model_name: str, wrap: Any, beside: bool
) -> None:
    """Wrappers are known by their class: only what they put before a name goes."""
    plain = Holder(beside=beside)
    wrapped = wrap(plain)
    session = server.connect(model_name)
    session.attach(Adagrad(wrapped.parameters(), lr=0.1), module=wrapped)
    expected = list(plain.state_dict())
    if isinstance(wrapped, nn.ModuleDict):
        expected = [f"net.{name}" for name in expected]
    exported = load(server.rest("GET", f"/v1/models/{model_name}/export").content)
    assert sorted(exported) == sorted(expected)
    fresh = Holder(beside=beside)
    fresh.load_state_dict({name.removeprefix("net."): value for name, value in exported.items()})
    assert torch.equal(fresh.module.weight, plain.module.weight)


def test_a_module_under_two_names_and_keys_that_hooks_make() -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 2)})
    net["b"] = net["a"]
    clean = CleanNames(DataParallel(net))
    assert [clean.of(f"module.{name}.weight") for name in "ab"] == ["a.weight", "b.weight"]
    assert clean.of("module.a.made.up.key") == "a.made.up.key"
    assert clean.of("scale") == "scale"


GOOD_NAMES = [
    "a b",
    "100%",
    "a%41b",
    "a/b.c",
    "/a",
    "a/",
    "a//b",
    "größe",
    "\u6743\u91cd",
    "a?b=c&d#e",
    "~'\"\\",
    "...",
    "x" * 1000,
]


@pytest.mark.parametrize("name", GOOD_NAMES, ids=ascii)
def test_a_name_works_everywhere_or_nowhere(server: RunningServer, model_name: str, name: str) -> None:
    """REST, both exports, state_dict, pulls by row, errors, a restart of the snapshot's text."""
    session = server.connect(model_name)
    parameter = nn.Parameter(torch.ones(3, 2))
    remote = session.attach(Adagrad([parameter], lr=0.1), names=[name])
    parameter.grad = torch.ones(3, 2)
    remote.step()
    shown = server.rest("GET", f"/v1/models/{model_name}/parameters/{quote(name, safe='')}")
    assert (shown.status_code, shown.json()["name"]) == (200, name)
    assert names_on(server, model_name) == [name]
    assert list(session.pull()) == [name]
    assert session.pull_rows(name, [1]).tolist() == session.pull()[name][[1]].tolist()
    exported = server.rest("GET", f"/v1/models/{model_name}/export").content
    assert torch.equal(load(exported)[name], parameter.detach())
    file = io.BytesIO(server.rest("GET", f"/v1/models/{model_name}/export?format=torch").content)
    assert list(torch.load(file, weights_only=True)["model"]) == [name]
    snapshot = server.rest("POST", f"/v1/models/{model_name}/snapshots").json()["id"]
    content = server.rest("GET", f"/v1/models/{model_name}/snapshots/{snapshot}/content").content
    assert list(load(content)) == [name]
    remote.state_dict()
    with pytest.raises(NonfiniteGradient) as caught:
        session.push({name: np.full((3, 2), np.nan, np.float32)})
    assert repr(name)[:100] in caught.value.message or len(name) > 100


BAD_NAMES = {
    "": "is empty",
    "__metadata__": "kept by the safetensors format",
    "a\nb": r"holds U\+000A",
    "a\x00": r"holds U\+0000",
    "a\u2028b": r"holds U\+2028",
    "a\ud800": r"holds U\+D800",
    "a/../b": "between slashes",
    "./a": "between slashes",
    "x" * 1001: "more than 1000",
}


@pytest.mark.parametrize("way", ["attach", "alias", "add_param_group", "buffer", "create", "created by hand"])
@pytest.mark.parametrize(("name", "why"), BAD_NAMES.items(), ids=[ascii(name[:20]) for name in BAD_NAMES])
def test_a_name_that_would_not_is_refused_with_the_reason(
    server: RunningServer, model_name: str, name: str, why: str, way: str
) -> None:
    if way == "created by hand" and "\ud800" in name:
        why, name = "holds", "\ud7ff"  # protobuf has no way to say the other
    session = server.connect(model_name)
    parameter = nn.Parameter(torch.zeros(2))
    if way == "add_param_group":
        remote = session.attach(Adagrad([("good", parameter)]))
        with pytest.raises(InvalidManifest, match=why):
            remote.add_param_group({"params": [(name, nn.Parameter(torch.zeros(2)))]})
        assert len(remote.param_groups) == 1
        assert names_on(server, model_name) == ["good"]
        return
    refusals: tuple[type[PushstepError], ...] = (InvalidManifest,)
    if way == "created by hand":  # the limits of a request come first
        refusals = (InvalidManifest, InvalidText, TooLong)
        why = why.replace("holds", "holds.*").replace("more than", "more than|at most")
    with pytest.raises(refusals, match=why):
        if way == "attach":
            session.attach(Adagrad([parameter]), names=[name])
        elif way == "create":
            session.create({name: np.zeros(2, np.float32)})
        elif way == "created by hand":
            manifest = Manifest(groups=[ParamGroup(rule="adagrad")])
            manifest.parameters.add(name="good", shape=[2], dtype="DTYPE_FLOAT32", aliases=[name])
            session._worker.membership.join_or_create(
                manifest, lambda layout: {(layout.slots[0], ""): torch.zeros(2)}
            )
        else:
            module = nn.Module()
            module.good = parameter
            into = module._parameters if way == "alias" else module._buffers
            into[name] = parameter if way == "alias" else torch.zeros(1)
            session.attach(Adagrad([parameter]), module=module)
    assert server.rest("GET", f"/v1/models/{model_name}").status_code == 404


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
