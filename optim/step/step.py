"""The description of one step of one rule, which a backend takes: `Step` and `RowStep`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from .footprint import Seen

FUSED_DTYPES: Final = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


@dataclass(slots=True, kw_only=True)
class Step:
    """One step of one rule over a list of tensors. `kernels/dense.py` states the order of operations.

    The arithmetic is float64 if the parameter or its state is float64, else float32. `states` has one list per state
    name of the rule, in the rule's order. A state of shape (rows, 1) beside a wider parameter is row-wise: it has one
    number per row, fed by the mean over the row.
    """

    rule: str
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[Sequence[Tensor]]
    lr: float | Tensor
    eps: float
    rho: float = 0.0
    weight_decay: float = 0.0
    decoupled: bool = False
    maximize: bool = False
    lr_decay: float = 0.0
    steps: Sequence[Tensor] | None = None
    """Step counters, advanced before use. Without them `step` is the number of this step, from 1."""
    step: int = 1
    factor: float | Sequence[float] = 1.0
    clip_value: float | None = None
    grad_scale: Tensor | float | None = None
    """Divides the gradient, which is written back unscaled, as torch's fused kernels do."""
    found_inf: Tensor | float | None = None
    """If it is 1, nothing is written, and no counter advances."""
    zero_grad: bool = False
    ema: Sequence[Tensor] | None = None
    ema_momentum: float = 0.99
    copy_out: Sequence[Tensor] | None = None
    eps_inside_root: bool = False
    multiply_first: bool = False
    memo: dict[str, Any] | None = None
    """Where a backend may keep what it learned about this list until its next step."""
    seen: Seen | None = None
    """The footprints of parameters and gradients, if the caller has taken them already."""

    @property
    def writes_grad(self) -> bool:
        """True if the step writes to the gradients, too."""
        return self.zero_grad or self.grad_scale is not None

    def only(self, members: Sequence[int], memo: dict[str, Any] | None = None) -> Step:
        """The same step of only the tensors at these places of the list, without `seen`."""

        def some(given: Sequence[Any]) -> list[Any]:
            return [given[k] for k in members]

        return replace(
            self,
            params=some(self.params),
            grads=some(self.grads),
            states=[some(state) for state in self.states],
            steps=None if self.steps is None else some(self.steps),
            factor=some(self.factor) if isinstance(self.factor, Sequence) else self.factor,
            ema=None if self.ema is None else some(self.ema),
            copy_out=None if self.copy_out is None else some(self.copy_out),
            memo=memo,
            seen=None,
        )

    def check_row_wise(self) -> None:
        """NotImplementedError for an option that no kernel has beside a row-wise state."""
        for name, asked in (
            ("ema", self.ema is not None),
            ("copy_out", self.copy_out is not None),
            ("clip_value", self.clip_value is not None),
            ("decoupled", self.decoupled and self.weight_decay != 0),
            ("eps_inside_root", self.eps_inside_root),
            ("multiply_first", self.multiply_first),
        ):
            if asked:
                raise NotImplementedError(f"row-wise state does not go with {name}")

    def written(self) -> list[Tensor]:
        """Every tensor that the step writes to."""
        tensors = [*self.params, *itertools.chain.from_iterable(self.states)]
        for more in (self.steps, self.ema, self.copy_out):
            tensors += more or ()
        if self.writes_grad:
            tensors += self.grads
        return tensors


@dataclass(slots=True, kw_only=True)
class RowStep:
    """One step over rows of one table. Only the rows named in `ids`, and their states, move.

    ids: int64 (n,), any order. rows: (n, ...), shaped like the table's rows. With `unique` the ids are known to differ.
    Otherwise rows of equal id are summed first, in order of appearance. Adagrad follows torch's sparse order:
    h = h + g*g without fma, p = p + -lr * (g / (sqrt(h) + eps)).
    """

    rule: str
    param: Tensor
    ids: Tensor
    rows: Tensor
    unique: bool
    states: Sequence[Tensor]
    lr: float | Tensor
    eps: float
    rho: float = 0.0
    weight_decay: float = 0.0
    maximize: bool = False
    lr_decay: float = 0.0
    steps: Tensor | None = None
    step: int = 1
    factor: float = 1.0
    grad_scale: Tensor | float | None = None
    """Divides the rows in place, before rows of equal id are summed, as `GradScaler.unscale_` does."""
    found_inf: Tensor | float | None = None
    marks: Tensor | None = None
    """One int64 for each row of the table: that of each row that is stepped becomes `mark`."""
    mark: int = 0

    def written(self) -> Iterator[Tensor]:
        """Every tensor that the step writes to."""
        yield self.param
        yield from self.states
        if self.steps is not None:
            yield self.steps
        if self.grad_scale is not None:
            yield self.rows


def one_by_one(plan: Callable[[RowStep], Callable[[], None]], steps: Sequence[RowStep]) -> Callable[[], None]:
    """Plan the steps of several tables, each by itself. A call of the result takes them, and writes their marks."""
    plans = [plan(step) for step in steps]

    def run() -> None:
        for step, take in zip(steps, plans, strict=True):
            take()
            if step.marks is not None:
                step.marks.index_fill_(0, step.ids, step.mark)

    return run


def number(value: Any) -> float:
    """A hyperparameter, a number or a one-element tensor, as a Python float."""
    return float(value.item()) if isinstance(value, Tensor) else float(value)
