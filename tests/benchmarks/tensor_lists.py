"""Workers whose parameters are a list of tensors: many small ones, or a real model's shapes; local, or of this service."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from pushstep.client import connect

from .optim import resnet50
from .peer_local import Rule

RETRY_FOR_S = 60.0
Shapes = Sequence[tuple[int, ...]]


def bert_base() -> list[tuple[int, ...]]:
    """The shapes of bert-base-uncased, in its order."""
    width, inner = 768, 3072
    norm: list[tuple[int, ...]] = [(width,), (width,)]
    square: list[tuple[int, ...]] = [(width, width), (width,)]
    layer = [*square * 3, *square, *norm, (inner, width), (inner,), (width, inner), (width,), *norm]
    return [(30522, width), (512, width), (2, width), *norm, *layer * 12, *square]


LISTS: dict[str, Shapes] = {
    "1,000 of 8": [(8,)] * 1_000,
    "20,000 of 8": [(8,)] * 20_000,
    "ResNet-50": resnet50(),
    "BERT-base": bert_base(),
}


class Steps:
    """An optimizer over such a list."""

    def __init__(self, tensors: list[torch.nn.Parameter], optimizer: Any) -> None:
        self._tensors = tensors
        self._optimizer = optimizer
        self._gradients = [torch.randn_like(tensor) for tensor in tensors]

    def step(self) -> None:
        """zero_grad, gradients that are there already, and the step."""
        self._optimizer.zero_grad()
        for tensor, gradient in zip(self._tensors, self._gradients, strict=True):
            tensor.grad = gradient
        self._optimizer.step()

    def iteration(self) -> None:
        """zero_grad, what backward does with the gradients at its end, and the step."""
        self._optimizer.zero_grad()
        torch.autograd.backward(self._tensors, self._gradients)
        self._optimizer.step()


def tensors_of(name: str) -> list[torch.nn.Parameter]:
    """The parameters of a list."""
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in LISTS[name]]


class LocalSteps(Steps):
    """torch's foreach step."""

    def __init__(self, name: str, rule: Rule) -> None:
        tensors = tensors_of(name)
        kind = {"adadelta": torch.optim.Adadelta, "adagrad": torch.optim.Adagrad}[rule]
        super().__init__(tensors, kind(tensors, foreach=True))

    def close(self) -> None:
        """Nothing to give back."""


class RemoteSteps(Steps):
    """This service's."""

    def __init__(self, address: str, model: str, worker: int, name: str, rule: Rule, shared: bool) -> None:
        warnings.simplefilter("ignore")
        self._session = connect(
            address, model=model, worker=f"w{worker}", shared_memory=shared, retry_for_s=RETRY_FOR_S
        )
        tensors = tensors_of(name)
        kind = {"adadelta": torch.optim.Adadelta, "adagrad": torch.optim.Adagrad}[rule]
        super().__init__(tensors, self._session.attach(kind(tensors)))

    def close(self) -> None:
        """Leave."""
        self._session.close()


def local(name: str, rule: Rule) -> Sequence[LocalSteps]:
    """One worker."""
    return [LocalSteps(name, rule)]


def remote(
    address: str, model: str, first: int, count: int, name: str, rule: Rule, shared: bool
) -> Sequence[RemoteSteps]:
    """Workers of one model."""
    return [RemoteSteps(address, model, first + number, name, rule, shared) for number in range(count)]
