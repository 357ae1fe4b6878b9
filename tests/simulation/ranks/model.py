"""The model that lies in the ranks, what workers mean to push to it, and what steps make of it.

Each intent's gradient is a power of two at one element of some parameters, which belongs to its worker alone. Adagrad adds
its square to `sum`: the element's digits to base four say how often an intent was applied, in each parameter, and so in
each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from pushstep.optim import RULES
from pushstep.proto.types_pb2 import DType, Identity, Manifest, Parameter, ParamGroup, Segment
from pushstep.proto.wire.frames import BodyDigest, Piece, pack
from pushstep.proto.wire.hyperparameters import wire_values
from pushstep.proto.wire.layout import Layout
from pushstep.proto.wire.shards import Part, cut

WORKERS = 4
ELEMENTS_EACH = 8
# 4**11 is 2**22: what float32 adds without rounding
INTENTS_EACH = 11 * ELEMENTS_EACH
LR = 0.5
PARAMETERS = 4
ELEMENTS = WORKERS * ELEMENTS_EACH
WHOLE = Layout(
    Manifest(
        parameters=[
            Parameter(name=f"p{index}", shape=[ELEMENTS], dtype=DType.DTYPE_FLOAT32, group=0)
            for index in range(PARAMETERS)
        ],
        groups=[ParamGroup(rule="adagrad", values=wire_values({"lr": LR}))],
    )
)
# parameters and `sum`, by parameter
State = tuple[list[Tensor], list[Tensor]]


@dataclass(eq=False)
class Intent:
    """One step of one worker."""

    worker: str
    number: int
    # the parameters that have a gradient
    touches: tuple[int, ...]
    skip: bool = False
    identities: list[Identity] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.worker}:{self.number}"

    @property
    def element(self) -> int:
        """Where its gradient is."""
        return int(self.worker[1:]) * ELEMENTS_EACH + self.number % ELEMENTS_EACH

    @property
    def value(self) -> float:
        """Its gradient there."""
        return float(2.0 ** (self.number // ELEMENTS_EACH))

    def gradient(self) -> Tensor:
        """Of each parameter that it touches."""
        made = torch.zeros(ELEMENTS)
        made[self.element] = self.value
        return made


@cache
def parts(ranks: int) -> list[Part]:
    """What each rank holds."""
    found = cut(WHOLE, ranks)
    if any(part is None for part in found):
        raise ValueError(f"{ranks} ranks are too many for this model")
    return [part for part in found if part is not None]


@dataclass(frozen=True)
class PartBody:
    """What one rank is sent of a push: its header's segments, its frames and their digest."""

    segments: list[Segment]
    frames: list[bytes]
    digest: int


@cache
def part_body(ranks: int, rank: int, element: int, value: float, touches: tuple[int, ...]) -> PartBody:
    """A rank's part of the gradient that has a value at an element of these parameters."""
    part = parts(ranks)[rank]
    slots = [part.layout.slots[piece.index] for piece in part.pieces if piece.whole in touches]
    gradient = torch.zeros(ELEMENTS)
    gradient[element] = value
    segments, pieces = [], []
    for segment, covered in part.layout.dense_segments(slots, of_push=True) if slots else ():
        segments.append(segment)
        pieces.append([Piece(gradient, gradient.dtype) for _ in covered])
    digest = BodyDigest(segments)
    frames = list(pack(pieces, digest))
    return PartBody(segments, frames, digest.value)


def at_first() -> State:
    """Before the first step."""
    return (
        [torch.zeros(ELEMENTS) for _ in range(PARAMETERS)],
        [torch.zeros(ELEMENTS) for _ in range(PARAMETERS)],
    )


def stepped(before: State, steps: Sequence[int], intents: Sequence[Intent]) -> tuple[State, list[int]]:
    """The state after one more step, which adds these intents up, and how often each parameter was stepped."""
    rule = RULES["adagrad"]
    parameters, sums = list(before[0]), list(before[1])
    counts = list(steps)
    for index in range(PARAMETERS):
        gradients = [intent.gradient() for intent in intents if index in intent.touches]
        if not gradients:
            continue
        total = gradients[0]
        for gradient in gradients[1:]:
            total = total + gradient
        counts[index] += 1
        parameters[index], sums[index] = parameters[index].clone(), sums[index].clone()
        rule.step_dense(
            parameters[index], total, [sums[index]], {**rule.defaults, "lr": LR}, step=counts[index]
        )
    return (parameters, sums), counts
