"""The seam through which every step is taken: a rule over tensors that somebody else owns.

A rule knows its hyperparameters, its state and two in-place steps: over a dense gradient and over the rows of
a row-sparse one. It holds nothing itself. Whoever calls (a local optimizer with a list of tensors, the server
with ranges of its arenas) owns the memory; a step is elementwise, so any split of the same elements gives the
same bits. Both steps turn their arguments into what `dispatch` describes and hand it to the tensor's backend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import eager
from .dispatch import Backend, backend
from .step import RowStep, Step

Hyperparameters = Mapping[str, float | bool]


class Rule(ABC):
    """An update rule; a subclass says what it is called, what it keeps and what its hyperparameters are."""

    name: ClassVar[str]
    """The rule's name on the wire and over REST."""
    kernel: ClassVar[str] = ""
    """What `dispatch` calls the arithmetic; empty: as the rule."""
    counter: ClassVar[str] = ""
    """The key under which a param group counts the steps of all its parameters; empty: each has its own `step`."""
    state_names: ClassVar[tuple[str, ...]]
    """torch's names of the per-element states, in the order in which `step_dense` takes them."""
    defaults: ClassVar[Mapping[str, float | bool]]
    """Every hyperparameter with torch's default."""
    ranges: ClassVar[Mapping[str, tuple[str, float]]]
    """What torch calls each hyperparameter in its errors, and its upper bound; the lower is 0."""

    def validate(self, hyperparameters: Hyperparameters) -> None:
        """Raise torch's ValueError for a value out of range (NaN is), KeyError for an unknown name."""
        if unknown := hyperparameters.keys() - self.defaults.keys():
            raise KeyError(f"{self.name} has no {min(unknown)!r}; it has {', '.join(self.defaults)}")
        for name, (label, upper) in self.ranges.items():
            if name in hyperparameters and not 0.0 <= hyperparameters[name] <= upper:
                raise ValueError(f"Invalid {label}: {hyperparameters[name]}")

    @abstractmethod
    def initial_value(self, state_name: str, hyperparameters: Hyperparameters) -> float:
        """The value that fills a fresh state."""

    @abstractmethod
    def effective_lr(self, hyperparameters: Hyperparameters, step: int) -> float:
        """The learning rate that step number `step` (from 1) applies."""

    @abstractmethod
    def arguments(self, hyperparameters: Hyperparameters) -> dict[str, Any]:
        """The hyperparameters in the words of `dispatch.Step`."""

    def check_rows(self, hyperparameters: Hyperparameters) -> None:  # noqa: B027 - most rules refuse nothing
        """Raise if the rule refuses row-sparse gradients with these hyperparameters."""

    def plan_dense(
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
    ) -> Callable[[], None]:
        """A step of `param` and `state` in place that is ready to be taken, by a call.

        What can fail fails here, with nothing written.

        All tensors have one shape; a row-wise state has shape (rows, 1). `grad` may be of any real floating
        dtype; the arithmetic runs in the state's (float32 for half states). `step` counts from 1; `factor`
        multiplies the gradient first, then `clip_value` bounds it. `decoupled` takes weight decay off the
        parameter instead of adding it to the gradient. In the same pass, where asked: `ema` moves towards the
        new parameter, `copy_out` receives it in its own dtype, and `zero_grad` clears the gradient. `threads` at
        most (None: torch.get_num_threads()); their number changes no bit. Safe to call from several Python threads.
        """
        described = Step(
            rule=self.kernel or self.name,
            params=[param],
            grads=[grad],
            states=[[tensor] for tensor in state],
            step=step,
            factor=factor,
            clip_value=clip_value,
            zero_grad=zero_grad,
            ema=None if ema is None else [ema],
            ema_momentum=ema_momentum,
            copy_out=None if copy_out is None else [copy_out],
            threads=threads,
            # a rule may say for itself how it decays
            **{"decoupled": decoupled, **self.arguments(hyperparameters)},
        )
        return self._counted(backend_of(param).plan(described), described)

    def plan_rows(
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
    ) -> Callable[[], None]:
        """A step of only the rows `ids` (int64) of `param` and `state`, in place, that is ready to be taken.

        `rows` has shape (len(ids), *param.shape[1:]). Rows that are not named do not move, nor does their state.
        With `unique` the caller vouches that no id comes twice; otherwise rows of equal id are summed first, as
        `rows.coalesce` does. IndexError for an id outside the table.
        """
        self.check_rows(hyperparameters)
        described = RowStep(
            rule=self.kernel or self.name,
            param=param,
            ids=ids,
            rows=rows,
            unique=unique,
            states=state,
            step=step,
            factor=factor,
            threads=threads,
            **self.arguments(hyperparameters),
        )
        return self._counted(backend_of(param).plan_rows(described), described)

    @staticmethod
    def _counted(take: Callable[[], None], described: Step | RowStep) -> Callable[[], None]:
        """The step, and then what tells autograd of it."""

        def run() -> None:
            take()
            torch.autograd.graph.increment_version(described.written())

        return run

    def step_dense(self, *tensors: Any, **options: Any) -> None:
        """Take at once what `plan_dense` makes ready; its arguments."""
        self.plan_dense(*tensors, **options)()

    def step_rows(self, *tensors: Any, **options: Any) -> None:
        """Take at once what `plan_rows` makes ready; its arguments."""
        self.plan_rows(*tensors, **options)()


def backend_of(param: Tensor) -> Backend:
    """The backend that steps this tensor: its device's kernels, else torch operations."""
    found = backend(param.device.type)
    if found is None or found.refuses(param) is not None:
        return eager
    return found
