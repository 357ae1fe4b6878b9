"""Statistics of a tensor.

No copy in float64 is made of it: for a large tensor there may be no memory for one.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from pushstep.optim.ops.norms import square_sum

# 1 MiB as float64, which stays in the cache.
BLOCK_ELEMENTS: Final = 1 << 17


def statistics(tensor: Tensor) -> dict[str, float | None]:
    """Minimum, maximum, mean and L2 norm; each is None for a tensor without elements."""
    if tensor.numel() == 0:
        return {"min": None, "max": None, "mean": None, "norm": None}
    lowest, highest = torch.aminmax(tensor)
    blocks = torch.split(tensor.reshape(-1), BLOCK_ELEMENTS)
    return {
        "min": float(lowest),
        "max": float(highest),
        "mean": sum(float(block.double().sum()) for block in blocks) / tensor.numel(),
        "norm": math.sqrt(square_sum(tensor)),
    }
