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
from .kernel_rule import Hyperparameters as Hyperparameters


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
        decoupled: bool = False,
        clip_value: float | None = None,
        zero_grad: bool = False,
        ema: Tensor | None = None,
        ema_momentum: float = 0.99,
        copy_out: Tensor | None = None,
        threads: int | None = None,
    ) -> None:
        """Step `param` and `state` in place.

        All tensors have one shape; a row-wise state has shape (rows, 1). `grad` may be of any real floating
        dtype; the arithmetic runs in the state's (float32 for half states). `step` counts from 1; `factor`
        multiplies the gradient first, then `clip_value` bounds it. `decoupled` takes weight decay off the
        parameter instead of adding it to the gradient. In the same pass, where asked: `ema` moves towards the
        new parameter, `copy_out` receives it in its own dtype, and `zero_grad` clears the gradient. `threads` at
        most (None: torch.get_num_threads()); their number changes no bit. Safe to call from several Python threads.
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
        unique: bool = True,
        threads: int | None = None,
    ) -> None:
        """Step only the rows `ids` (int64) of `param` and `state`, in place.

        `rows` has shape (len(ids), *param.shape[1:]). Rows that are not named do not move, nor does their state.
        With `unique` the caller vouches that no id comes twice; otherwise rows of equal id are summed first, as
        `rows.coalesce` does. IndexError for an id outside the table.
        """


RULES: Final[Mapping[str, Rule]] = {rule.name: rule for rule in (AdadeltaRule(), AdagradRule())}
