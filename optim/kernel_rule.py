"""What both rules have in common: turn the seam's arguments into a `Step` and hand it to the tensor's backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import eager
from .dispatch import Backend, RowStep, Step, backend

Hyperparameters = Mapping[str, float | bool]


class KernelRule:
    """A rule over tensors that somebody else owns; see `rules.Rule`."""

    name: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]]
    defaults: ClassVar[Mapping[str, float | bool]]
    ranges: ClassVar[Mapping[str, tuple[str, float]]]
    """What torch calls each hyperparameter in its errors, and its upper bound; the lower is 0."""

    def validate(self, hyperparameters: Hyperparameters) -> None:
        """Raise torch's ValueError for a value out of range (NaN is), KeyError for an unknown name."""
        if unknown := hyperparameters.keys() - self.defaults.keys():
            raise KeyError(f"{self.name} has no {min(unknown)!r}; it has {', '.join(self.defaults)}")
        for name, (label, upper) in self.ranges.items():
            if name in hyperparameters and not 0.0 <= hyperparameters[name] <= upper:
                raise ValueError(f"Invalid {label}: {hyperparameters[name]}")

    def initial_value(self, state_name: str, hyperparameters: Hyperparameters) -> float:
        """The value that fills a fresh state."""
        raise NotImplementedError

    def arguments(self, hyperparameters: Hyperparameters) -> dict[str, Any]:
        """The hyperparameters in the words of `dispatch.Step`."""
        raise NotImplementedError

    def check_rows(self, hyperparameters: Hyperparameters) -> None:
        """Raise if the rule refuses row-sparse gradients with these hyperparameters."""

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
        """See `rules.Rule.step_dense`."""
        described = Step(
            rule=self.name,
            params=[param],
            grads=[grad],
            states=[[tensor] for tensor in state],
            step=step,
            factor=factor,
            decoupled=decoupled,
            clip_value=clip_value,
            zero_grad=zero_grad,
            ema=None if ema is None else [ema],
            ema_momentum=ema_momentum,
            copy_out=None if copy_out is None else [copy_out],
            threads=threads,
            **self.arguments(hyperparameters),
        )
        backend_of(param).step(described)
        torch.autograd.graph.increment_version(described.written())

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
        """See `rules.Rule.step_rows`."""
        self.check_rows(hyperparameters)
        described = RowStep(
            rule=self.name,
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
        backend_of(param).step_rows(described)
        torch.autograd.graph.increment_version(described.written())


def backend_of(param: Tensor) -> Backend:
    """The backend that steps this tensor: its device's kernels, else torch operations."""
    found = backend(param.device.type)
    if found is None or found.refuses(param) is not None:
        return eager
    return found
