"""Twins whose gradients leave while backward still runs: what the tests of overlap train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pushstep.client import RemoteOptimizer
from pushstep.client.worker.early_push import EarlyPush
from tests.support.servers.harness import RunningServer
from tests.support.trainings.twins import Twins


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


def let_it_leave(optimizer: torch.optim.Optimizer) -> None:
    """Wait until everything handed on has been read: a change that comes sooner may still be sent in time."""
    watcher = optimizer._overlap if isinstance(optimizer, RemoteOptimizer) else None
    if watcher is not None and watcher._early is not None:
        assert watcher._early.seal() is not None


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    deep_loss(model, seed).backward()
    let_it_leave(optimizer)


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
