"""The model of a service as it should be, kept beside it by local torch: its parameters, its optimizers, its buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.trainings.expected_worker import ExpectedWorker
from tests.support.trainings.groups import check_group, copy_group
from tests.support.trainings.local_training import LocalTraining
from tests.support.trainings.optimizers import Make
from tests.support.trainings.trainee import STEPPED, Trainee, extras_of, values_of, write


class ExpectedModel(LocalTraining):
    """The server's model, as local torch has it."""

    def __init__(self, make: Make, start: Trainee) -> None:
        super().__init__(copy.deepcopy(start), lambda model: make(model.trained()))
        self.make = make
        # buffers and frozen values that were sent last
        self.extras = extras_of(start)

    def take_edits(self, worker: ExpectedWorker, names: list[str]) -> None:
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

    def settle_extras(self, lead: ExpectedWorker) -> None:
        """The lead may have sent those that it has now, all of them."""
        held = lead.session._worker.membership.pull_extras()[1]
        now = extras_of(lead.view)
        if all(torch.equal(held[name], value) for name, value in now.items()):
            self.extras = now
        for name, value in self.extras.items():
            assert torch.equal(held[name], value), name

    def take_groups(self, lead: ExpectedWorker) -> None:
        """The lead has sent its hyperparameters."""
        for mine, theirs in zip(self.groups, lead.groups, strict=True):
            copy_group(theirs, mine)

    def push(self, worker: ExpectedWorker, step: Callable[[torch.optim.Optimizer], object]) -> None:
        """Step by a worker's gradients, which then has what came of it."""
        for name in STEPPED:
            self.model.get_parameter(name).grad = worker.view.get_parameter(name).grad
        self.step(step)
        worker.came_with(values_of(self.model))

    def load(self, saved: list[dict[str, Any]]) -> None:
        """Load the optimizers' state."""
        for optimizer, of_one in zip(self.optimizers, copy.deepcopy(saved), strict=True):
            optimizer.load_state_dict(of_one)

    def saved(self, lead: ExpectedWorker) -> list[dict[str, Any]]:
        """The optimizers' state_dicts, with the hyperparameters that the lead has."""
        found = []
        for optimizer, shadow in zip(self.optimizers, lead.shadows, strict=True):
            state, groups = optimizer.state_dict(), shadow.state_dict()["param_groups"]
            found.append(copy.deepcopy({"state": state["state"], "param_groups": groups}))
        return found

    def check_state(self, got: Any, lead: ExpectedWorker) -> None:
        """A state_dict, or a list of them, is this model's: state to the bit, hyperparameters to the last digit."""
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
