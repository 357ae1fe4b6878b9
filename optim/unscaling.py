"""What `GradScaler.unscale_` does to a gradient, for steps that are handed the scale."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def unscale(values: Tensor, scale: Tensor | float, found_inf: Tensor | None = None) -> None:
    """Multiply in place by the scale's reciprocal, rounded to float32: torch's bits, in torch's own operation.

    The host does not wait for a scale on the device, nor for `found_inf` there: where that is 1, nothing is changed.
    """
    wide = torch.as_tensor(scale, dtype=torch.float64, device=values.device)
    inverse = wide.reciprocal().to(torch.float32).reshape(1)
    if found_inf is not None:
        inverse = torch.where(found_inf.reshape(1) == 1, torch.ones_like(inverse), inverse)
    nobody_asks = torch.zeros(1, dtype=torch.float32, device=values.device)
    torch._amp_foreach_non_finite_check_and_unscale_([values], nobody_asks, inverse)
