"""Norms in one read. The bits do not depend on how the work is split.

A sum of squares is taken in float64 over blocks of 4096 elements, counted from the parameter's start. The block sums
are added in block order. Shards are cut only at block borders, so any number of them gives the same bits. A global norm
adds the parameters' sums in parameter order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from ..backends.dispatch import path_of
from ..step.step import FUSED_DTYPES

BLOCK_ELEMENTS: Final = 4096
_KERNELS: Final = {"fused": None, "differentiable": False, "foreach": None}


def square_sum(values: Tensor) -> float:
    """Sum of squares, in float64, of one parameter's gradient: any shape, read in row-major order."""
    return square_sums([values])[0]


def square_sums(tensors: Sequence[Tensor]) -> list[float]:
    """`square_sum` of each tensor. The threads work on all of them together."""
    if all(t.is_cpu and t.layout is torch.strided and t.dtype in FUSED_DTYPES for t in tensors):
        from ..cpu.norms import square_sums as on_cpu

        return on_cpu(tensors)
    if all(path_of(t.new_empty(0), _KERNELS).backend == "cuda" for t in tensors):
        from ..cuda.steps import square_sums as on_cuda

        return on_cuda(tensors)
    return [_in_torch(t) for t in tensors]


def global_norm(tensors: Sequence[Tensor]) -> float:
    """The 2-norm of all tensors together."""
    total = 0.0
    for one in square_sums(tensors):
        total += one
    return math.sqrt(total)


def _in_torch(values: Tensor) -> float:
    """The sum over the same blocks for tensors without a kernel. The order within a block is torch's."""
    flat = values.reshape(-1)
    whole = flat.numel() // BLOCK_ELEMENTS * BLOCK_ELEMENTS
    total = 0.0
    if whole:
        # Always a copy: `to` alone returns a float64 gradient itself, and the line below would square it in place.
        blocks = flat[:whole].view(-1, BLOCK_ELEMENTS).to(torch.float64, copy=True)
        for block in blocks.square_().sum(dim=1).tolist():
            total += block
    if whole < flat.numel():
        total += float(flat[whole:].to(torch.float64, copy=True).square_().sum())
    return total
