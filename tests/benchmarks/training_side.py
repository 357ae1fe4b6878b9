"""A worker that trains: a model of four square layers, whose step hides its way to the server, or sends less."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pushstep.client import connect

LAYERS = 4
BATCH = 128


@dataclass(frozen=True)
class How:
    """How a training worker's steps reach the server over TCP."""

    name: str
    wire: Any = None
    top_k: float | None = None
    overlap: bool = False
    prefetch: bool = False


HOWS = [
    How("plain"),
    How("overlap", overlap=True),
    How("prefetch", prefetch=True),
    How("top_k 0.01", top_k=0.01),
    How("int8", wire=("int8", torch.bfloat16)),
    How("bfloat16", wire=torch.bfloat16),
    How("bfloat16, overlap", wire=torch.bfloat16, overlap=True),
    How("bfloat16, prefetch", wire=torch.bfloat16, prefetch=True),
]


def module_of(elements: int) -> torch.nn.Module:
    """Layers of about so many elements together."""
    torch.manual_seed(0)
    width = round(math.sqrt(elements / LAYERS))
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(LAYERS)]
    return torch.nn.Sequential(*(part for layer in layers for part in (layer, torch.nn.Tanh())))


class Trainer:
    """Forward, backward and step, of which the step is remote or not."""

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._module = module
        self._optimizer = optimizer
        width = next(module.parameters()).shape[1]
        self._batch = torch.randn(BATCH, width)

    def train(self) -> None:
        """One step."""
        self._optimizer.zero_grad()
        self._module(self._batch).square().mean().backward()
        self._optimizer.step()

    def compute(self) -> None:
        """The same without the step."""
        self._optimizer.zero_grad()
        self._module(self._batch).square().mean().backward()

    def close(self) -> None:
        """Nothing to give back."""


class RemoteTrainer(Trainer):
    """Its optimizer is the server's."""

    def __init__(self, address: str, how: How, model: str, elements: int) -> None:
        warnings.simplefilter("ignore")
        self._session = connect(
            address, model=model, worker="w0", wire=how.wire, top_k=how.top_k, shared_memory=False
        )
        module = module_of(elements)
        optimizer = torch.optim.Adagrad(module.parameters())
        remote = self._session.attach(optimizer, module=module, overlap=how.overlap, prefetch=how.prefetch)
        super().__init__(module, remote)

    def close(self) -> None:
        """Leave."""
        self._session.close()


def remote(address: str, how: How, model: str, elements: int) -> Sequence[Trainer]:
    """The crew of a remote side."""
    return [RemoteTrainer(address, how, model, elements)]


def local(elements: int) -> Sequence[Trainer]:
    """The crew that steps by itself."""
    module = module_of(elements)
    return [Trainer(module, torch.optim.Adagrad(module.parameters(), fused=True))]
