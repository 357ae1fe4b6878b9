"""A trainer for a process of its own; in a module that a spawned process finds too."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from pushstep.client import RemoteOptimizer, connect
from pushstep.proto.errors import ForkedSession
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import adagrad, backward

# what the parent has and a forked child inherits
held: list[RemoteOptimizer] = []


def train(address: str, model_name: str, number: int, model: torch.nn.Module, results: Any) -> None:
    """A trainer with a session of its own, in a process that was forked from one that has a session too."""
    warnings.simplefilter("error")
    try:
        if held:
            with pytest.raises(ForkedSession):
                held[0].step()
        model = Network()
        with connect(address, model=model_name, worker=f"child{number}", retry_for_s=20) as session:
            remote = session.attach(adagrad(model), module=model)
            for seed in range(5):
                backward(model, [remote], seed)
                remote.step()
            results.put((number, remote.last_receipt.sequence if remote.last_receipt else 0))
    except BaseException as error:
        results.put((number, repr(error)))
        raise
