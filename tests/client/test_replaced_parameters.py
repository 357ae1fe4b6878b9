"""Parameters that stand for others in their groups, are more or fewer, or lie over one memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pushstep.optim import Adadelta, Adagrad
from pushstep.proto.errors import LocalParameterEdit, UnsupportedModule, WrongDtype, WrongShape
from tests.support.servers.harness import RunningServer
from tests.support.servers.operators import show_model
from tests.support.trainings.network import Network, loss_of
from tests.support.trainings.optimizers import Make, adadelta, adagrad, backward, both
from tests.support.trainings.twins import Twins


def _replace(
    model: Any, optimizer: torch.optim.Optimizer, path: str, value: torch.Tensor | None = None
) -> None:
    """Another tensor in the module and in the group, as pruning and densifying put it."""
    part, _, name = path.rpartition(".")
    old = model.get_parameter(path)
    new = nn.Parameter(old.detach().clone() if value is None else value)
    setattr(model.get_submodule(part), name, new)
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]


@pytest.mark.parametrize("shared_memory", [False, True], ids=["tcp", "shared memory"])
@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize("make", [adadelta, adagrad, both])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "rows"])
def test_one_of_the_same_values_is_followed(
    server: RunningServer, model_name: str, make: Make, sparse: bool, overlap: bool, shared_memory: bool
) -> None:
    """With the state that torch gives a new parameter: none."""
    session = server.connect(model_name, shared_memory=shared_memory)
    twins = Twins(session, Network(sparse=sparse), make, overlap=overlap)
    twins.step(0, 1)
    old = twins.model.out.weight
    for path in ("out.weight", "table.weight"):
        _replace(twins.model, twins.remote, path)
        for optimizer in twins.local:
            known = dict(optimizer.state)
            _replace(twins.local_model, optimizer, path) if twins.local_model.get_parameter(path) in {
                p for g in optimizer.param_groups for p in g["params"]
            } else None
            gone = known.keys() - {p for g in optimizer.param_groups for p in g["params"]}
            for parameter in gone:
                del optimizer.state[parameter]  # torch keeps it, to no use but a KeyError in state_dict()
    twins.step(2, 3)
    twins.check_state()
    assert twins.model.out.weight is not old
    assert twins.remote.last_receipt is not None


def test_its_fresh_state_goes_with_the_leave(server: RunningServer, model_name: str) -> None:
    network = Network()
    with server.connect(model_name) as session:
        remote = session.attach(adagrad(network), module=network)
        backward(network, [remote], 0)
        remote.step()
        _replace(network, remote, "out.weight")
    remote = server.connect(model_name).attach(adagrad(network), module=network)
    assert [int(state["step"]) for state in remote.state_dict()["state"].values()] == [1, 1, 1, 0, 1]


@pytest.mark.parametrize("edits", ["sample", "upload"])
def test_one_of_other_values_is_an_edit(server: RunningServer, model_name: str, edits: str) -> None:
    twins = Twins(server.connect(model_name), Network(), adagrad, edits=edits)
    twins.step(0)
    value = torch.full((1, 4), 0.5)
    for model, optimizer in ((twins.model, twins.remote), (twins.local_model, twins.local[0])):
        _replace(model, optimizer, "out.weight", value.clone())
    if edits == "sample":
        backward(twins.model, [twins.remote], 1)
        with pytest.raises(LocalParameterEdit, match=r"'out\.weight'"):
            twins.remote.step()
        twins.remote.upload()
    twins.step(1, 2)
    assert show_model(server, model_name)["version"] == 4
    del twins.local[0].state[next(p for p in twins.local[0].state if not _is_in(p, twins.local[0]))]
    twins.check_state()


def _is_in(parameter: Any, optimizer: torch.optim.Optimizer) -> bool:
    return any(parameter is p for group in optimizer.param_groups for p in group["params"])


def test_a_state_dict_between_is_of_what_is_there(server: RunningServer, model_name: str) -> None:
    twins = Twins(server.connect(model_name), Network(), adagrad)
    twins.step(0)
    _replace(twins.model, twins.remote, "out.weight")
    state_dict = twins.remote.state_dict()
    assert float(state_dict["state"][3]["step"]) == 0.0
    assert not state_dict["state"][3]["sum"].any() and state_dict["state"][2]["sum"].any()


SPOILT: dict[str, tuple[Callable[[Any, Any], Any], type[Exception], str]] = {
    "another shape": (
        lambda m, o: _replace(m, o, "out.weight", torch.zeros(1, 3)),
        WrongShape,
        r"'out\.weight' has shape \(1, 3\)",
    ),
    "another dtype": (
        lambda m, o: _replace(m, o, "out.weight", torch.zeros(1, 4).double()),
        WrongDtype,
        r"'out\.weight' has dtype torch\.float64",
    ),
    "one more": (lambda m, o: o.param_groups[0]["params"].append(nn.Parameter(torch.zeros(1))), UnsupportedModule, r"\[6\] parameters here and \[5\]"),
    "one fewer": (lambda m, o: o.param_groups[0]["params"].pop(), UnsupportedModule, r"\[4\] parameters here and \[5\]"),
    "a group more": (lambda m, o: o.param_groups.append({**o.param_groups[0], "params": [nn.Parameter(torch.zeros(1))]}), UnsupportedModule, r"\[5, 1\] parameters here"),
    "no group": (lambda m, o: o.param_groups.clear(), UnsupportedModule, r"\[\] parameters here"),
    "another order": (lambda m, o: o.param_groups[0]["params"].reverse(), UnsupportedModule, "order is the model's"),
    "twice the same": (lambda m, o: o.param_groups[0]["params"].__setitem__(slice(0, 2), [nn.Parameter(m.table.weight.detach().clone())] * 2), UnsupportedModule, "order is the model's"),
    "over another's memory": (lambda m, o: _replace(m, o, "out.weight", m.hidden.bias.data.view(1, 4)), UnsupportedModule, "memory"),
    "in two places": (lambda m, o: setattr(m.out.weight, "data", m.hidden.bias.data.view(1, 4)), UnsupportedModule, "memory"),
}  # fmt: skip


@pytest.mark.parametrize("edits", ["sample", "upload"])
@pytest.mark.parametrize(("spoil", "error", "match"), SPOILT.values(), ids=SPOILT)
def test_what_cannot_be_the_same_parameter_is_refused_by_name(
    server: RunningServer, model_name: str, spoil: Any, error: type[Exception], match: str, edits: str
) -> None:
    network = Network()
    remote = server.connect(model_name).attach(adagrad(network), module=network, edits=edits)  # type: ignore[arg-type]
    backward(network, [remote], 0)
    remote.step()
    groups = list(remote.param_groups)
    lists = [list(group["params"]) for group in groups]
    data = [p.data for p in lists[0]]
    spoil(network, remote)
    calls: list[Callable[[], Any]] = [remote.step]
    if not any(p.data_ptr() != d.data_ptr() for p, d in zip(lists[0], data, strict=True)):
        calls += [remote.state_dict, remote.upload, lambda: remote.add_param_group({"params": []})]
    for call in calls:
        with pytest.raises(error, match=match):
            call()
    assert show_model(server, model_name)["version"] == 1
    # put back, it goes on
    remote.param_groups[:] = groups
    for group, tensors in zip(groups, lists, strict=True):
        group["params"] = tensors
    for parameter, value in zip(lists[0], data, strict=True):
        parameter.data = value
    for parameter in lists[0]:
        parameter.grad = torch.ones_like(parameter)
    remote.step()
    assert show_model(server, model_name)["version"] == 2


# --- frozen and not any more


@pytest.mark.parametrize("shared_memory", [False, True], ids=["tcp", "shared memory"])
@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize("make", [adadelta, adagrad, both])
def test_parameters_that_are_frozen_and_thawed(
    server: RunningServer, model_name: str, make: Make, overlap: bool, shared_memory: bool
) -> None:
    network = Network()
    network.hidden.requires_grad_(False)
    session = server.connect(model_name, shared_memory=shared_memory)
    twins = Twins(session, network, make, overlap=overlap)
    for seed, (hidden, table) in enumerate([(0, 1), (1, 1), (1, 0), (0, 0), (1, 1)]):
        for model in (twins.model, twins.local_model):
            model.hidden.requires_grad_(bool(hidden))  # type: ignore[union-attr,operator]
            model.table.requires_grad_(bool(table))  # type: ignore[union-attr,operator]
        twins.step(2 * seed, 2 * seed + 1)
    twins.check_state()


def test_a_frozen_group_may_be_added(server: RunningServer, model_name: str) -> None:
    network, local = Network(), Network()
    for one in (network, local):
        one.out.requires_grad_(False)
    session = server.connect(model_name, shared_memory=True)
    remote = session.attach(
        Adadelta([*network.table.parameters(), *network.hidden.parameters()]), module=network
    )
    plain = Adadelta([*local.table.parameters(), *local.hidden.parameters()])
    remote.add_param_group({"params": list(network.out.parameters())})
    plain.add_param_group({"params": list(local.out.parameters())})
    for seed in range(4):
        for model, optimizer in ((network, remote), (local, plain)):
            model.out.requires_grad_(seed > 1)
            backward(model, [optimizer], seed)
            optimizer.step()
    for one, other in zip(network.parameters(), local.parameters(), strict=True):
        assert torch.equal(one, other)


# --- several parameters over one memory


class Twice(nn.Module):
    """A matrix that is used twice; how it is tied is the caller's affair."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(3, 3, bias=False)
        self.other = nn.Linear(3, 3, bias=False)
        self.out = nn.Linear(3, 1)

    def forward(self, ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """A number per row."""
        wide = torch.cat([numbers, ids.unsqueeze(1).to(numbers)], dim=1)
        result: torch.Tensor = self.out(torch.tanh(self.other(torch.tanh(self.one(wide)))))
        return result


@pytest.mark.parametrize("shared_memory", [False, True], ids=["tcp", "shared memory"])
@pytest.mark.parametrize("make", [adadelta, adagrad])
def test_the_same_view_of_one_memory_is_one_parameter(
    server: RunningServer, model_name: str, make: Make, shared_memory: bool
) -> None:
    """It trains like a tied weight, which has one state and one gradient, and has both names."""
    loose, tied = Twice(), Twice()
    loose.other.weight.data = loose.one.weight.data
    tied.other.weight = tied.one.weight
    session = server.connect(model_name, shared_memory=shared_memory)
    with pytest.warns(RuntimeWarning, match=r"'one\.weight' and 'other\.weight' are one memory"):
        remote = session.attach(make(loose), module=loose)  # type: ignore[arg-type]
    local: Any = make(tied)
    for seed in range(4):
        backward(loose, [remote], seed)
        backward(tied, [local], seed)
        if seed == 2:
            loose.other.weight.grad = None
            tied.one.weight.grad.copy_(loose.one.weight.grad)  # type: ignore[union-attr,arg-type]
        remote.step()
        local.step()
        assert torch.equal(loose.one.weight, tied.one.weight), seed
    assert loose.one.weight.data_ptr() == loose.other.weight.data_ptr()
    held = session.pull()
    assert (held["one.weight"] == held["other.weight"]).all()
    with pytest.raises(UnsupportedModule, match="another name"):
        session.push({"one.weight": held["one.weight"], "other.weight": held["one.weight"]})
    exported = session.pull()
    assert set(tied.state_dict()) == set(exported)
    # a state_dict of as many parameters as the optimizer has
    state_dict = remote.state_dict()
    assert state_dict["param_groups"][0]["params"] == [0, 1, 2, 3]
    assert torch.equal(
        state_dict["state"][0]["square_avg" if make is adadelta else "sum"],
        state_dict["state"][1]["square_avg" if make is adadelta else "sum"],
    )
    fresh = Twice()
    make(fresh).load_state_dict(state_dict)  # type: ignore[union-attr]
    state_dict["state"][0]["step"] += 1
    with pytest.raises(ValueError, match=r"different states of 'one\.weight'"):
        remote.load_state_dict(state_dict)
    state_dict["state"][1]["step"] += 1
    remote.load_state_dict(state_dict)
    assert float(remote.state_dict()["state"][0]["step"]) == float(state_dict["state"][1]["step"])
    # it joins with a worker that ties for real
    second = Twice()
    second.other.weight = second.one.weight
    server.connect(model_name, "w1").attach(make(second), module=second)  # type: ignore[arg-type]
    assert torch.equal(second.one.weight, loose.one.weight)


def _overlapping(kind: str) -> tuple[nn.Module, list[list[nn.Parameter]]]:
    """A module, and the groups of its parameters that cannot be."""
    module = Twice()
    memory = torch.randn(12)
    one, other = nn.Parameter(memory[:9]), nn.Parameter(memory[3:])
    if kind == "two groups":
        other = nn.Parameter(one.data)
    elif kind == "turned":
        one = nn.Parameter(memory[:9].view(3, 3))
        other = nn.Parameter(one.data.t())
    elif kind == "another dtype":
        other = nn.Parameter(memory[:9].view(torch.bfloat16))
    elif kind == "itself":
        one = nn.Parameter(torch.zeros(1).expand(4))
    module.one, module.other = nn.ParameterList([one]), nn.ParameterList([other])  # type: ignore[assignment]
    return module, [[one], [other]] if kind == "two groups" else [[one, other]]


@pytest.mark.parametrize("kind", ["part of another", "turned", "another dtype", "two groups", "itself"])
def test_what_overlaps_otherwise_is_refused_by_name(
    server: RunningServer, model_name: str, kind: str
) -> None:
    module, groups = _overlapping(kind)
    optimizer = Adagrad([{"params": parameters} for parameters in groups], lr=0.1)
    session = server.connect(model_name)
    words = "lie in the same memory" if kind == "itself" else r"'one\.0' and 'other\.0'.* memory"
    with pytest.raises(UnsupportedModule, match=words):
        session.attach(optimizer, module=module)
    assert server.rest("GET", f"/v1/models/{model_name}").status_code == 404
    if kind != "itself":
        _check_usable(optimizer, [p for group in groups for p in group])


def _check_usable(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    before = parameters[0].detach().clone()
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    assert not torch.equal(before, parameters[0])


def test_views_side_by_side_are_ordinary_parameters(server: RunningServer, model_name: str) -> None:
    memory, same = torch.randn(2, 12)
    same.copy_(memory)
    remote_side = [nn.Parameter(memory[:5]), nn.Parameter(memory[5:9]), nn.Parameter(memory[9:])]
    interleaved = [nn.Parameter(same[k::3]) for k in range(3)]
    for parameters in (remote_side, interleaved):
        name = f"{model_name}-{len(parameters[0])}"
        local = [nn.Parameter(p.detach().clone()) for p in parameters]
        remote = server.connect(name).attach(Adagrad(parameters, lr=0.1), names=["a", "b", "c"])
        plain = Adagrad(local, lr=0.1)
        for _ in range(3):
            for one, other in zip(parameters, local, strict=True):
                one.grad, other.grad = torch.ones_like(one), torch.ones_like(other)
            remote.step()
            plain.step()
        assert all(torch.equal(*pair) for pair in zip(parameters, local, strict=True))


def test_a_group_over_a_known_parameter_s_memory_is_refused(server: RunningServer, model_name: str) -> None:
    network = Network()
    remote = server.connect(model_name).attach(adagrad(network), module=network)
    with pytest.raises(UnsupportedModule, match=r"'out\.weight', which the model has"):
        remote.add_param_group({"params": [nn.Parameter(network.out.weight.data)]})
    assert len(remote.param_groups) == 1
    loss_of(network, 0).backward()
    remote.step()


def test_ties_that_come_undone_are_refused(server: RunningServer, model_name: str) -> None:
    loose = Twice()
    loose.other.weight.data = loose.one.weight.data
    with pytest.warns(RuntimeWarning, match="one memory"):
        remote = server.connect(model_name).attach(adagrad(loose), module=loose)
    loose.other.weight.data = loose.other.weight.data.clone()
    backward(loose, [remote], 0)
    with pytest.raises(UnsupportedModule, match="were one memory at attach"):
        remote.step()
