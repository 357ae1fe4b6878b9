"""What a worker means to do once, however often it has to say so; and the model that shows how often it was done.

Each intent's gradient is a power of two at one element that belongs to its worker alone. Adagrad adds its square, a
power of four, to `sum`: the element's digits to base four say how often each intent was applied.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from pushstep.proto.types_pb2 import DType, Identity, Manifest, Parameter, ParamGroup
from pushstep.proto.wire.layout import Layout
from pushstep.server.staging.gradient import DensePart, StagedPush
from pushstep.server.staging.inspect import measured

WORKERS = 6
ELEMENTS_EACH = 8
# 4**11 is 2**22: what float32 adds without rounding
INTENTS_EACH = 11 * ELEMENTS_EACH
LAYOUT = Layout(
    Manifest(
        parameters=[
            Parameter(name="w", shape=[WORKERS * ELEMENTS_EACH], dtype=DType.DTYPE_FLOAT32, group=0),
            Parameter(name="b", shape=[2], dtype=DType.DTYPE_FLOAT32, group=1),
        ],
        groups=[ParamGroup(rule="adagrad"), ParamGroup(rule="adagrad")],
    )
)


@dataclass(eq=False)
class Intent:
    """One step of one worker."""

    worker: str
    number: int
    # has a gradient for b, too
    both: bool = False
    poison: bool = False
    skip: bool = False
    samples: float = 0.0
    # under which it was sent
    identities: list[Identity] = field(default_factory=list)
    # as far as its worker knows
    fate: str = "unknown"

    @property
    def element(self) -> int:
        """Where its gradient is."""
        return element_of(self.worker, self.number)

    @property
    def digest(self) -> int:
        """Of its body."""
        return zlib.crc32(f"{self.worker} {self.number} {self.poison} {self.skip}".encode())

    @property
    def value(self) -> float:
        """Its gradient there."""
        return math.nan if self.poison else 2.0 ** (self.number // ELEMENTS_EACH)

    def gradients(self) -> list[Tensor | None]:
        """By parameter, made anew."""
        return _gradients(self.element, self.value, self.both)

    def staged(self) -> StagedPush | None:
        """As the server has it when it is complete."""
        return None if self.skip else _staged(self.element, self.value, self.both)


def _gradients(element: int, value: float, both: bool) -> list[Tensor | None]:
    w = torch.zeros(WORKERS * ELEMENTS_EACH)
    w[element] = value
    return [w, torch.ones(2) if both else None]


@cache  # making and measuring one took a fifth of a run, and there are only so many; nobody may write to them
def _staged(element: int, value: float, both: bool) -> StagedPush:
    parts = [
        DensePart(slot.arena, slot.start, (slot,), gradient)
        for slot, gradient in zip(LAYOUT.slots, _gradients(element, value, both), strict=True)
        if gradient is not None
    ]
    return measured(parts)


def element_of(worker: str, number: int) -> int:
    """The element at which a worker's intent shows."""
    return int(worker[1:]) * ELEMENTS_EACH + number % ELEMENTS_EACH


def times_applied(sums: Tensor, intent: Intent) -> int:
    """How often an intent is in Adagrad's `sum`."""
    return int(sums[intent.element].item()) // 4 ** (intent.number // ELEMENTS_EACH) % 4


def weighted_sum(
    gradients: Sequence[Tensor | None], weights: Sequence[float], divisor: float
) -> Tensor | None:
    """In the order given, each product, sum and quotient rounded to float32."""
    total: Tensor | None = None
    for gradient, weight in zip(gradients, weights, strict=True):
        if gradient is not None:
            piece = gradient * torch.tensor(weight)
            total = piece if total is None else total + piece
    return None if total is None else total / torch.tensor(divisor)
