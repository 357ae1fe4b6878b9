"""The `torch.amp.GradScaler` protocol of a RemoteOptimizer's step.

A scaler that finds inf does not call the step of an ordinary optimizer, and a synchronous round would wait for the
silent worker. A RemoteOptimizer therefore sets `_step_supports_amp_scaling`, as torch's fused optimizers do. The scaler
then only looks for inf, always calls the step, and leaves `grad_scale` and `found_inf` on the optimizer while the step
runs. `grad_scale` is None when the user has called `unscale_` already.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..gradients.body import Rows


class Scaling:
    """A context around each step of one optimizer: reads the scaler's attributes and unscales each gradient once."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._attributes: dict[str, Any] = vars(optimizer)
        # gradients that a failed step unscaled, each with torch's count of its writes: the scaler does not know of
        # them and passes the same scale to the next attempt, which would unscale them twice
        self._unscaled: list[tuple[Tensor, int]] = []
        self._unscaling: list[tuple[Tensor, int]] = []

    def __enter__(self) -> Scaling:
        self._unscaling = []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unscaled = self._unscaling if error is not None else []
        if error is not None:  # the scaler removes its attributes only after a step that returns
            self._attributes.pop("grad_scale", None)
            self._attributes.pop("found_inf", None)

    def skips(self, gradients: Iterable[Tensor | Rows]) -> bool:
        """True if the scaler has found inf, so that the step must be skipped. Otherwise unscale the gradients."""
        if self._attributes.get("found_inf", False):
            return True
        scale = self._attributes.get("grad_scale")
        if scale is not None:
            self._unscale(gradients, scale)
        return False

    def _unscale(self, gradients: Iterable[Tensor | Rows], scale: Any) -> None:
        """Multiply the gradients, in place, by the scale's reciprocal rounded to float32, as torch's `unscale_` does."""
        # a number, because a half gradient on a GPU would round a tensor to its own dtype first
        inverse = float(torch.as_tensor(scale, dtype=torch.float64, device="cpu").reciprocal().float())
        for gradient in gradients:
            values = gradient[1] if isinstance(gradient, tuple) else gradient
            if not any(_same(values, known, version) for known, version in self._unscaled):
                values.mul_(inverse)
            self._unscaling.append((values, values._version))


def _same(values: Tensor, known: Tensor, version: int) -> bool:
    """True if `values` is the same view of the same memory as `known`, and was not written to since `version`."""
    return values.dtype == known.dtype and values.is_set_to(known) and values._version == version
