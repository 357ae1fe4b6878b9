"""What a worker means to do once, however often it has to say so; and the model that shows how often it was done.

Each intent's gradient is a power of two at one element that belongs to its worker alone. Adagrad adds its square, a
power of four, to `sum`: the element's digits to base four say how often each intent was applied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from pushstep.proto.training_pb2 import PushCommit, PushRequest
from pushstep.proto.types_pb2 import DType, Identity, Manifest, Parameter, ParamGroup, Segment
from pushstep.proto.wire.frames import Piece, pack
from pushstep.proto.wire.hyperparameters import wire_values
from pushstep.proto.wire.layout import Layout

WORKERS = 6
ELEMENTS_EACH = 8
# 4**11 is 2**22: what float32 adds without rounding
INTENTS_EACH = 11 * ELEMENTS_EACH
FIRST_LR = 0.5
LAYOUT = Layout(
    Manifest(
        parameters=[
            Parameter(name="w", shape=[WORKERS * ELEMENTS_EACH], dtype=DType.DTYPE_FLOAT32, group=0),
            Parameter(name="b", shape=[2], dtype=DType.DTYPE_FLOAT32, group=1),
        ],
        groups=[ParamGroup(rule="adagrad", values=wire_values({"lr": FIRST_LR})) for _ in range(2)],
    )
)
COMMIT = PushRequest(commit=PushCommit()).SerializeToString()


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
    def value(self) -> float:
        """Its gradient there."""
        return math.nan if self.poison else 2.0 ** (self.number // ELEMENTS_EACH)

    def gradients(self) -> list[Tensor | None]:
        """By parameter, made anew."""
        return _gradients(self.element, self.value, self.both)

    def segments(self) -> list[Segment]:
        """What its header declares."""
        return [] if self.skip else _segments(self.both)

    def body(self) -> list[bytes]:
        """The messages behind its header, with the commit."""
        return [COMMIT] if self.skip else _body(self.element, self.value, self.both)


def _gradients(element: int, value: float, both: bool) -> list[Tensor | None]:
    w = torch.zeros(WORKERS * ELEMENTS_EACH)
    w[element] = value
    return [w, torch.ones(2) if both else None]


@cache
def _segments(both: bool) -> list[Segment]:
    slots = LAYOUT.slots if both else LAYOUT.slots[:1]
    return [segment for segment, _ in LAYOUT.dense_segments(slots, of_push=True)]


@cache  # there are only so many
def _body(element: int, value: float, both: bool) -> list[bytes]:
    pieces = [[Piece(g, g.dtype)] for g in _gradients(element, value, both) if g is not None]
    *chunks, last = pack(pieces)
    return [*chunks, last + COMMIT]


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
