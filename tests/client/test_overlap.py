"""Overlap changes when bytes leave, and nothing else: every step is the local optimizer's, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pushstep.client import Outcome, RemoteOptimizer
from pushstep.client.optimizer import overlap
from pushstep.optim import Adagrad
from tests.support.servers.harness import RunningServer
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import adadelta, adagrad
from tests.support.trainings.overlapping import (
    Deep,
    both_sides,
    deep_loss,
    let_it_leave,
    plain,
    step_all,
    twins_of,
)

RULES = pytest.mark.parametrize("make", [adadelta, adagrad])


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets that these small models fill."""
    monkeypatch.setattr(overlap, "BUCKET_BYTES", 16)


@RULES
def test_twenty_steps_of_a_module_with_tied_and_unused_weights(
    server: RunningServer, model_name: str, make: Any
) -> None:
    twins = twins_of(server, model_name, Deep(), make)
    for seed in range(20):
        for model, optimizers in both_sides(twins):
            optimizers[0].zero_grad()
            deep_loss(model, seed).backward()
        step_all(twins)
    assert twins.remote.overlapped_steps == 19, "all but the first"
    twins.check_state()
    receipt = twins.remote.last_receipt
    assert receipt is not None
    assert (receipt.outcome, receipt.version, receipt.staleness) == (Outcome.APPLIED, 20, 0)


@RULES
def test_dense_and_sparse_gradients(server: RunningServer, model_name: str, make: Any) -> None:
    """A table's gradient may be either; the early ones were dense."""
    twins = twins_of(server, model_name, Network(sparse=False), make)
    for seed in range(20):
        for model, _ in both_sides(twins):
            model.table.sparse = 5 <= seed < 8 or seed % 7 == 0  # type: ignore[union-attr,assignment]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            twins.step(seed)
    assert 5 <= twins.remote.overlapped_steps < 15
    twins.check_state()


def test_hyperparameters_metrics_and_receipts_come_with_the_commit(
    server: RunningServer, model_name: str
) -> None:
    twins = twins_of(server, model_name, Deep(), adagrad)
    for seed in range(6):
        for model, optimizers in both_sides(twins):
            optimizers[0].zero_grad()
            deep_loss(model, seed).backward()
            optimizers[0].param_groups[0]["lr"] = 0.5 / (1 + seed)
        step_all(twins)
        assert twins.remote.last_receipt is not None
        assert twins.remote.last_receipt.groups[0]["lr"] == 0.5 / (1 + seed)
    assert twins.remote.overlapped_steps == 5
    # a closure's backward runs inside of step; its loss is the push's metric
    twins.remote.step(lambda: _closure(twins.remote, twins.model))
    assert twins.remote.overlapped_steps == 6
    worker = server.rest("GET", f"/v1/models/{model_name}/workers").json()["workers"][0]
    assert worker["metrics"]["loss"] > 0


def _closure(remote: RemoteOptimizer, model: nn.Module) -> float:
    remote.zero_grad()
    loss = deep_loss(model, 1)
    loss.backward()
    return loss.item()


# --- what happens to gradients after they left: each entry makes one step of a side's gradients


def _clipped(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    plain(model, optimizer, seed)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-5)


def _clamped_data(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """A write that torch's version counter does not see."""
    plain(model, optimizer, seed)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.data.clamp_(-1e-6, 1e-6)


def _one_element(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    plain(model, optimizer, seed)
    gradient = model.layers[4].bias.grad  # type: ignore[union-attr,index]
    gradient.numpy()[2] += 1


def _replaced(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    plain(model, optimizer, seed)
    layer = model.layers[0]  # type: ignore[index]
    layer.bias.grad = torch.ones(4)


def _removed(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    plain(model, optimizer, seed)
    model.layers[2].bias.grad = None  # type: ignore[union-attr,index]


def _added(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    plain(model, optimizer, seed)
    model.unused.bias.grad = torch.ones(4)  # type: ignore[union-attr]


def _by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1 * (seed + 1))


def _accumulated(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    for micro in range(3):
        deep_loss(model, 10 * seed + micro).backward()


def _accumulated_over_steps(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """No zero_grad at all."""
    deep_loss(model, seed).backward()


def _zeroed_by_the_module(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """The optimizer is not told, but learns that the second backward is the one that counts."""
    deep_loss(model, seed).backward()
    model.zero_grad()
    deep_loss(model, seed + 100).backward()


def _zeroed(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    plain(model, optimizer, seed)
    plain(model, optimizer, seed + 100)


def _zeroed_in_place(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad(set_to_none=False)
    deep_loss(model, seed).backward()


def _two_losses(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Disjoint parameters, one backward each."""
    optimizer.zero_grad()
    x = torch.ones(2, 4) + seed
    torch.tanh(model.layers[0](x)).sum().backward()  # type: ignore[index]
    torch.tanh(model.layers[4](x)).sum().backward()  # type: ignore[index]


def _broken_backward(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """It raises half way; the user goes on with another batch."""

    def fail(_: Tensor) -> None:
        raise FloatingPointError("half way")

    optimizer.zero_grad()
    hidden = model.layers[0](torch.ones(1, 4))  # type: ignore[index]
    hidden.register_hook(fail)
    for layer in model.layers[1:]:  # type: ignore[index]
        hidden = torch.tanh(layer(hidden))
    with pytest.raises(FloatingPointError):
        hidden.sum().backward()
    plain(model, optimizer, seed)


def _scaled(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """What a GradScaler does: unscale_ does not count as a write either."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    scaler.scale(deep_loss(model, seed)).backward()
    let_it_leave(optimizer)
    scaler.unscale_(optimizer)


ALWAYS_USED = [
    plain, _accumulated, _accumulated_over_steps, _zeroed, _zeroed_in_place, _zeroed_by_the_module, _two_losses,
    _broken_backward,
]  # fmt: skip
NEVER_USED = [_clipped, _clamped_data, _one_element, _replaced, _removed, _added, _by_hand, _scaled]
Gradients = Callable[[nn.Module, torch.optim.Optimizer, int], None]


@pytest.mark.parametrize("make_gradients", ALWAYS_USED, ids=lambda f: f.__name__[1:])
def test_what_is_expected_leaves_early(
    server: RunningServer, model_name: str, make_gradients: Gradients
) -> None:
    twins = twins_of(server, model_name, Deep(), adadelta)
    for seed in range(6):
        for model, optimizers in both_sides(twins):
            make_gradients(model, optimizers[0], seed)
        step_all(twins)
    assert twins.remote.overlapped_steps == 5
    twins.check_state()
    assert twins.remote.last_receipt is not None and twins.remote.last_receipt.version == 6


@pytest.mark.parametrize("make_gradients", NEVER_USED, ids=lambda f: f.__name__[1:])
def test_what_was_changed_is_sent_again_and_soon_nothing_leaves_early(
    server: RunningServer, model_name: str, make_gradients: Gradients
) -> None:
    twins = twins_of(server, model_name, Deep(), adagrad)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(7):
            for model, optimizers in both_sides(twins):
                make_gradients(model, optimizers[0], seed)
            step_all(twins)
    told = [str(one.message) for one in caught if "overlap is off" in str(one.message)]
    assert len(told) == (make_gradients not in (_by_hand, _removed, _added)), told
    assert all(
        one.filename == step_all.__code__.co_filename
        for one in caught
        if "overlap is off" in str(one.message)
    )
    assert twins.remote.overlapped_steps == 0
    twins.check_state()
    assert twins.remote.last_receipt is not None and twins.remote.last_receipt.version == 7


def test_changes_now_and_then_do_not_turn_it_off(server: RunningServer, model_name: str) -> None:
    twins = twins_of(server, model_name, Deep(), adagrad)
    for seed in range(24):
        change = [_clipped, plain, _replaced, plain, _removed, plain, plain, _by_hand][seed % 8]
        for model, optimizers in both_sides(twins):
            change(model, optimizers[0], seed)
        step_all(twins)
    assert twins.remote.overlapped_steps >= 3
    twins.check_state()


# --- what happens to the stream while backward still runs


def test_several_workers(server: RunningServer, model_name: str) -> None:
    """Each push counts once: gradients of ones, whose squares Adagrad adds up."""
    rounds, workers = 12, 3

    def work(number: int) -> list[int]:
        weights = nn.ParameterList(nn.Parameter(torch.zeros(8)) for _ in range(4))
        session = server.connect(model_name, f"w{number}", shared_memory=False)
        remote = session.attach(Adagrad(weights.parameters(), lr=0.5), module=weights, overlap=True)
        versions = []
        for _ in range(rounds):
            remote.zero_grad()
            torch.stack([weight.sum() for weight in weights]).sum().backward()
            remote.step()
            assert remote.last_receipt is not None
            versions.append(remote.last_receipt.version)
        assert remote.overlapped_steps == rounds - 1
        return versions

    with ThreadPoolExecutor(workers) as pool:
        versions = [v for found in pool.map(work, range(workers)) for v in found]
    assert sorted(versions) == list(range(1, rounds * workers + 1))
    pulled = server.connect(model_name, "reader").pull_state()
    for _, state, values in pulled.dense():
        if state == "sum":
            assert bool((values == rounds * workers).all())
