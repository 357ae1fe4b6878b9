"""The same training twice: through a server and with pushstep.optim here, on the same data, compared bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from pushstep.client import RemoteOptimizer, Session
from tests.support.trainings.bits import check_state_dict
from tests.support.trainings.local_training import LocalTraining
from tests.support.trainings.optimizers import Make, backward


class Twins:
    """A remote optimizer and the local training that it must equal."""

    def __init__(self, session: Session, model: nn.Module, make: Make, **attach: Any) -> None:
        self.model = model
        self.beside = LocalTraining(copy.deepcopy(model), make)
        self.original = make(model)
        self.remote: RemoteOptimizer = session.attach(self.original, **{"module": model, **attach})

    @property
    def local_model(self) -> nn.Module:
        """The model of the training beside it."""
        return self.beside.model

    @property
    def local(self) -> list[torch.optim.Optimizer]:
        """The optimizers of the training beside it."""
        return self.beside.optimizers

    def step(self, *seeds: int) -> None:
        """One step of both on each batch, then compare."""
        for seed in seeds:
            backward(self.model, [self.remote], seed)
            backward(self.local_model, self.local, seed)
            self.remote.step()
            self.beside.step()
            self.check()

    def check(self) -> None:
        """Equal parameters, bit for bit."""
        theirs = dict(self.local_model.named_parameters())
        for name, parameter in self.model.named_parameters():
            assert torch.equal(parameter, theirs[name]), name

    def check_state(self) -> None:
        """Equal state_dicts, bit for bit."""
        self.check()
        got = self.remote.state_dict()
        expected = [optimizer.state_dict() for optimizer in self.local]
        for one, other in zip([got] if isinstance(got, dict) else got, expected, strict=True):
            check_state_dict(one, other)
