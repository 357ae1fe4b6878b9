"""skorch as it is: an optimizer that is made by a function, epochs, parameters saved and gone back to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pushstep.optim import Adagrad
from tests.support.servers.harness import RunningServer

Make = Callable[..., torch.optim.Optimizer]


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 5)
        self.out = nn.Linear(5, 1)

    def forward(self, numbers: torch.Tensor) -> Any:
        return self.out(torch.tanh(self.hidden(numbers)))


def data() -> tuple[Any, Any]:
    chance = np.random.default_rng(0)
    numbers = chance.normal(size=(40, 4)).astype(np.float32)
    return numbers, numbers.sum(1, keepdims=True)


def net_of(optimizer: Make) -> Any:
    from skorch import (
        NeuralNetRegressor,  # takes a second, which a process that only collects the tests need not pay
    )

    torch.manual_seed(0)
    return NeuralNetRegressor(
        Regression, optimizer=optimizer, lr=0.1, max_epochs=3, batch_size=8, train_split=None, verbose=0
    ).initialize()


def losses_of(net: Any) -> list[float]:
    return list(net.history[:, "train_loss"])


def test_its_losses_are_those_of_a_local_run(server: RunningServer, model_name: str, tmp_path: Path) -> None:
    """Also when it goes back to parameters that it has saved: the server, which is ahead, goes back with it."""

    def attached(params: Any, **options: Any) -> torch.optim.Optimizer:
        return server.connect(model_name).attach(torch.optim.Adagrad(params, **options))

    told = []
    for name, make in (("remote", attached), ("local", Adagrad)):
        files = {f"f_{part}": tmp_path / f"{name}-{part}" for part in ("params", "optimizer", "history")}
        net = net_of(make)
        net.partial_fit(*data())
        net.save_params(**files)
        net.partial_fit(*data())
        ahead = losses_of(net)
        net.load_params(**files)
        net.partial_fit(*data())
        assert losses_of(net) == ahead, name
        told.append((ahead, [parameter.tolist() for parameter in net.module_.parameters()]))
    assert told[0] == told[1]
