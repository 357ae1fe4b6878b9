"""How the state came about: which intents made which version, and the same steps taken again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pushstep.optim import RULES
from pushstep.proto.types_pb2 import Identity

from .intent import FIRST_LR, LAYOUT, Intent, weighted_sum

Key = tuple[int, str, int, int]


def key_of(identity: Identity) -> Key:
    """What a push is known by."""
    return identity.timeline, identity.worker, identity.epoch, identity.sequence


@dataclass(eq=False)
class Chapter:
    """One version: what made it. If its step is `undone`, it failed, and the version moved nothing."""

    timeline: int
    version: int
    lr: float
    lr_scale: float
    divisor: float
    intents: tuple[tuple[Intent, float], ...]
    # the pushes that it was made of
    keys: tuple[Key, ...]
    undone: bool = False


@dataclass
class Books:
    """What a snapshot brings back: the story so far, and how the lr stands."""

    story: list[Chapter] = field(default_factory=list)
    applied: set[Intent] = field(default_factory=set)
    lr: float = FIRST_LR
    held: bool = False

    def copy(self) -> Books:
        """As they are now."""
        return Books(list(self.story), set(self.applied), self.lr, self.held)


class Replay:
    """The state that a story makes, in the order of the versions. It goes on where the story does."""

    def __init__(self) -> None:
        self.told: list[Chapter] = []
        self._begin()

    def _begin(self) -> None:
        self.told.clear()
        self._parameters = [torch.zeros(slot.shape) for slot in LAYOUT.slots]
        self._sums = [torch.zeros(slot.shape) for slot in LAYOUT.slots]
        self._steps = [0] * len(LAYOUT.slots)

    def of(self, story: Sequence[Chapter]) -> tuple[Tensor, Tensor]:
        """Parameters and `sum` after the story, both parameters one behind the other."""
        if self.told != story[: len(self.told)]:
            self._begin()
        for chapter in story[len(self.told) :]:
            self._step(chapter)
            self.told.append(chapter)
        return torch.cat(self._parameters), torch.cat(self._sums)

    def _step(self, chapter: Chapter) -> None:
        if chapter.undone:
            return
        rule = RULES["adagrad"]
        gradients = [intent.gradients() for intent, _ in chapter.intents]
        weights = [weight for _, weight in chapter.intents]
        for index, column in enumerate(zip(*gradients, strict=True)):
            gradient = weighted_sum(column, weights, chapter.divisor)
            if gradient is None:
                continue
            self._steps[index] += 1
            lr = chapter.lr if index == 0 else FIRST_LR
            values = {**rule.defaults, "lr": lr * chapter.lr_scale}
            rule.step_dense(
                self._parameters[index], gradient, [self._sums[index]], values, step=self._steps[index]
            )
