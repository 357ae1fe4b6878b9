"""Keras's `fit` with a server's updates: the losses of its own optimizer, and what an operator does meanwhile."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pushstep.proto.errors import LocalParameterEdit, UnsupportedModule
from tests.support.numbers.optimizer_peers import keras
from tests.support.ranks.group import running_ranks
from tests.support.servers.harness import RunningServer
from tests.support.servers.operators import patch_group

# behind that of the peers, which has Keras imported on torch
keras_client = importlib.import_module("pushstep.client.keras")
attach, names_of = keras_client.attach, keras_client.names_of
# Keras's own variables, as numpy sees them
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)
Make = Callable[[], Any]
optimizers = keras.optimizers
_made = np.random.default_rng(0)
X = _made.normal(size=(64, 6)).astype(np.float32)
Y = X @ _made.normal(size=(6, 1)).astype(np.float32)
# One unit in the last place of a weight a step or so: the server's kernel rounds once where torch's operations, which Keras
# calls one after the other, round several times.
CLOSE = 1e-6


def network() -> Any:
    keras.utils.set_random_seed(1)
    layers = keras.layers
    frozen = layers.Dense(6, trainable=False)
    return keras.Sequential(
        [
            keras.Input((6,)),
            frozen,
            layers.Dense(8, activation="tanh"),
            layers.BatchNormalization(),
            layers.Dense(1),
        ]
    )


def fitted(
    optimizer: Any, *callbacks: Any, epochs: int = 3, loss: str = "mse"
) -> tuple[Any, list[float], list[Any]]:
    model = network()
    model.compile(optimizer=optimizer, loss=loss)
    done = model.fit(X, Y, epochs=epochs, batch_size=16, verbose=0, shuffle=False, callbacks=list(callbacks))
    return model, done.history["loss"], model.get_weights()


def same(one: tuple[Any, list[float], list[Any]], other: tuple[Any, list[float], list[Any]]) -> None:
    np.testing.assert_allclose(one[1], other[1], rtol=1e-5)
    for a, b in zip(one[2], other[2], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=CLOSE)


def excluding() -> Any:
    made = optimizers.Adagrad(0.05, weight_decay=0.5)
    made.exclude_from_weight_decay(var_names=["bias", "gamma"])
    return made


MAKES: dict[str, Make] = {
    "Adagrad": lambda: optimizers.Adagrad(0.05, initial_accumulator_value=0.3, epsilon=1e-4),
    "Adadelta": lambda: optimizers.Adadelta(0.7, rho=0.8),
    "weight decay": lambda: optimizers.Adagrad(0.05, weight_decay=0.01),
    "weight decay of some": excluding,
    "clipnorm": lambda: optimizers.Adadelta(0.7, clipnorm=0.1),
    "clipvalue": lambda: optimizers.Adagrad(0.05, clipvalue=0.1),
    "global_clipnorm": lambda: optimizers.Adadelta(0.7, global_clipnorm=0.1),
    "accumulation": lambda: optimizers.Adagrad(0.05, gradient_accumulation_steps=2),
    "loss scale": lambda: optimizers.Adagrad(0.05, loss_scale_factor=8.0),
    "a schedule": lambda: optimizers.Adagrad(optimizers.schedules.ExponentialDecay(0.1, 3, 0.9)),
    "a callable": lambda: optimizers.Adagrad(lambda: 0.02),
}


@pytest.mark.parametrize("make", MAKES)
def test_it_trains_as_keras_does(server: RunningServer, model_name: str, make: str) -> None:
    local = fitted(MAKES[make]())
    optimizer = attach(server.connect(model_name), MAKES[make]())
    remote = fitted(optimizer)
    same(remote, local)
    assert optimizer.iterations == local[0].optimizer.iterations
    assert float(optimizer.learning_rate) == pytest.approx(float(local[0].optimizer.learning_rate))
    assert optimizer.last_receipt.version == (6 if make == "accumulation" else 12)


def test_it_trains_in_two_ranks_as_on_one_server(
    server: RunningServer, model_name: str, tmp_path: Path
) -> None:
    with running_ranks(tmp_path, 2) as ranks:
        for make in ("Adagrad", "Adadelta", "weight decay of some", "a schedule"):
            model = f"{model_name}-{make.replace(' ', '-')}"
            found = [fitted(attach(of.connect(model), MAKES[make]())) for of in (ranks.leader, server)]
            assert found[0][1] == found[1][1], make
            assert all(map(np.array_equal, found[0][2], found[1][2])), make


CALLBACKS: dict[str, Callable[[], Any]] = {
    "LearningRateScheduler": lambda: keras.callbacks.LearningRateScheduler(lambda epoch, lr: lr * 0.5),
    "ReduceLROnPlateau": lambda: keras.callbacks.ReduceLROnPlateau(
        "loss", factor=0.1, patience=1, min_delta=1e9
    ),
}


@pytest.mark.parametrize("callback", CALLBACKS)
def test_callbacks_set_the_learning_rate(server: RunningServer, model_name: str, callback: str) -> None:
    make = MAKES["Adagrad"]
    local = fitted(make(), CALLBACKS[callback](), epochs=5)
    optimizer = attach(server.connect(model_name), make())
    same(fitted(optimizer, CALLBACKS[callback](), epochs=5), local)
    assert float(optimizer.learning_rate) == float(local[0].optimizer.learning_rate) != np.float32(0.05)


def test_an_operators_learning_rate_shows_in_keras_and_stays(server: RunningServer, model_name: str) -> None:
    optimizer = attach(server.connect(model_name), MAKES["Adagrad"]())
    model, *_ = fitted(optimizer)
    patch_group(server, model_name, 0, lr=0.001)
    for _ in range(2):
        model.fit(X, Y, batch_size=64, verbose=0)
        assert optimizer.last_receipt.effective_lr == [0.001]
    assert float(optimizer.learning_rate) == np.float32(0.001)
    optimizer.learning_rate = 0.25
    with pytest.warns(RuntimeWarning, match="an operator or a hook holds them"):
        model.fit(X, Y, batch_size=64, verbose=0)
    assert optimizer.last_receipt.effective_lr == [0.001]
    assert float(optimizer.learning_rate) == np.float32(0.001)


def test_a_second_worker_takes_what_is_there(server: RunningServer, model_name: str) -> None:
    """Keras has numbered the second network's layers on: the server's names are those of the first."""
    first, *_ = fitted(attach(server.connect(model_name, "a"), MAKES["Adagrad"]()))
    other = network()
    other.set_weights([weight * 0 for weight in other.get_weights()])
    optimizer = attach(server.connect(model_name, "b"), MAKES["Adagrad"]())
    optimizer.build(other.trainable_variables)
    for theirs, ours in zip(first.trainable_variables, other.trainable_variables, strict=True):
        np.testing.assert_array_equal(theirs.numpy(), ours.numpy())
    assert int(optimizer.iterations.numpy()) == 12
    assert [variable.path for variable in other.trainable_variables] != names_of(other.trainable_variables)
    shown = server.rest("GET", f"/v1/models/{model_name}/parameters").json()["parameters"]
    assert sorted(each["name"] for each in shown) == sorted(names_of(other.trainable_variables))


def test_mixed_precision_scales_its_loss(server: RunningServer, model_name: str) -> None:
    def scaled(optimizer: Any) -> Any:
        return optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0)

    same(
        fitted(scaled(attach(server.connect(model_name), MAKES["Adagrad"]()))),
        fitted(scaled(MAKES["Adagrad"]())),
    )


def test_a_saved_model_has_the_local_optimizer(
    server: RunningServer, model_name: str, tmp_path: Path
) -> None:
    optimizer = attach(server.connect(model_name), MAKES["Adadelta"]())
    model, _, weights = fitted(optimizer)
    optimizer.learning_rate = 0.125
    model.save(tmp_path / "m.keras")
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert isinstance(loaded.optimizer, optimizers.Adadelta)
    assert (float(loaded.optimizer.learning_rate), loaded.optimizer.rho) == (0.125, 0.8)
    for one, other in zip(weights, loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_loaded_model_goes_on_where_it_was(server: RunningServer, model_name: str, tmp_path: Path) -> None:
    """Its variables have other paths than they had, and its optimizer is made, but has not stepped."""
    local, losses, _ = fitted(MAKES["Adagrad"](), epochs=4)
    with server.connect(model_name) as session:
        model, *_ = fitted(attach(session, MAKES["Adagrad"]()))
        model.save(tmp_path / "m.keras")
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert [each.path for each in loaded.trainable_variables] != [
        each.path for each in model.trainable_variables
    ]
    optimizer = attach(server.connect(model_name), loaded.optimizer)
    loaded.compile(optimizer=optimizer, loss="mse")
    loss = loaded.fit(X, Y, batch_size=16, verbose=0, shuffle=False).history["loss"]
    same((loaded, loss, loaded.get_weights()), (local, losses[3:], local.get_weights()))
    assert optimizer.last_receipt.version == 16


CONSTRAINED: dict[str, Callable[[], Any]] = {
    "non-negative": lambda: keras.constraints.NonNeg(),
    "of unit norm": lambda: keras.constraints.UnitNorm(),
}


@pytest.mark.parametrize("constraint", CONSTRAINED)
def test_a_constraint_needs_uploads(server: RunningServer, model_name: str, constraint: str) -> None:
    """Refused before a model is made: Keras writes to the variable after each update."""

    def constrained(optimizer: Any) -> tuple[Any, list[float], list[Any]]:
        keras.utils.set_random_seed(1)
        dense = keras.layers.Dense(1, kernel_constraint=CONSTRAINED[constraint]())
        model = keras.Sequential([keras.Input((6,)), dense])
        model.compile(optimizer=optimizer, loss="mse")
        done = model.fit(X, Y, batch_size=16, verbose=0, shuffle=False)
        return model, done.history["loss"], model.get_weights()

    make = MAKES["Adagrad"]
    with pytest.raises(UnsupportedModule, match=r'dense.*/kernel after each update.* edits="upload"'):
        constrained(attach(server.connect(model_name), make()))
    assert server.rest("GET", f"/v1/models/{model_name}").status_code == 404
    session = server.connect(model_name, "w1")
    same(constrained(attach(session, make(), edits="upload")), constrained(make()))


@pytest.mark.filterwarnings("ignore")  # the compiler warns of itself and of Keras
def test_a_compiled_step_is_refused_in_words(
    server: RunningServer, model_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what is traced is the same; the code that would be made of it takes 40 s to compile
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    model.compile(
        optimizer=attach(server.connect(model_name), MAKES["Adagrad"]()), loss="mse", jit_compile=True
    )
    with pytest.raises(UnsupportedModule, match="jit_compile=True compiles the update"):
        model.fit(X, Y, verbose=0)
    assert server.rest("GET", f"/v1/models/{model_name}").json()["version"] == 0


@pytest.mark.parametrize("edits", ["sample", "upload"])
def test_weights_that_are_loaded_are_seen(server: RunningServer, model_name: str, edits: Any) -> None:
    optimizer = attach(server.connect(model_name), MAKES["Adagrad"](), edits=edits)
    model, _, weights = fitted(optimizer)
    model.set_weights([weight + 1 for weight in weights])
    if edits == "sample":
        with pytest.raises(LocalParameterEdit):
            model.fit(X, Y, verbose=0)
        model.set_weights(weights)
    model.fit(X, Y, batch_size=64, verbose=0)
    assert optimizer.last_receipt.version == 13 + (edits == "upload")


def stepped() -> Any:
    return fitted(optimizers.Adagrad(), epochs=1)[0].optimizer


class Mine(optimizers.Adagrad):
    """Steps in a way of its own, perhaps."""


REFUSED: dict[str, tuple[Make, str]] = {
    "another rule": (lambda: optimizers.Adam(), "Adam is not a rule"),
    "no optimizer": (lambda: "adagrad", "str is not a rule"),
    "a subclass": (lambda: Mine(), "Mine is not a rule"),
    "averages": (lambda: optimizers.Adagrad(use_ema=True), "ema hook"),
    "state": (stepped, "attach a new one"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused(server: RunningServer, model_name: str, what: str) -> None:
    make, says = REFUSED[what]
    with pytest.raises(UnsupportedModule, match=says):
        attach(server.connect(model_name), make())
    with pytest.raises(UnsupportedModule, match="before the first update"):
        _ = attach(server.connect(model_name), MAKES["Adagrad"]()).remote
