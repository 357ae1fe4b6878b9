"""Norms in one read. The bits do not depend on how the work is split.

A sum of squares is taken in float64 over blocks of 4096 elements, counted from the parameter's start. The block sums
are added in block order. Shards are cut only at block borders, so any number of them gives the same bits. A global norm
adds the parameters' sums in parameter order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, islice, pairwise
from typing import Final

import torch
from torch import Tensor

from ..backends.dispatch import path_of
from ..step.operands import SomeRows as SomeRows
from ..step.step import FUSED_DTYPES

BLOCK_ELEMENTS: Final = 4096
# Elements of which `power_norm` makes a float64 copy at once.
NORM_SLICE_ELEMENTS: Final = 256 * BLOCK_ELEMENTS
EPSILON: Final = 1e-6  # torch's, in the denominator of a clip factor
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


def stretch_sums(tables: Sequence[SomeRows]) -> list[list[float]]:
    """Of each table, `square_sum` of the rows in each stretch that has some, in order. The threads work on all together."""
    if all(map(_has_kernel, tables)):
        from ..cpu.norms import stretch_sums as on_cpu

        return on_cpu(tables)
    pieces = [_stretches(of) for of in tables]
    taken = iter(square_sums(list(chain.from_iterable(pieces))))
    return [list(islice(taken, len(some))) for some in pieces]


def row_square_sums(tables: Sequence[SomeRows]) -> list[float]:
    """Of each table, its `stretch_sums` added one after the other."""
    if all(map(_has_kernel, tables)):
        from ..cpu.norms import row_square_sums as on_cpu

        return on_cpu(tables)
    totals = []
    for sums in stretch_sums(tables):
        total = 0.0
        for one in sums:
            total += one
        totals.append(total)
    return totals


def _has_kernel(of: SomeRows) -> bool:
    return of.ids.is_cpu and of.rows.is_cpu and of.rows.dtype in FUSED_DTYPES


def _stretches(of: SomeRows) -> list[Tensor]:
    if of.table_rows <= of.stretch_rows:
        return [of.rows] if of.ids.numel() else []
    borders = torch.arange(
        of.stretch_rows, of.table_rows, of.stretch_rows, dtype=torch.int64, device=of.ids.device
    )
    starts = [0, *torch.searchsorted(of.ids, borders).tolist(), of.ids.numel()]
    return [of.rows[start:stop] for start, stop in pairwise(starts) if stop > start]


def block_sums(values: Tensor) -> list[float]:
    """The sums of squares of one flat CPU tensor's blocks, which `square_sum` adds in order."""
    from ..cpu.norms import flat_block_sums

    return [float(one) for one in flat_block_sums(values)]


def global_norm(tensors: Sequence[Tensor]) -> float:
    """The 2-norm of all tensors together."""
    total = 0.0
    for one in square_sums(tensors):
        total += one
    return math.sqrt(total)


def power_norm(values: Tensor, norm_type: float) -> float:
    """The norm of another power than 2 of one parameter's gradient, in float64, over the same blocks; `inf`: its largest magnitude.

    Magnitudes are taken in parts of the largest one, so that no power overflows.
    """
    flat = values.detach().reshape(-1)
    if not flat.numel():
        return 0.0
    largest = float(torch.linalg.vector_norm(flat, math.inf))
    if math.isinf(norm_type) or largest == 0 or not math.isfinite(largest):
        return largest
    total = 0.0
    for start in range(0, flat.numel(), NORM_SLICE_ELEMENTS):
        part = flat[start : start + NORM_SLICE_ELEMENTS].to(torch.float64).abs().div_(largest).pow_(norm_type)
        total = _added(part, total)
    return largest * _root(total, norm_type)


def together(norms: Sequence[float], norm_type: float) -> float:
    """The norm over all tensors, of the norm of each, in this order. NaN if one is."""
    if any(map(math.isnan, norms)):
        return math.nan
    largest = max(norms, default=0.0)
    if math.isinf(norm_type) or largest == 0 or math.isinf(largest):
        return largest
    total = 0.0
    for norm in norms:
        total += (norm / largest) ** norm_type
    return largest * _root(total, norm_type)


def torch_factor(norm: float, limit: float) -> float:
    """min(1, limit / (norm + 1e-6)): `torch.nn.utils.clip_grad_norm_`."""
    clip = limit / (norm + EPSILON)
    return clip if math.isnan(clip) else min(1.0, clip)


def keras_factor(norm: float, limit: float) -> float:
    """limit / max(norm, limit): Keras's `clipnorm`."""
    return 1.0 if norm <= limit else limit / norm


def keras_global_factor(norm: float, limit: float) -> float:
    """The same; NaN if the norm is not finite: Keras's `global_clipnorm`."""
    return keras_factor(norm, limit) if math.isfinite(norm) else math.nan


def _root(total: float, norm_type: float) -> float:
    try:
        return float(total ** (1 / norm_type))
    except OverflowError:
        return math.inf


def _in_torch(values: Tensor) -> float:
    """The sum over the same blocks for tensors without a kernel. The order within a block is torch's."""
    # Always a copy: `to` alone returns a float64 gradient itself, and it would be squared in place.
    return _added(values.reshape(-1).to(torch.float64, copy=True).square_(), 0.0)


def _added(values: Tensor, total: float) -> float:
    """`total` and the sums of float64 blocks, added in block order."""
    whole = values.numel() // BLOCK_ELEMENTS * BLOCK_ELEMENTS
    for block in values[:whole].view(-1, BLOCK_ELEMENTS).sum(dim=1).tolist():
        total += block
    if whole < values.numel():
        total += float(values[whole:].sum())
    return total
