"""An attached optimizer to what looks at it: its class's name, its state, its words; and what is no optimizer."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from pushstep.client import RemoteOptimizer
from pushstep.optim import Adadelta
from pushstep.proto.errors import UnsupportedModule
from tests.support.servers.harness import RunningServer
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import adadelta, adagrad, both
from tests.support.trainings.twins import Twins


@pytest.mark.parametrize(("make", "name"), [(adadelta, "Adadelta"), (adagrad, "Adagrad"), (both, None)])
def test_it_has_the_name_of_what_was_attached(
    server: RunningServer, model_name: str, make: Any, name: str | None
) -> None:
    """What loggers make a column's name of: "lr-Adadelta" remotely as locally."""
    remote = Twins(server.connect(model_name), Network(), make).remote
    assert isinstance(remote, RemoteOptimizer)
    assert type(remote).__name__ == (name or "RemoteOptimizer")
    assert repr(remote).startswith("RemoteOptimizer of <Session 'w0'")


def test_its_state_says_where_it_is(server: RunningServer, model_name: str) -> None:
    twins = Twins(server.connect(model_name), Network(), adadelta)
    twins.step(0)
    state = twins.remote.state
    assert len(state) == 0 and list(state.items()) == []
    assert state.get(twins.model.out.weight, {}) == {}  # type: ignore[attr-defined]
    assert twins.model.out.weight not in state  # type: ignore[attr-defined]
    with pytest.raises(KeyError, match=r"on the server: state_dict\(\)\['state'\] fetches it"):
        state[twins.model.out.weight]["square_avg"]  # type: ignore[attr-defined]
    assert len(state) == 0
    assert "square_avg" in twins.remote.state_dict()["state"][0]
    twins.step(1)


def test_a_receipt_is_a_line(server: RunningServer, model_name: str) -> None:
    twins = Twins(server.connect(model_name), Network(), adagrad)
    twins.step(0)
    said = repr(twins.remote.last_receipt)
    assert len(said) < 160
    assert re.fullmatch(
        r"Receipt\(outcome='applied', version=1, staleness=0, gradient_norm=[\d.e-]+, worker='w0', epoch=1, sequence=1\)",
        said,
    )
    assert twins.remote.last_receipt is not None and twins.remote.last_receipt.effective_lr == [0.1]


class NoOptimizer:
    """Something else that steps."""


@pytest.mark.parametrize("wrong", [NoOptimizer(), None, "adagrad", [NoOptimizer()], {"lr": 1.0}])
def test_what_is_no_optimizer(server: RunningServer, model_name: str, wrong: Any) -> None:
    with pytest.raises(UnsupportedModule, match=r"is no torch optimizer: attach torch\.optim's or pushstep"):
        server.connect(model_name).attach(wrong)


def test_keras_s_own_optimizer(
    server: RunningServer, model_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    import keras

    for kind in (keras.optimizers.Adadelta, keras.optimizers.Adagrad):
        with pytest.raises(
            UnsupportedModule, match=rf"keras\.optimizers\.{kind.__name__} .*pushstep\.optim\.keras"
        ):
            server.connect(model_name).attach(kind())


def test_one_that_is_attached_already(server: RunningServer, model_name: str) -> None:
    parameter = nn.Parameter(torch.zeros(3))
    remote = server.connect(model_name).attach(Adadelta([parameter]))
    with pytest.raises(UnsupportedModule, match=r"RemoteOptimizer is not a rule .* attached already"):
        server.connect(f"{model_name}-2", "w1").attach(remote)
