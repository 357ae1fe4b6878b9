"""A checkpoint is gone back to in every order of the calls, with the server wherever it is: local torch's numbers, or a word.

Lightning, HF's Trainer and torch's own tutorial load the module, make the optimizer (attach), and load its state. Others load
all before, or all after.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from pushstep.client import RemoteOptimizer, Session
from pushstep.proto.errors import LocalParameterEdit, OtherWorkersLive
from tests.support.servers.harness import RunningServer
from tests.support.servers.operators import restore, show_model, take_snapshot
from tests.support.trainings.bits import check_state_dict
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import Make, adadelta, adagrad, backward, both

MODULE, ATTACH, STATE = "module.load_state_dict", "attach", "optimizer.load_state_dict"
ORDERS = list(itertools.permutations((MODULE, ATTACH, STATE)))
SERVERS = ("fresh", "at the checkpoint", "ahead", "behind", "elsewhere")


class Normed(Network):
    """Network with statistics beside its parameters, and a layer that is frozen."""

    def __init__(self, *, seed: int = 0, **options: Any) -> None:
        super().__init__(seed=seed, **options)
        self.norm = nn.BatchNorm1d(2, affine=False)
        torch.manual_seed(seed)
        self.fixed = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Network's, of numbers that went through both."""
        return super().forward(ids, self.norm(self.fixed(numbers)))


def _stepped(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _made(make: Make, model: Any) -> Any:
    """Over what is trained."""
    model.fixed.requires_grad_(False)
    trained = nn.Module()
    trained.table, trained.hidden, trained.out = model.table, model.hidden, model.out
    return make(trained)


def _train(model: nn.Module, optimizer: Any, seeds: range) -> None:
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    for seed in seeds:
        backward(model, optimizers, seed)
        for one in optimizers:
            one.step()


@dataclass
class Checkpoint:
    """What was saved: of the module, and of its optimizers."""

    module: dict[str, Any]
    optimizer: Any


def _checkpoint(server: RunningServer, model_name: str, make: Make, where: str) -> Checkpoint:
    """Train to a checkpoint, and leave the server where it is to be."""
    session, network = server.connect(model_name if where != "fresh" else f"{model_name}-other"), Normed()
    remote = session.attach(_made(make, network), module=network)
    _train(network, remote, range(1))
    earlier = take_snapshot(server, session.model)["id"]
    _train(network, remote, range(1, 3))
    saved = Checkpoint(copy.deepcopy(network.state_dict()), copy.deepcopy(remote.state_dict()))
    if where in ("ahead", "behind", "elsewhere"):
        _train(network, remote, range(3, 5))
    session.close()
    if where == "behind":
        restore(server, model_name, earlier)
    if where == "elsewhere":
        assert server.rest("DELETE", f"/v1/models/{model_name}").status_code < 300
        session, network = server.connect(model_name), Normed(seed=8)
        _train(network, session.attach(_made(make, network), module=network), range(20, 23))
        session.close()
    return saved


def _load(optimizer: Any, saved: Any) -> None:
    """Into torch's optimizers, or ours."""
    if isinstance(optimizer, list):
        for one, of_one in zip(optimizer, saved, strict=True):
            one.load_state_dict(of_one)
    else:
        optimizer.load_state_dict(saved)


def _locally(make: Make, saved: Checkpoint) -> tuple[nn.Module, Any]:
    """What the script would be without a server: two further steps."""
    model = Normed(seed=5)
    optimizer = _made(make, model)
    model.load_state_dict(copy.deepcopy(saved.module))
    _load(optimizer, copy.deepcopy(saved.optimizer))
    _train(model, optimizer, range(10, 12))
    return model, optimizer


def _remotely(
    session: Session, order: tuple[str, ...], make: Make, saved: Checkpoint, edits: Any
) -> tuple[nn.Module, RemoteOptimizer]:
    model: Any = Normed(seed=5)
    optimizer: Any = _made(make, model)
    for call in order:
        if call == MODULE:
            model.load_state_dict(copy.deepcopy(saved.module))
        elif call == ATTACH:
            optimizer = session.attach(optimizer, module=model, edits=edits)
        else:
            _load(optimizer, copy.deepcopy(saved.optimizer))
    return model, optimizer


# What is refused, rather than equal: the module was loaded last, over what attach had made known. What is equal but for
# that attach said that the server's values hold: all was loaded before.
def _expected(order: tuple[str, ...], where: str, edits: str) -> str:
    there = where in ("ahead", "behind", "elsewhere")
    if order[2] == ATTACH:
        return "the server's" if there else "local"
    if order[2] == MODULE:
        if order[0] == STATE and there:
            return "named"  # its state was not taken: sent with the server's it would be a mixture
        if edits == "upload" or (where == "at the checkpoint"):
            return "local"
        return "named"
    return "local"


@pytest.mark.parametrize("edits", ["sample", "upload"])
@pytest.mark.parametrize("where", SERVERS)
@pytest.mark.parametrize("order", ORDERS, ids=[", ".join(order) for order in ORDERS])
def test_going_back_to_a_checkpoint(
    server: RunningServer, model_name: str, order: tuple[str, ...], where: str, edits: str
) -> None:
    make: Make = (adadelta, adagrad, both)[(ORDERS.index(order) + SERVERS.index(where)) % 3]
    saved = _checkpoint(server, model_name, make, where)
    before = show_model(server, model_name) if where != "fresh" else {"version": 0, "timeline": 1}
    local_model, local = _locally(make, saved)
    session = server.connect(model_name, "again")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, remote = _remotely(session, order, make, saved, edits)
    words = " ".join(str(warning.message) for warning in said)
    expected = _expected(order, where, edits)
    if expected == "named":
        backward(model, [remote], 10)
        with pytest.raises(LocalParameterEdit):
            remote.step()
        return
    if expected == "the server's":
        assert "not this worker's, which has taken 3 steps" in words
        assert remote.values_from == "server"
        assert show_model(server, model_name)["version"] == before["version"]
        return
    if order.index(MODULE) < order.index(ATTACH) < order.index(STATE) and where not in (
        "fresh",
        "at the checkpoint",
    ):
        assert "has gone back to the values that this worker had before" in words
        assert show_model(server, model_name)["timeline"] == before["timeline"] + 1
    elif where == "at the checkpoint":
        assert show_model(server, model_name)["timeline"] == before["timeline"], "nothing was replaced"
        assert ("its own values" in words) == (order == (ATTACH, STATE, MODULE)), (
            "the module was not loaded yet"
        )
    _train(model, remote, range(10, 12))
    theirs = local_model.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    got = remote.state_dict()
    of_all = [one.state_dict() for one in local] if isinstance(local, list) else [local.state_dict()]
    for one, other in zip(got if isinstance(got, list) else [got], of_all, strict=True):
        check_state_dict(one, other)


def test_a_server_that_has_the_state_but_other_values(server: RunningServer, model_name: str) -> None:
    """They were uploaded since the checkpoint: they hold, and it is said; what is loaded after attach stands."""
    saved = _checkpoint(server, model_name, adagrad, "at the checkpoint")
    with server.connect(model_name, "editor") as session:
        edited: Any = Normed()
        session.attach(_made(adagrad, edited), module=edited)
        with torch.no_grad():
            edited.out.weight.clamp_(-0.1, 0.1)
        session.upload()
        uploaded = edited.out.weight.detach().clone()
    for order, expected in (
        ((MODULE, ATTACH, STATE), uploaded),
        ((ATTACH, MODULE, STATE), saved.module["out.weight"]),
    ):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with server.connect(model_name, "again") as session:
                model, _ = _remotely(session, order, adagrad, saved, "sample")
        words = " ".join(str(warning.message) for warning in said)
        assert ("'out.weight'" in words) == (order[0] == MODULE), words
        assert torch.equal(model.get_parameter("out.weight"), expected)


@pytest.mark.parametrize("where", ["at the checkpoint", "ahead"])
def test_several_workers_go_back_together(server: RunningServer, model_name: str, where: str) -> None:
    """The first one takes the model back; the next ones find it there. Once it has moved on, nobody's rug is pulled."""
    saved = _checkpoint(server, model_name, adagrad, where)
    order = (MODULE, ATTACH, STATE)
    workers = []
    for number in range(3):
        session = server.connect(model_name, f"again-{number}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            workers.append(_remotely(session, order, adagrad, saved, "sample"))
    assert show_model(server, model_name)["timeline"] == (1 if where == "at the checkpoint" else 2)
    _train(*workers[0], range(10, 11))
    late = server.connect(model_name, "late")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(OtherWorkersLive, match="force=True"):
            _remotely(late, order, adagrad, saved, "sample")
    for model, remote in workers[1:]:
        _train(model, remote, range(11, 12))


def test_what_attach_has_overwritten_is_let_go_at_the_first_step(
    server: RunningServer, model_name: str
) -> None:
    """From then on a load is of the values that are trained, as torch has it."""
    saved = _checkpoint(server, model_name, adagrad, "ahead")
    session, model = server.connect(model_name, "again"), Normed(seed=5)
    remote = session.attach(_made(adagrad, model), module=model)
    local_model: Any = copy.deepcopy(model)
    local = _made(adagrad, local_model)
    local.load_state_dict(remote.state_dict())
    for one, optimizer in ((model, remote), (local_model, local)):
        _train(one, optimizer, range(10, 11))
        optimizer.load_state_dict(copy.deepcopy(saved.optimizer))
        _train(one, optimizer, range(11, 13))
    for one, other in zip(model.parameters(), local_model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_part_of_a_module_that_is_loaded_after_attach(server: RunningServer, model_name: str) -> None:
    """What was written since attach is as written; the rest as the script had it before."""
    saved = _checkpoint(server, model_name, adagrad, "ahead")
    model: Any = Normed(seed=5)
    own = copy.deepcopy(model.state_dict())
    remote = server.connect(model_name, "again").attach(_made(adagrad, model), module=model)
    part = {name: value for name, value in saved.module.items() if name.startswith("hidden.")}
    model.load_state_dict(part, strict=False)
    with pytest.warns(RuntimeWarning, match="has gone back"):
        remote.load_state_dict(saved.optimizer)
    for name, parameter in model.named_parameters():
        expected = part.get(name, own[name])
        assert torch.equal(parameter, expected), name


def test_a_loaded_group_holds_what_was_saved(server: RunningServer, model_name: str) -> None:
    """As torch has it: a number where a number was saved, whatever stands there by now."""
    for stepped in (False, True):
        model = Network()
        remote = server.connect(f"{model_name}-{stepped}").attach(adagrad(model), module=model)
        saved = copy.deepcopy(remote.state_dict())
        remote.param_groups[0]["lr"] = torch.tensor(0.4)
        if stepped:
            _train(model, remote, range(1))
        remote.load_state_dict(saved)
        lr = remote.param_groups[0]["lr"]
        assert (type(lr), lr) == (float, 0.1), "0.1 of float32 is another number"
        assert remote.state_dict()["param_groups"][0]["lr"] == 0.1


def test_groups_that_were_edited_since_are_as_saved(server: RunningServer, model_name: str) -> None:
    """Of a state_dict that is loaded at once, and of one that is gone back to: keys that were added since go, too."""
    for moved_on in (False, True):
        session = server.connect(f"{model_name}-{moved_on}")
        sides: list[tuple[Any, Any]] = []
        for make in (lambda o, m: session.attach(o, module=m), lambda o, _: o):  # noqa: B023
            model: Any = Network()
            sides.append((model, make(adagrad(model), model)))
        ends = []
        for model, optimizer in sides:
            _train(model, optimizer, range(2))
            saved = copy.deepcopy(optimizer.state_dict())
            torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=10.0, total_steps=10, cycle_momentum=False)
            optimizer.param_groups[0].update(eps=1e-3, weight_decay=0.1, colour="red")
            if moved_on:
                _train(model, optimizer, range(2, 3))
            optimizer.load_state_dict(saved)
            group = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "fused")}
            _train(model, optimizer, range(3, 5))
            ends.append((group, [p.detach().clone() for p in model.parameters()]))
        assert ends[0][0] == ends[1][0]
        for one, other in zip(ends[0][1], ends[1][1], strict=True):
            assert torch.equal(one, other)
