"""Parameters that are written to between steps, by whatever hand: named, or sent and equal to local torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pushstep.optim import Adagrad
from pushstep.proto.errors import (
    InvalidHyperparameter,
    InvalidSettings,
    LocalParameterEdit,
    UnsupportedModule,
    WrongDtype,
    WrongShape,
)
from tests.support.servers.harness import RunningServer
from tests.support.servers.operators import show_model
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import Make, adadelta, adagrad, backward, both
from tests.support.trainings.twins import Twins

TRANSPORTS = pytest.mark.parametrize("shared_memory", [False, True], ids=["tcp", "shared memory"])


@torch.no_grad()
def _in_place(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.clamp_(-0.5, 0.5)


def _through_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.clamp_(-0.5, 0.5)


def _through_numpy(model: nn.Module) -> None:
    for parameter in model.parameters():
        array = parameter.detach().numpy()
        np.clip(array, -0.5, 0.5, out=array)


def _through_a_vector(model: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector.clamp(-0.5, 0.5), model.parameters())


def _by_another_address(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clamp(-0.5, 0.5)


def _renormed(model: nn.Module) -> None:
    model.table.weight.data.div_(model.table.weight.data.norm(dim=1, keepdim=True))  # type: ignore[union-attr,operator]


def _one_row(model: nn.Module) -> None:
    model.table.weight.data[2] = 0.25  # type: ignore[union-attr,index]


def _reinitialised(model: nn.Module) -> None:
    nn.init.constant_(model.hidden.weight, 0.125)  # type: ignore[union-attr,arg-type]


def _into_shared_memory(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.share_memory_()  # type: ignore[no-untyped-call]
    _through_data(model)


def _turned_in_place(model: nn.Module) -> None:
    weight = model.square.weight  # type: ignore[union-attr]
    weight.data = weight.data.t()  # type: ignore[operator,union-attr]


EDITS: dict[str, Callable[[Any], None]] = {
    "in place": _in_place,
    "through .data": _through_data,
    "through numpy": _through_numpy,
    "through a vector": _through_a_vector,
    "by another address": _by_another_address,
    "renormed rows": _renormed,
    "one row": _one_row,
    "reinitialised": _reinitialised,
    "after a move into shared memory": _into_shared_memory,
    "turned in place": _turned_in_place,
}


class Square(Network):
    """With a matrix whose transpose fits in its place."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.square = nn.Linear(2, 2, bias=False)

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        """Network's, with the numbers turned."""
        return super().forward(ids, self.square(numbers))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "rows"])
@TRANSPORTS
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_the_default_names_the_parameter(
    server: RunningServer, model_name: str, edit: Callable[[Any], None], shared_memory: bool, sparse: bool
) -> None:
    session = server.connect(model_name, shared_memory=shared_memory)
    twins = Twins(session, Square(sparse=sparse), adagrad)
    twins.step(0, 1)
    before = {name: p.detach().clone() for name, p in twins.model.named_parameters()}
    edit(twins.model)
    changed = [n for n, p in twins.model.named_parameters() if not torch.equal(p, before[n])]
    backward(twins.model, [twins.remote], 2)
    for _ in range(2):  # and again: nothing is forgotten by being told
        with pytest.raises(LocalParameterEdit, match=r"session\.upload\(\).*edits=\"upload\"") as caught:
            twins.remote.step()
        assert caught.value.fields["parameter"] in changed
    assert show_model(server, model_name)["version"] == 2
    edit(twins.local_model)
    session.upload()
    twins.step(3, 4)
    twins.check_state()


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "rows"])
@TRANSPORTS
@pytest.mark.parametrize("make", [adadelta, adagrad, both])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_sent_with_each_step_they_are_local_torch_s(
    server: RunningServer,
    model_name: str,
    make: Make,
    edit: Callable[[Any], None],
    shared_memory: bool,
    sparse: bool,
) -> None:
    """A loop that clamps after each step, unchanged; the last clamp goes up with the end."""
    if make is both and edit is _turned_in_place:
        make = adagrad  # it knows nothing of the square
    session = server.connect(model_name, shared_memory=shared_memory)
    twins = Twins(session, Square(sparse=sparse), make, edits="upload")
    for seed in range(4):
        twins.step(seed)
        edit(twins.model)
        edit(twins.local_model)
        twins.check()
    twins.check_state()
    session.close()
    held = server.connect(model_name, "reader").pull()
    for name, parameter in twins.local_model.named_parameters():
        if name in held:
            assert torch.equal(torch.from_numpy(held[name]), parameter.detach()), name


NO_EDITS: dict[str, Callable[[Any], object]] = {
    "the same values": lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}),
    "another address": lambda m: [setattr(p, "data", p.data.clone()) for p in m.parameters()],
    "into shared memory": lambda m: m.share_memory(),
    "another layout": lambda m: setattr(m.hidden.weight, "data", m.hidden.weight.data.t().contiguous().t()),
    "a clamp that clamps nothing": lambda m: [p.data.clamp_(-1e9, 1e9) for p in m.parameters()],
    "a counted write of nothing": lambda m: [p.detach().add_(0) for p in m.parameters()],
    "moved to where it is": lambda m: m.to("cpu").float(),
    "frozen": lambda m: m.requires_grad_(False).requires_grad_(True),
}


@pytest.mark.parametrize("edits", ["sample", "check", "upload"])
@TRANSPORTS
@pytest.mark.parametrize("touch", NO_EDITS.values(), ids=NO_EDITS)
def test_what_changes_no_value_is_no_edit(
    server: RunningServer, model_name: str, touch: Callable[[Any], object], shared_memory: bool, edits: str
) -> None:
    session = server.connect(model_name, shared_memory=shared_memory)
    twins = Twins(session, Network(), adagrad, edits=edits)
    for seed in range(4):
        twins.step(seed)
        touch(twins.model)
        touch(twins.local_model)  # another layout may round otherwise
    twins.check_state()
    assert show_model(server, model_name)["version"] == 4


CONVERSIONS: dict[str, tuple[Callable[[Any], object], type[Exception], str]] = {
    "another dtype": (
        lambda m: m.hidden.bfloat16(),
        WrongDtype,
        r"'hidden\.weight' has dtype torch\.bfloat16",
    ),
    "another shape": (
        lambda m: setattr(m.out.bias, "data", torch.zeros(2)),
        WrongShape,
        r"'out\.bias' has shape \(2,\), expected \(1,\), as it was attached",
    ),
}


@pytest.mark.parametrize("edits", ["sample", "check", "upload"])
@pytest.mark.parametrize(("convert", "error", "match"), CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_parameter_that_is_another_kind_of_tensor_is_named(
    server: RunningServer,
    model_name: str,
    convert: Callable[[Any], object],
    error: type[Exception],
    match: str,
    edits: str,
) -> None:
    session = server.connect(model_name)
    network = Network()
    remote = session.attach(Adagrad(network.parameters(), lr=0.1), module=network, edits=edits)  # type: ignore[arg-type]
    backward(network, [remote], 0)
    remote.step()
    kept = {name: p.data for name, p in network.named_parameters()}
    convert(network)
    for call in (remote.step, session.upload, lambda: remote.load_state_dict(_other(remote))):
        with pytest.raises(error, match=match):
            call()
    for name, parameter in network.named_parameters():
        parameter.data = kept[name]
    backward(network, [remote], 1)
    remote.step()
    assert show_model(server, model_name)["version"] == 2


def _other(remote: Any) -> Any:
    state_dict = remote.state_dict()
    state_dict["state"][0]["sum"].fill_(7.0)
    return state_dict


@pytest.mark.parametrize("place", [0, 77_777, 399_999])
def test_checking_all_finds_one_element(server: RunningServer, model_name: str, place: int) -> None:
    parameter = nn.Parameter(torch.zeros(400_000))
    remote = server.connect(model_name).attach(Adagrad([parameter], lr=0.1), names=["w"], edits="check")
    for _ in range(2):
        parameter.grad = torch.ones(400_000)
        remote.step()
    parameter.data[place] += 1
    with pytest.raises(LocalParameterEdit, match="'w'"):
        remote.step()


def test_sampling_finds_one_element_that_is_written_again_and_again(
    server: RunningServer, model_name: str
) -> None:
    """Each step brings the server's value, and each write would be lost: within 512 steps one is seen."""
    parameter = nn.Parameter(torch.zeros(40_000))
    session = server.connect(model_name, shared_memory=True)
    remote = session.attach(Adagrad([parameter], lr=0.1), names=["w"])
    gradient = torch.ones(40_000)
    with pytest.raises(LocalParameterEdit, match="'w'"):
        for _ in range(512):
            parameter.grad = gradient
            remote.step()
            parameter.data[12_345] = 0.5


@TRANSPORTS
def test_an_embedding_that_renorms_itself(
    server: RunningServer, model_name: str, shared_memory: bool
) -> None:
    """`max_norm` writes to the weight in forward."""

    def network(**options: Any) -> Network:
        made = Network(**options)
        made.table.max_norm = 0.7
        return made

    for sparse in (False, True):
        session = server.connect(f"{model_name}-{sparse}", shared_memory=shared_memory)
        twins = Twins(session, network(sparse=sparse), adagrad, edits="upload")
        twins.step(*range(5))
        twins.check_state()
        session.close()
    # without, it is named
    session = server.connect(f"{model_name}-refused", shared_memory=shared_memory)
    twins = Twins(session, network(), adagrad)
    backward(twins.model, [twins.remote], 0)
    with pytest.raises(LocalParameterEdit, match=r"'table\.weight'"):
        twins.remote.step()


def test_overlapped_and_accumulated_steps_send_them_too(server: RunningServer, model_name: str) -> None:
    twins = Twins(server.connect(model_name), Network(), adagrad, edits="upload", overlap=True)
    for seed in range(6):
        twins.step(seed)
        if seed % 2:
            _through_data(twins.model)
            _through_data(twins.local_model)
    twins.check_state()


def test_with_prefetch_they_are_named(server: RunningServer, model_name: str) -> None:
    network = Network()
    session = server.connect(model_name)
    with pytest.raises(InvalidSettings, match="prefetch"):
        session.attach(adagrad(network), module=network, edits="upload", prefetch=True)
    with pytest.raises(InvalidSettings, match="sample, check, upload"):
        session.attach(adagrad(network), module=network, edits="all")  # type: ignore[arg-type]
    remote = session.attach(adagrad(network), module=network, prefetch=True)
    for seed in range(3):
        backward(network, [remote], seed)
        remote.step()
    _through_data(network)
    backward(network, [remote], 3)
    with pytest.raises(LocalParameterEdit):
        remote.step()
    remote.synchronize()
    session.upload()
    backward(network, [remote], 4)
    remote.step()


def test_a_write_after_the_last_step_is_said_at_the_end(server: RunningServer, model_name: str) -> None:
    session, network = server.connect(model_name), Network()
    remote = session.attach(adagrad(network), module=network)
    backward(network, [remote], 0)
    remote.step()
    _through_data(network)
    with pytest.warns(RuntimeWarning, match="changed here after the last step"):
        session.close()


@TRANSPORTS
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_what_was_uploaded_is_known_though_a_step_was_refused_before(
    server: RunningServer, model_name: str, edit: Callable[[nn.Module], None], shared_memory: bool
) -> None:
    """The look before that step was the last one that found nothing."""
    session, network = server.connect(model_name, shared_memory=shared_memory), Square()
    remote = session.attach(adagrad(network), module=network)
    backward(network, [remote], 0)
    remote.param_groups[0]["lr"] = -1.0
    with pytest.raises(InvalidHyperparameter):
        remote.step()
    remote.param_groups[0]["lr"] = 0.1
    edit(network)
    with pytest.raises(LocalParameterEdit):
        remote.step()
    session.upload()
    remote.step()


@pytest.mark.parametrize("edits", ["sample", "upload"])
def test_a_step_that_was_refused_for_something_else_loses_none(
    server: RunningServer, model_name: str, edits: Any
) -> None:
    """At the end they are sent, or said, whatever was refused before; what was said already is not said again."""
    for told in (False, True):
        session, network = server.connect(f"{model_name}-{told}"), Network()
        remote = session.attach(adagrad(network), module=network, edits=edits)
        backward(network, [remote], 0)
        remote.step()
        _through_data(network)
        backward(network, [remote], 1)
        if told and edits == "sample":
            with pytest.raises(LocalParameterEdit):
                remote.step()
        else:
            group = remote.param_groups[0]
            group["params"], known = group["params"][::-1], group["params"]
            with pytest.raises(UnsupportedModule):
                remote.step()
            group["params"] = known
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            session.close()
        assert len(said) == (edits == "sample" and not told)
        held = server.connect(session.model, "reader").pull()
        sent = [torch.equal(torch.from_numpy(held[n]), p.detach()) for n, p in network.named_parameters()]
        assert all(sent) == (edits == "upload")


def test_another_worker_s_steps_come_in_between(server: RunningServer, model_name: str) -> None:
    """What is sent is what was changed: the other parameters are those of all workers."""
    networks = [Network(), Network()]
    remotes = [
        server.connect(model_name, f"w{k}").attach(adagrad(network), module=network, edits="upload")
        for k, network in enumerate(networks)
    ]
    for seed in range(6):
        network, remote = networks[seed % 2], remotes[seed % 2]
        backward(network, [remote], seed)
        remote.step()
        network.out.bias.data.fill_(0.5)
    held = server.connect(model_name, "reader").pull()
    for name, parameter in networks[1].named_parameters():
        if name != "out.bias":
            assert torch.equal(torch.from_numpy(held[name]), parameter.detach()), name
    # six steps, and before each but a worker's first a bias that was written to
    assert show_model(server, model_name)["version"] == 10


def test_a_restore_before_the_edit_is_told_as_ever(server: RunningServer, model_name: str) -> None:
    session, network = server.connect(model_name), Network()
    remote = session.attach(adagrad(network), module=network, edits="upload")
    backward(network, [remote], 0)
    remote.step()
    snapshot = server.rest("POST", f"/v1/models/{model_name}/snapshots").json()["id"]
    backward(network, [remote], 1)
    remote.step()
    server.rest("POST", f"/v1/models/{model_name}/snapshots/{snapshot}/restore")
    _through_data(network)
    backward(network, [remote], 2)
    with pytest.warns(RuntimeWarning, match="was restored to version 1"):
        remote.step()
    assert remote.last_receipt is not None and remote.last_receipt.outcome == "superseded"
    backward(network, [remote], 3)
    remote.step()
    assert remote.last_receipt.outcome == "applied"
