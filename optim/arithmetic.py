"""What both rules do before their own equations: bring operands to one dtype, scale, negate, decay.

Half parameters are stepped in float32 and rounded once at the end; 1-rho is formed in double by the rules,
because float32(1) - float32(0.9) is off by 2.4e-7 relative.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def prepared_gradient(
    grad: Tensor, param: Tensor, *, factor: float, maximize: bool, weight_decay: float
) -> Tensor:
    """The gradient as the equations want it: in `param`'s dtype, scaled, negated, then decayed (torch's order)."""
    g = grad.to(param.dtype)
    if factor != 1.0:
        g = g * factor
    if maximize:
        g = -g
    if weight_decay != 0:
        g = g.add(param, alpha=weight_decay)
    return g


def in_dtype(param: Tensor, dtype: torch.dtype, body: Callable[[Tensor], None]) -> None:
    """Run `body` on `param` in place, or on a copy in `dtype` that is rounded back once."""
    if param.dtype == dtype:
        body(param)
        return
    wide = param.to(dtype)
    body(wide)
    param.copy_(wide)
