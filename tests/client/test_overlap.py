"""Overlap changes when bytes leave, and nothing else: every step is the local optimizer's, bit for bit."""

from __future__ import annotations

import copy
import signal
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import create, grads
from harness import RunningServer, running_server, start_server, wait_until
from operators import restore, show_model, take_snapshot
from proxy import Proxy
from torch import Tensor, nn
from twin import Network, Twins, adadelta, adagrad

from pushstep.client import Outcome, RemoteOptimizer, connect, overlap
from pushstep.client.early_push import EarlyPush
from pushstep.optim import Adagrad
from pushstep.proto.errors import OverBudget, SessionClosed

RULES = pytest.mark.parametrize("make", [adadelta, adagrad])


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets that these small models fill."""
    monkeypatch.setattr(overlap, "BUCKET_BYTES", 16)


class Deep(nn.Module):
    """Linear layers, of which two share a weight and one is never used."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.layers[3].weight = self.layers[1].weight
        self.unused = nn.Linear(4, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def deep_loss(model: nn.Module, seed: int, scale: float = 1.0) -> Tensor:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    return model(x).square().mean() * scale


def twins_of(server: RunningServer, name: str, model: nn.Module, make: Any, **options: Any) -> Twins:
    return Twins(server.connect(name, shared_memory=False, **options), model, make, overlap=True)


def both_sides(twins: Twins) -> list[tuple[nn.Module, list[torch.optim.Optimizer]]]:
    return [(twins.model, [twins.remote]), (twins.local_model, list(twins.local))]


def step_all(twins: Twins) -> None:
    for _, optimizers in both_sides(twins):
        for optimizer in optimizers:
            optimizer.step()
    twins.check()


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


def let_it_leave(optimizer: torch.optim.Optimizer) -> None:
    """Wait until everything handed on has been read: a change that comes sooner may still be sent in time."""
    watcher = optimizer._overlap if isinstance(optimizer, RemoteOptimizer) else None
    if watcher is not None and watcher._early is not None:
        assert watcher._early.seal() is not None


def _plain(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    deep_loss(model, seed).backward()
    let_it_leave(optimizer)


def _clipped(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    _plain(model, optimizer, seed)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-5)


def _clamped_data(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """A write that torch's version counter does not see."""
    _plain(model, optimizer, seed)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.data.clamp_(-1e-6, 1e-6)


def _one_element(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    _plain(model, optimizer, seed)
    gradient = model.layers[4].bias.grad  # type: ignore[union-attr,index]
    gradient.numpy()[2] += 1


def _replaced(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    _plain(model, optimizer, seed)
    layer = model.layers[0]  # type: ignore[index]
    layer.bias.grad = torch.ones(4)


def _removed(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    _plain(model, optimizer, seed)
    model.layers[2].bias.grad = None  # type: ignore[union-attr,index]


def _added(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    _plain(model, optimizer, seed)
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
    _plain(model, optimizer, seed)
    _plain(model, optimizer, seed + 100)


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
    _plain(model, optimizer, seed)


def _scaled(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """What a GradScaler does: unscale_ does not count as a write either."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    scaler.scale(deep_loss(model, seed)).backward()
    let_it_leave(optimizer)
    scaler.unscale_(optimizer)


ALWAYS_USED = [
    _plain, _accumulated, _accumulated_over_steps, _zeroed, _zeroed_in_place, _zeroed_by_the_module, _two_losses,
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
    assert all(one.filename == __file__ for one in caught if "overlap is off" in str(one.message))
    assert twins.remote.overlapped_steps == 0
    twins.check_state()
    assert twins.remote.last_receipt is not None and twins.remote.last_receipt.version == 7


def test_changes_now_and_then_do_not_turn_it_off(server: RunningServer, model_name: str) -> None:
    twins = twins_of(server, model_name, Deep(), adagrad)
    for seed in range(24):
        change = [_clipped, _plain, _replaced, _plain, _removed, _plain, _plain, _by_hand][seed % 8]
        for model, optimizers in both_sides(twins):
            change(model, optimizers[0], seed)
        step_all(twins)
    assert twins.remote.overlapped_steps >= 3
    twins.check_state()


# --- what happens to the stream while backward still runs


def half_way(model: nn.Module, seed: int, then: Callable[[], None]) -> Tensor:
    """The loss, whose backward calls `then` when half of the layers have their gradients."""
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    for number, layer in enumerate(model.layers):  # type: ignore[arg-type]
        hidden = torch.tanh(layer(hidden))
        if number == 1:

            def call(_: Tensor) -> None:
                then()

            hidden.register_hook(call)
    return hidden.square().mean()


def early_of(remote: RemoteOptimizer) -> EarlyPush:
    assert remote._overlap is not None
    early = remote._overlap._early
    assert early is not None, "the stream must be open by now"
    return early


def trained(twins: Twins, seed: int, then: Callable[[], None] = lambda: None) -> None:
    """Gradients of batch `seed` on both sides; on the remote one `then` happens half way."""
    for model, optimizers in both_sides(twins):
        optimizers[0].zero_grad()
        half_way(model, seed, then if model is twins.model else lambda: None).backward()


def warmed(twins: Twins) -> Twins:
    """Two steps, so that the next one's gradients leave early."""
    for seed in range(2):
        trained(twins, seed)
        step_all(twins)
    assert twins.remote.overlapped_steps == 1
    return twins


def test_a_stream_that_stalls_is_forgotten_and_sent_again(data: Path) -> None:
    with running_server(data, "--stall-s", "0.3") as server:
        twins = warmed(twins_of(server, "m", Deep(), adagrad))
        trained(twins, 2, lambda: wait_until(early_of(twins.remote)._sealed.is_set))
        step_all(twins)
        assert twins.remote.overlapped_steps == 1
        trained(twins, 3)
        step_all(twins)
        assert twins.remote.overlapped_steps == 2
        twins.check_state()


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_cut_in_the_middle_of_an_early_stream(
    server: RunningServer, model_name: str, direction: str
) -> None:
    with Proxy(server.grpc) as proxy:
        twins = warmed(twins_of(server, model_name, Deep(), adagrad, address=proxy.address))

        def cut() -> None:
            early = early_of(twins.remote)
            proxy.hold(direction)  # type: ignore[arg-type]
            proxy.cut()
            proxy.release()
            wait_until(early._sealed.is_set)

        for seed in range(2, 4):
            trained(twins, seed, cut)
            step_all(twins)
        trained(twins, 4)
        step_all(twins)
        assert twins.remote.overlapped_steps == 2
        twins.check_state()
        twins.remote._session.close()


def test_a_lost_reply_to_the_commit(server: RunningServer, model_name: str) -> None:
    """The retry is plain, under the same identity and digest: it is answered with the first receipt."""
    with Proxy(server.grpc) as proxy, ThreadPoolExecutor(1) as pool:
        twins = warmed(twins_of(server, model_name, Deep(), adagrad, address=proxy.address))
        trained(twins, 2)
        let_it_leave(twins.remote)
        proxy.hold("down")
        stepping = pool.submit(twins.remote.step)
        wait_until(lambda: show_model(server, model_name)["version"] == 3)
        proxy.cut()
        proxy.release()
        stepping.result(30)
        twins.local[0].step()
        twins.check_state()
        receipt = twins.remote.last_receipt
        assert receipt is not None
        assert (receipt.outcome, receipt.version, receipt.duplicates) == (Outcome.APPLIED, 3, 1)
        assert twins.remote.overlapped_steps == 2
        twins.remote._session.close()


@pytest.mark.parametrize("how", ["restore", "kill"])
def test_a_timeline_that_ends_in_the_middle_of_an_early_stream(data: Path, how: str) -> None:
    server = start_server(data)
    twins = warmed(
        Twins(
            connect(server.grpc, model="m", worker="w0", retry_for_s=30.0, shared_memory=False),
            Deep(),
            adagrad,
            overlap=True,
        )
    )
    snapshot = take_snapshot(server, "m")["id"]
    kept = copy.deepcopy((twins.local_model.state_dict(), twins.local[0].state_dict()))
    trained(twins, 2)
    step_all(twins)

    def end() -> None:
        nonlocal server
        early = early_of(twins.remote)
        if how == "restore":
            restore(server, "m", snapshot)
        else:
            server.stop(signal.SIGKILL)
            server = start_server(data, "--grpc", server.grpc)
            wait_until(early._sealed.is_set)

    trained(twins, 3, end)
    with pytest.warns(RuntimeWarning, match="restored to version 2"):
        twins.remote.step()
    assert twins.remote.last_receipt is not None
    assert twins.remote.last_receipt.outcome is Outcome.SUPERSEDED
    twins.local_model.load_state_dict(kept[0])
    twins.local[0].load_state_dict(kept[1])
    twins.check()
    for seed in range(4, 7):
        trained(twins, seed)
        step_all(twins)
    assert twins.remote.overlapped_steps >= 3
    twins.check_state()
    twins.remote._session.close()
    assert server.stop() == 0


@pytest.mark.parametrize("how", ["close", "raise"])
def test_what_was_set_aside_for_an_early_stream_is_given_back(data: Path, how: str) -> None:
    """Closed or broken off in the middle of backward: the others go on, and no thread stays."""
    elements = sum(parameter.numel() for parameter in Deep().parameters())
    budget = 6 * elements  # one push and a half
    with running_server(data, "--staging-bytes", str(budget), "--stall-s", "12") as server:
        other = server.connect("other", retry_for_s=0.5)
        create(other, elements)
        threads = set(threading.enumerate())
        twins = warmed(twins_of(server, "m", Deep(), adagrad))
        session = twins.remote._session

        def refused() -> bool:
            try:
                other.push(grads(0, elements))
            except OverBudget:
                return True
            return False

        def end() -> None:
            early_of(twins.remote)
            wait_until(refused)
            if how == "raise":
                raise FloatingPointError("half way")
            session.close()

        if how == "close":
            trained(twins, 2, end)
            with pytest.raises(SessionClosed):
                twins.remote.step()
        else:
            with pytest.raises(FloatingPointError):
                trained(twins, 2, end)
            twins.remote.zero_grad()
        wait_until(lambda: not refused())
        if how == "raise":
            trained(twins, 3)
            step_all(twins)
            twins.check_state()
            session.close()
        wait_until(lambda: set(threading.enumerate()) <= threads)


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
