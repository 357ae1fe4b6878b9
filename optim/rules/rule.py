"""The interface of an update rule over tensors that the caller owns. Every step is taken through it.

A rule has hyperparameters, state names and two in-place steps: over a dense gradient, and over the rows of a
row-sparse one. It holds no tensors. The caller owns the memory: a local optimizer has a list of tensors, the server has
ranges of its arenas. A step is elementwise, so any split of the same elements gives the same bits. Both steps turn
their arguments into a `Step` or a `RowStep` and hand that to the tensor's backend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..backends import reference as eager
from ..backends.dispatch import Backend, backend
from ..step.step import RowStep, Step

Hyperparameters = Mapping[str, float | bool]
Beginning = Literal["at once", "with any", "with its own"]


class TableRows(NamedTuple):
    """Rows of one table that are to be stepped: the arguments of `Rule.plan_rows`, and the marks of the table's rows."""

    param: Tensor
    ids: Tensor
    rows: Tensor
    state: Sequence[Tensor]
    step: int
    marks: Tensor | None = None


class Rule(ABC):
    """An update rule. A subclass declares its name, its states and its hyperparameters."""

    name: ClassVar[str]
    """The rule's name on the wire and over REST."""
    kernel: ClassVar[str] = ""
    """The name of the kernels that step it. Empty: the rule's own name."""
    counter: ClassVar[str] = ""
    """The group key that counts the steps of all parameters of a group. Empty: each parameter has its own `step`."""
    states_begin: ClassVar[Beginning] = "with its own"
    """When a parameter has states in a state_dict: always, from the group's first step on, or from its own first on."""
    state_names: ClassVar[tuple[str, ...]]
    """torch's names of the per-element states, in the order in which `step_dense` takes them."""
    defaults: ClassVar[Mapping[str, float | bool]]
    """Every hyperparameter with torch's default."""
    ranges: ClassVar[Mapping[str, tuple[str, float]]]
    """The name of each hyperparameter in torch's errors, and its upper bound. The lower bound is 0."""

    def validate(self, hyperparameters: Hyperparameters) -> None:
        """Raise torch's ValueError for a value out of range or NaN, and KeyError for an unknown name."""
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
        """The hyperparameters as the fields of `Step` and `RowStep` that they set."""

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
        copy_out: Tensor | None = None,
    ) -> Callable[[], None]:
        """Prepare an in-place step of `param` and `state`. A call of the result takes it.

        What can fail fails here, before anything is written.

        All tensors have one shape; a row-wise state has shape (rows, 1). `grad` may have any real floating dtype. The
        arithmetic runs in the state's dtype (float32 for half states). `step` counts from 1. `factor` multiplies the
        gradient first. `copy_out` receives the new parameter in its own dtype in the same pass. The number of threads
        (torch.get_num_threads()) changes no bit. Several Python threads may call this at once.
        """
        described = Step(
            rule=self.kernel or self.name,
            params=[param],
            grads=[grad],
            states=[[tensor] for tensor in state],
            step=step,
            factor=factor,
            copy_out=None if copy_out is None else [copy_out],
            **self.arguments(hyperparameters),
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
    ) -> Callable[[], None]:
        """Prepare an in-place step of only the rows `ids` (int64) of `param` and `state`. A call takes it.

        `rows` has shape (len(ids), *param.shape[1:]). No id comes twice: `ops.rows.coalesce` sees to that. Rows that are
        not named do not move, nor does their state. IndexError for an id outside the table; `check_rows` raises if the
        rule refuses.
        """
        self.check_rows(hyperparameters)
        described = RowStep(
            rule=self.kernel or self.name,
            param=param,
            ids=ids,
            rows=rows,
            unique=True,
            states=state,
            step=step,
            factor=factor,
            **self.arguments(hyperparameters),
        )
        return self._counted(backend_of(param).plan_rows(described), described)

    def plan_tables(
        self,
        tables: Sequence[TableRows],
        hyperparameters: Hyperparameters,
        *,
        factor: float = 1.0,
        mark: int = 0,
    ) -> Callable[[], None]:
        """Prepare what `plan_rows` prepares for each of several tables on one device. A call takes all of it.

        The mark of each row that is stepped becomes `mark`.
        """
        self.check_rows(hyperparameters)
        arguments = self.arguments(hyperparameters)
        described = [
            RowStep(
                rule=self.kernel or self.name,
                param=table.param,
                ids=table.ids,
                rows=table.rows,
                unique=True,
                states=table.state,
                step=table.step,
                factor=factor,
                marks=table.marks,
                mark=mark,
                **arguments,
            )
            for table in tables
        ]
        take = backend_of(tables[0].param).plan_tables(described)

        def run() -> None:
            take()
            torch.autograd.graph.increment_version([t for step in described for t in step.written()])

        return run

    @staticmethod
    def _counted(take: Callable[[], None], described: Step | RowStep) -> Callable[[], None]:
        """The step followed by an increment of the version counters, by which autograd notices it."""

        def run() -> None:
            take()
            torch.autograd.graph.increment_version(described.written())

        return run

    def step_dense(self, *tensors: Any, **options: Any) -> None:
        """Prepare a step with `plan_dense` and take it. The arguments are those of `plan_dense`."""
        self.plan_dense(*tensors, **options)()

    def step_rows(self, *tensors: Any, **options: Any) -> None:
        """Prepare a step with `plan_rows` and take it. The arguments are those of `plan_rows`."""
        self.plan_rows(*tensors, **options)()


def backend_of(param: Tensor) -> Backend:
    """The backend that steps this tensor: its device's kernels if they take it, else torch operations."""
    found = backend(param.device.type)
    if found is None or found.refuses(param) is not None:
        return eager
    return found
