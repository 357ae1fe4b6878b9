"""Norms that do not depend on how the work was split, and whether everything is finite, in one read.

A sum of squares is taken in float64 over blocks of 4096 elements, counted from the parameter's start; the block
sums are added in block order. Shards cut on block borders, so any number of them gives the same bits. A global norm
adds the parameters' sums in parameter order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from .dispatch import path_of
from .step import FUSED_DTYPES

BLOCK_ELEMENTS: Final = 4096
_KERNELS: Final = {"fused": None, "differentiable": False, "foreach": None}


class Measure(NamedTuple):
    """What one read of a gradient tells."""

    square_sum: float
    finite: bool


def square_sum(values: Tensor, *, threads: int | None = None) -> float:
    """Sum of squares of one parameter's gradient (any shape, read in row-major order), in float64."""
    return square_sums([values], threads=threads)[0]


def square_sums(tensors: Sequence[Tensor], *, threads: int | None = None) -> list[float]:
    """`square_sum` of each, with the threads shared among all of them."""
    if all(t.is_cpu and t.layout is torch.strided and t.dtype in FUSED_DTYPES for t in tensors):
        from .cpu_norms import square_sums as on_cpu

        return on_cpu(tensors, threads=threads)
    if all(path_of(t.new_empty(0), _KERNELS).backend == "cuda" for t in tensors):
        from .cuda import square_sums as on_cuda

        return on_cuda(tensors)
    return [_in_torch(t) for t in tensors]


def measure(values: Tensor, *, threads: int | None = None) -> Measure:
    """Sum of squares, and whether every element is finite.

    The squares of everything below double fit into one, so there a finite sum says it all; only a double's
    own overflow needs a second look.
    """
    total = square_sum(values, threads=threads)
    finite = math.isfinite(total)
    if not finite and values.dtype == torch.float64:
        finite = bool(torch.isfinite(values).all())
    return Measure(total, finite)


def global_norm(tensors: Sequence[Tensor], *, threads: int | None = None) -> float:
    """The 2-norm of all tensors together."""
    total = 0.0
    for one in square_sums(tensors, threads=threads):
        total += one
    return math.sqrt(total)


def _in_torch(values: Tensor) -> float:
    """The same blocks for tensors that have no kernel; the order within a block is torch's."""
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
