"""What a tensor looks like in numbers. No copy of it in float64 is made: of a large one there may be no memory for that."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from pushstep.optim.norms import square_sum

# 1 MiB as float64: it stays in the cache.
BLOCK_ELEMENTS: Final = 1 << 17


def statistics(tensor: Tensor) -> dict[str, float | None]:
    """Least, largest, mean and L2 norm; None of a tensor without elements."""
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
