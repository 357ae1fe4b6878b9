"""A model as the service should have it, kept beside it by local torch: the parameters, the optimizers, and each worker's own.

What a worker's gradients are computed on is its `view`: the values that came with its last step, and its own buffers. What it
writes to its parameters is its own until it is sent. Both are done to the worker's module and to its view alike, so that
whatever the service then does can be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pushstep.client import RemoteOptimizer, Session
from tests.support.workers.twin import Make, Network, loss_of


class Trainee(Network):
    """Network behind a frozen layer and a norm with statistics: parameters, frozen values and buffers."""

    def __init__(self, *, seed: int = 0, sparse: bool = False) -> None:
        super().__init__(seed=seed, sparse=sparse)
        self.norm = nn.BatchNorm1d(2, affine=False)
        torch.manual_seed(seed)
        self.fixed = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        """Network's, of numbers that went through both."""
        return super().forward(ids, self.norm(self.fixed(numbers)))

    def trained(self) -> nn.Module:
        """The part that is stepped, as a module of its own over the same parameters."""
        part = nn.Module()
        part.table, part.hidden, part.out = self.table, self.hidden, self.out
        return part


STEPPED = ("table.weight", "hidden.weight", "hidden.bias", "out.weight", "out.bias")


def optimizers_of(make: Make, model: Trainee) -> list[torch.optim.Optimizer]:
    made = make(model.trained())
    return [made] if isinstance(made, torch.optim.Optimizer) else list(made)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Of the stepped parameters, copies."""
    return {name: model.get_parameter(name).detach().clone() for name in STEPPED}


def extras_of(model: nn.Module) -> dict[str, Tensor]:
    """Of everything else, copies."""
    return {name: value.clone() for name, value in model.state_dict().items() if name not in STEPPED}


@torch.no_grad()
def write(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Have these values in a module."""
    state = model.state_dict()
    for name, value in values.items():
        state[name].copy_(value)


class Worker:
    """One worker: what it has, and what it should have."""

    def __init__(
        self,
        session: Session,
        module: Trainee,
        remote: RemoteOptimizer,
        edits: str,
        view: Trainee,
        make: Make,
    ) -> None:
        self.session = session
        # torch's optimizers over the view: whose groups its own should be
        self.shadows = optimizers_of(make, view)
        self.module = module
        self.remote = remote
        self.edits = edits
        self.view = view
        # what its parameters were when they came, and whose optimizer state is to begin anew
        self.came = values_of(view)
        self.fresh: set[str] = set()
        # what its module held before attach, until its first step
        self.before: dict[str, Tensor] = {}
        self.extras_came = extras_of(view)
        # what was written to since attach, if only with what it held
        self.written: set[str] = set()

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Its param groups, as they should be."""
        return [group for optimizer in self.shadows for group in optimizer.param_groups]

    @property
    def edited(self) -> list[str]:
        """The parameters that were written to since."""
        now = values_of(self.view)
        return [name for name in STEPPED if not torch.equal(now[name], self.came[name])]

    def both(self) -> Iterator[Trainee]:
        """Its module and the view, for what is done to either."""
        yield self.module
        yield self.view

    def backward(
        self, seed: int, scale: Callable[[Tensor], Tensor], scale_view: Callable[[Tensor], Tensor]
    ) -> None:
        """Add the gradients of a batch."""
        scale(loss_of(self.module, seed)).backward()
        scale_view(loss_of(self.view, seed)).backward()

    def came_with(self, values: dict[str, Tensor]) -> None:
        """A step has brought these."""
        write(self.view, values)
        self.came = values_of(self.view)
        self.fresh.clear()
        self.before = {}

    def go_back(self) -> None:
        """To what was before attach, but for what was written to since."""
        write(self.view, self._unwritten())

    def _unwritten(self) -> dict[str, Tensor]:
        now = extras_of(self.view)
        written = {name for name, value in self.extras_came.items() if not torch.equal(now[name], value)}
        kept = {*self.edited, *written, *self.written, *self.fresh}
        return {name: value for name, value in self.before.items() if name not in kept}

    def settle_extras(self) -> None:
        """The state that was loaded is the server's: buffers are as they were, or as before attach, all of them."""
        earlier = {name: value for name, value in self._unwritten().items() if name not in STEPPED}
        here = extras_of(self.module)
        if all(torch.equal(here[name], value) for name, value in earlier.items()):
            write(self.view, earlier)

    def check(self) -> None:
        """The module is what it should be, to the bit."""
        expected = self.view.state_dict()
        for name, value in self.module.state_dict().items():
            assert torch.equal(value, expected[name]), name
        for mine, theirs in zip(self.remote.param_groups, self.groups, strict=True):
            check_group(mine, theirs)


KEYS = ("lr", "eps", "rho", "lr_decay", "weight_decay", "maximize", "initial_lr")


def copy_group(source: dict[str, Any], target: dict[str, Any]) -> None:
    """Have one group the hyperparameters of another, in place where it holds a tensor.

    A tensor that is what a number becomes in its dtype says nothing of further digits: the number stays.
    """
    for key in KEYS[:-1]:
        value = source.get(key)
        if isinstance(value, Tensor):
            same = bool(value == torch.full_like(value, float(target[key])))
            value = target[key] if same else float(value)
        if value is not None and isinstance(target[key], Tensor):
            target[key].fill_(float(value))
        elif value is not None:
            target[key] = value


def check_group(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Equal hyperparameters, to the last digit of what holds them."""
    for key in KEYS:
        assert (key in mine) == (key in theirs), key
        if key in mine:
            assert float(mine[key]) == float(theirs[key]), key


class ParameterCache:
    """The server's model, as local torch has it."""

    def __init__(self, make: Make, start: Trainee) -> None:
        self.make = make
        self.model = copy.deepcopy(start)
        self.optimizers = optimizers_of(make, self.model)
        # buffers and frozen values that were sent last
        self.extras = extras_of(start)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The param groups, in the model's order."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def take_edits(self, worker: Worker, names: list[str]) -> None:
        """A worker has sent parameters, and some whose state begins anew."""
        write(self.model, {name: worker.view.get_parameter(name).detach() for name in names})
        for name in worker.fresh:
            self._begin_anew(self.model.get_parameter(name))
        worker.came.update({name: worker.view.get_parameter(name).detach().clone() for name in names})
        worker.fresh.clear()

    def _begin_anew(self, parameter: Tensor) -> None:
        for optimizer in self.optimizers:
            state = optimizer.state.get(parameter)
            if state and isinstance(optimizer, torch.optim.Adadelta):
                del optimizer.state[parameter]
            elif state:
                for value in state.values():
                    value.zero_()

    def settle_extras(self, lead: Worker) -> None:
        """The lead may have sent those that it has now, all of them."""
        held = lead.session._worker.membership.pull_extras()[1]
        now = extras_of(lead.view)
        if all(torch.equal(held[name], value) for name, value in now.items()):
            self.extras = now
        for name, value in self.extras.items():
            assert torch.equal(held[name], value), name

    def take_groups(self, lead: Worker) -> None:
        """The lead has sent its hyperparameters."""
        for mine, theirs in zip(self.groups, lead.groups, strict=True):
            copy_group(theirs, mine)

    def step(self, worker: Worker, step: Callable[[torch.optim.Optimizer], object]) -> None:
        """Step by a worker's gradients, which then has what came of it."""
        for name in STEPPED:
            self.model.get_parameter(name).grad = worker.view.get_parameter(name).grad
        for optimizer in self.optimizers:
            step(optimizer)
        worker.came_with(values_of(self.model))

    def load(self, saved: list[dict[str, Any]]) -> None:
        """Load the optimizers' state."""
        for optimizer, of_one in zip(self.optimizers, copy.deepcopy(saved), strict=True):
            optimizer.load_state_dict(of_one)

    def saved(self, lead: Worker) -> list[dict[str, Any]]:
        """The optimizers' state_dicts, with the hyperparameters that the lead has."""
        found = []
        for optimizer, shadow in zip(self.optimizers, lead.shadows, strict=True):
            state, groups = optimizer.state_dict(), shadow.state_dict()["param_groups"]
            found.append(copy.deepcopy({"state": state["state"], "param_groups": groups}))
        return found

    def check_state(self, got: Any, lead: Worker) -> None:
        """A state_dict, or a list of them, is the mirror's: state to the bit, hyperparameters to the last digit."""
        for one, other in zip([got] if isinstance(got, dict) else got, self.saved(lead), strict=True):
            mine, theirs = _stepped(one["state"]), _stepped(other["state"])
            assert mine.keys() == theirs.keys()
            for number, state in theirs.items():
                for name, value in state.items():
                    assert torch.equal(mine[number][name], value), (number, name)
            for of_one, of_other in zip(one["param_groups"], other["param_groups"], strict=True):
                check_group(of_one, of_other)


def _stepped(states: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """Of parameters that have been stepped: whether the others have an entry depends on what was tried."""
    return {number: state for number, state in states.items() if float(state["step"])}
