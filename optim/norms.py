"""Norms that do not depend on how the work was split.

A sum of squares is taken in float64 over blocks of 4096 elements, counted from the parameter's start; the block
sums are added in block order. Shards cut on block borders, so any number of them gives the same bits.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

BLOCK_ELEMENTS: Final = 4096


def square_sum(values: Tensor) -> float:
    """Sum of squares of one parameter's gradient (any shape, read in row-major order), in float64."""
    flat = values.reshape(-1)
    whole = flat.numel() // BLOCK_ELEMENTS * BLOCK_ELEMENTS
    total = 0.0
    if whole:
        # a copy always: of a float64 gradient, `to` alone would be the gradient itself, squared in place below
        blocks = flat[:whole].view(-1, BLOCK_ELEMENTS).to(torch.float64, copy=True)
        for block in blocks.square_().sum(dim=1).tolist():
            total += block
    if whole < flat.numel():
        total += float(flat[whole:].to(torch.float64, copy=True).square_().sum())
    return total
