"""Unscales a gradient as `GradScaler.unscale_` does, for steps that take the scale."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def unscale(values: Tensor, scale: Tensor | float, found_inf: Tensor | None = None) -> None:
    """Multiply `values` in place by the scale's reciprocal, rounded to float32.

    It uses torch's own operation, so the bits are torch's. If `found_inf` is 1, nothing changes. The host waits neither
    for a scale nor for a `found_inf` on the device.
    """
    wide = torch.as_tensor(scale, dtype=torch.float64, device=values.device)
    inverse = wide.reciprocal().to(torch.float32).reshape(1)
    if found_inf is not None:
        inverse = torch.where(found_inf.reshape(1) == 1, torch.ones_like(inverse), inverse)
    nobody_asks = torch.zeros(1, dtype=torch.float32, device=values.device)
    torch._amp_foreach_non_finite_check_and_unscale_([values], nobody_asks, inverse)
