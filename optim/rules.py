"""The rules by name: what a param group's `rule` may be, and the one seam through which every step is taken.

A rule knows its hyperparameters, its state and two in-place steps: over a dense gradient and over the rows of
a row-sparse one. It holds nothing itself. Whoever calls (a local optimizer with a list of tensors, the server
with ranges of its arenas) owns the memory; a step is elementwise, so any split of the same elements gives the
same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from torch import Tensor

from .adadelta import AdadeltaRule
from .adagrad import AdagradRule

Hyperparameters = Mapping[str, float | bool]


class Rule(Protocol):
    """An update rule over tensors that somebody else owns."""

    @property
    def name(self) -> str:
        """The rule's name on the wire and over REST."""

    @property
    def state_names(self) -> tuple[str, ...]:
        """torch's names of the per-element states, in the order in which `step_dense` takes them."""

    @property
    def defaults(self) -> Mapping[str, float | bool]:
        """Every hyperparameter with torch's default."""

    def validate(self, hyperparameters: Hyperparameters) -> None:
        """Raise torch's ValueError for a value out of range, KeyError for an unknown name."""

    def initial_value(self, state_name: str, hyperparameters: Hyperparameters) -> float:
        """The value that fills a fresh state."""

    def effective_lr(self, hyperparameters: Hyperparameters, step: int) -> float:
        """The learning rate that step number `step` (from 1) applies."""

    def step_dense(
        self,
        param: Tensor,
        grad: Tensor,
        state: Sequence[Tensor],
        hyperparameters: Hyperparameters,
        *,
        step: int,
        factor: float = 1.0,
    ) -> None:
        """Step `param` and `state` in place.

        All tensors have one shape. `grad` may be of any real floating dtype; the arithmetic runs in the
        state's (float32 for half parameters). `step` counts from 1; `factor` multiplies the gradient first.
        """

    def step_rows(
        self,
        param: Tensor,
        ids: Tensor,
        rows: Tensor,
        state: Sequence[Tensor],
        hyperparameters: Hyperparameters,
        *,
        step: int,
        factor: float = 1.0,
    ) -> None:
        """Step only the rows `ids` (int64, unique) of `param` and `state`, in place.

        `rows` has shape (len(ids), *param.shape[1:]). Rows that are not named do not move, nor does their state.
        """


RULES: Final[Mapping[str, Rule]] = {rule.name: rule for rule in (AdadeltaRule(), AdagradRule())}
