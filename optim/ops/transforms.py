"""What hooks do to gradients before a step: scaled, clipped by value, given noise, centralized.

Each function reads `source`, the gradients of tensors that lie one behind the other, multiplies each tensor's by its factor,
and writes the result to `target`, in the dtype in which they are stepped; the two may be the same tensor. Factors and bounds
are rounded to that dtype first. Any split of the same elements (of whole rows for `centralize`) gives the same bits, and so
does any number of threads. Tensors that are not on the CPU take torch's operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from .normal import normals

SLICE_BLOCKS: Final = 16
INLINE_BLOCKS: Final = 16
# Of `centralize`: elements that a thread takes at once, and that the caller takes alone.
SLICE_ELEMENTS: Final = 1 << 16
# Rows of tensors that are not centralized, which are only copied.
COPIED_ELEMENTS: Final = 4096
# Elements of an average that a thread takes at once, and that the caller takes alone.
AVERAGE_SLICE: Final = 1 << 16
AVERAGE_INLINE: Final = 1 << 16
_NO_KEYS: Final = np.zeros(0, np.uint64)
_NO_IDS: Final = np.zeros(0, np.int64)


def scale(target: Tensor, source: Tensor, sizes: Sequence[int], factors: Sequence[float]) -> None:
    """Multiply each tensor by its factor. sizes: elements of each of the tensors."""
    if _is_elsewhere(target, source):
        _scaled_elsewhere(target, source, sizes, factors)
    else:
        _elementwise("SCALE", target, source, sizes, factors)


def clip(
    target: Tensor, source: Tensor, sizes: Sequence[int], factors: Sequence[float], bound: float
) -> None:
    """Bring each element between -bound and bound, as torch's clip_grad_value_ does. NaN stays."""
    if _is_elsewhere(target, source):
        _scaled_elsewhere(target, source, sizes, factors)
        limit = torch.full((), bound, dtype=target.dtype, device=target.device)
        target.copy_(torch.clamp(target, -limit, limit))
    else:
        _elementwise("CLIP", target, source, sizes, factors, bound)


def add_noise(
    target: Tensor,
    source: Tensor,
    sizes: Sequence[int],
    factors: Sequence[float],
    stddev: float,
    keys: Sequence[int],
    ids: Tensor | None = None,
) -> None:
    """Add `stddev` times a normal deviate to each element: that of its number in its tensor, under the tensor's key.

    ids: of rows of one tensor, their numbers; the element's number is then that in the whole table.
    """
    row = 0 if ids is None or not ids.numel() else sizes[0] // ids.numel()
    known = _NO_IDS if ids is None else ids.cpu().numpy()
    if _is_elsewhere(target, source):
        _scaled_elsewhere(target, source, sizes, factors)
        numbers: Any
        for key, (start, stop) in zip(keys, pairwise(accumulate(sizes, initial=0)), strict=True):
            numbers = np.arange(stop - start, dtype=np.int64)
            if row:
                numbers = known[numbers // row] * row + numbers % row
            noise = torch.from_numpy(stddev * normals(key, numbers)).to(target.dtype)
            target[start:stop] += noise.to(target.device)
    else:
        _elementwise("NOISE", target, source, sizes, factors, stddev, np.array(keys, np.uint64), known, row)


def centralize(
    target: Tensor, source: Tensor, sizes: Sequence[int], factors: Sequence[float], rows: Sequence[int]
) -> None:
    """Take the mean of each row from it. rows: elements of a row of each tensor; 0 for one that is only scaled."""
    if _is_elsewhere(target, source):
        _scaled_elsewhere(target, source, sizes, factors)
        for row, (start, stop) in zip(rows, pairwise(accumulate(sizes, initial=0)), strict=True):
            if row and stop > start:
                table = target[start:stop].view(-1, row)
                table -= table.to(torch.float64).mean(1, keepdim=True).to(table.dtype)
        return
    from ..cpu.pool import over_slices
    from ..kernels.cache import compiled
    from ..kernels.transforms.elementwise import ROWS_SIGNATURE
    from ..kernels.transforms.elementwise import centralize as kernel_of

    spec = _checked(target, source, sum(sizes))
    lengths = np.array([row or COPIED_ELEMENTS for row in rows], np.int64)
    counts = -(-np.array(sizes, np.int64) // lengths)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    work = partial(
        compiled(kernel_of, ROWS_SIGNATURE, spec),
        target.data_ptr(),
        source.data_ptr(),
        np.array([0, *accumulate(sizes)], np.int64),
        starts,
        lengths,
        np.array([row > 0 for row in rows], np.bool_),
        np.array(factors, np.float64),
    )
    slice_rows = max(1, SLICE_ELEMENTS // int(lengths.max(initial=1)))
    over_slices(work, int(starts[-1]), slice_size=slice_rows, inline=slice_rows)


def plan_average(average: Tensor, parameters: Tensor, momentum: float) -> Callable[[], None]:
    """Prepare average = fma(1 - momentum, p - average, average), as `optim.keras` has it; p itself for a momentum of 0."""
    rest = 1.0 - momentum
    if _is_elsewhere(average, parameters):
        return partial(_average_elsewhere, average, parameters, rest)
    from ..cpu.pool import over_slices
    from ..kernels.cache import compiled
    from ..kernels.transforms.elementwise import AVERAGE_SIGNATURE
    from ..kernels.transforms.elementwise import average as kernel_of

    spec = _checked(average, parameters, average.numel())
    kernel = compiled(kernel_of, AVERAGE_SIGNATURE, spec)
    work = partial(kernel, average.data_ptr(), parameters.data_ptr(), rest)
    return partial(over_slices, work, average.numel(), slice_size=AVERAGE_SLICE, inline=AVERAGE_INLINE)


def _average_elsewhere(average: Tensor, parameters: Tensor, rest: float) -> None:
    p = parameters.to(average.dtype)
    if rest == 1.0:
        average.copy_(p)
    else:
        average.add_((p - average) * torch.full((), rest, dtype=average.dtype, device=average.device))


def _elementwise(
    operation: str,
    target: Tensor,
    source: Tensor,
    sizes: Sequence[int],
    factors: Sequence[float],
    number: float = math.inf,
    keys: Any = _NO_KEYS,
    ids: Any = _NO_IDS,
    row: int = 0,
) -> None:
    from ..cpu.pool import over_slices
    from ..kernels.cache import compiled
    from ..kernels.transforms import elementwise as kernels

    kind, total_kind = _checked(target, source, sum(sizes))
    borders = np.array([0, *accumulate(sizes)], np.int64)
    starts = np.array([0, *accumulate(-(-size // kernels.BLOCK_ELEMENTS) for size in sizes)], np.int64)
    make: Callable[..., Any] = kernels.elementwise
    work = partial(
        compiled(make, kernels.SIGNATURE, (getattr(kernels, operation), kind, total_kind)),
        target.data_ptr(),
        source.data_ptr(),
        borders,
        starts,
        np.array(factors, np.float64),
        number,
        keys,
        ids,
        row,
    )
    over_slices(work, int(starts[-1]), slice_size=SLICE_BLOCKS, inline=INLINE_BLOCKS)


def _is_elsewhere(*tensors: Tensor) -> bool:
    """True if the kernels cannot take these tensors."""
    from ..step.step import FUSED_DTYPES

    return not all(tensor.is_cpu and tensor.dtype in FUSED_DTYPES for tensor in tensors)


def _checked(target: Tensor, source: Tensor, elements: int) -> tuple[int, int]:
    """The element kinds of source and target. OperandError if the kernels cannot take them."""
    from ..cpu.pointer_table import KIND
    from ..step.operands import check_run

    check_run("a gradient", source, elements, *KIND)
    check_run("a changed gradient", target, elements, torch.float32, torch.float64)
    return KIND[source.dtype], KIND[target.dtype]


def _scaled_elsewhere(target: Tensor, source: Tensor, sizes: Sequence[int], factors: Sequence[float]) -> None:
    wide = source.to(target.dtype)
    for factor, (start, stop) in zip(factors, pairwise(accumulate(sizes, initial=0)), strict=True):
        by = torch.full((), factor, dtype=target.dtype, device=target.device)
        target[start:stop] = wide[start:stop] * by
