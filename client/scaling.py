"""What a `torch.amp.GradScaler` asks of the step that it calls.

A scaler that finds inf does not call the step of an ordinary optimizer, and a worker that says nothing is missed in a
synchronous round. A RemoteOptimizer therefore says `_step_supports_amp_scaling`, as torch's fused optimizers do: the
scaler then only looks for inf, always calls the step, and leaves `grad_scale` and `found_inf` on the optimizer for
its length. `grad_scale` is None when the user has called `unscale_` already.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .gradients import Rows


class Scaling:
    """The scaler's part in each step of one optimizer; a context around the step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._attributes: dict[str, Any] = vars(optimizer)
        # what a step that failed had unscaled already, and torch's count of the writes to it: the scaler does not
        # know that and hands the same scale to the next attempt
        self._unscaled: list[tuple[Tensor, int]] = []
        self._unscaling: list[tuple[Tensor, int]] = []

    def __enter__(self) -> Scaling:
        self._unscaling = []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unscaled = self._unscaling if error is not None else []
        if error is not None:  # the scaler takes its attributes back only after a step that returns
            self._attributes.pop("grad_scale", None)
            self._attributes.pop("found_inf", None)

    def found_inf(self) -> bool:
        """Whether the scaler has found inf: the step is not to be taken."""
        return bool(self._attributes.get("found_inf", False))

    def unscale(self, gradients: Iterable[Tensor | Rows]) -> None:
        """Unscale in place, as `unscale_` would have: by the reciprocal, rounded to float32."""
        scale = self._attributes.get("grad_scale")
        if scale is None:
            return
        # a number and not a tensor, which a half gradient on a GPU would round to its own dtype first
        inverse = float(torch.as_tensor(scale, dtype=torch.float64, device="cpu").reciprocal().float())
        for gradient in gradients:
            values = gradient[1] if isinstance(gradient, tuple) else gradient
            if not any(_same(values, known, version) for known, version in self._unscaled):
                values.mul_(inverse)
            self._unscaling.append((values, values._version))


def _same(values: Tensor, known: Tensor, version: int) -> bool:
    """Whether these are the values that were known at this version: the same memory, read in the same way."""
    return values.dtype == known.dtype and values.is_set_to(known) and values._version == version
