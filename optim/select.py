"""The largest elements of a gradient, exactly and the same whatever the number of threads.

A radix selection: the k-th largest magnitude is found from counts of its leading bits, eleven at a time, each a read
of memory; one more read takes what lies above it, in order of index. Of equal magnitudes the first are taken; NaN
counts as larger than all else, so that it is not hidden.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .kernel_cache import compiled
from .operands import OperandError, check_run
from .pool import over_slices
from .select_kernels import COUNT_SIGNATURE, LEVEL_BITS, TAKE_SIGNATURE, count, key_bits, take
from .table import KIND

Array = np.ndarray[Any, Any]

# 16 M float32, 1 % of them taken: 91 ms, of which a plain copy of as many takes 11; torch.topk and a sort take 540.
# The counts of a slice are 16 KiB, so there are not many slices.
SLICE_ELEMENTS: Final = 1 << 16
MOST_SLICES: Final = 256
INLINE_ELEMENTS: Final = 1 << 15


class _Threshold(NamedTuple):
    """Where the selection ends: the key of its last element, and per slice how many are above and at that key."""

    key: int
    above: Array
    at: Array
    wanted_at: int


def select(
    source: Tensor,
    residual: Tensor | None,
    rest: Tensor,
    k: int,
    *,
    wire: torch.dtype,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest of `source + residual`: (ascending int64 indices, values in `wire`); `rest` is what they leave.

    source: contiguous, of at least k elements; residual and rest: float32 or float64, as many. Where the rest
    would not be finite it is the residual, or zero.
    """
    n = source.numel()
    check_run("the gradient", source, n, *KIND)
    check_run("the rest", rest, n, torch.float32, torch.float64)
    if residual is not None:
        check_run("the residual", residual, n, rest.dtype)
    if not min(n, 1) <= k <= n:
        raise OperandError(f"the {k} largest of {n} elements")
    size = max(SLICE_ELEMENTS, -(-n // MOST_SLICES))
    over = partial(over_slices, total=n, threads=threads, slice_size=size, inline=INLINE_ELEMENTS)
    slices = -(-n // size)
    owed = 0 if residual is None else residual.data_ptr()
    threshold = _threshold(source, owed, rest, k, slices, over)
    ends = np.minimum(np.cumsum(threshold.at), threshold.wanted_at)
    ties = np.diff(ends, prepend=0)
    taken = threshold.above + ties
    indices, values = np.empty(k, np.int64), torch.empty(k, dtype=wire, device="cpu")
    kernel = compiled(take, TAKE_SIGNATURE, (KIND[rest.dtype], KIND[wire], bool(owed)))
    places = np.cumsum(taken) - taken
    over(partial(kernel, rest.data_ptr(), owed, values.data_ptr(), indices, threshold.key, places, ties))
    return torch.from_numpy(indices), values


def _threshold(source: Tensor, owed: int, rest: Tensor, k: int, slices: int, over: Any) -> _Threshold:
    kind, held = KIND[source.dtype], KIND[rest.dtype]
    counts, above = np.empty((slices, 1 << LEVEL_BITS), np.int64), np.empty(slices, np.int64)
    key, wanted, left = 0, k, key_bits(held)
    first = True
    while left:
        # the first level takes what is over, so that the others are whole
        bits = left % LEVEL_BITS or LEVEL_BITS
        left -= bits
        spec = (kind, held, first, first and bool(owed))
        kernel = compiled(count, COUNT_SIGNATURE, spec if first else (held, held, False, False))
        over(partial(kernel, source.data_ptr(), owed, rest.data_ptr(), left, key, counts, above))
        from_top = np.cumsum(counts.sum(axis=0)[::-1])
        place = int(np.searchsorted(from_top, wanted))
        wanted -= int(from_top[place - 1]) if place else 0
        digit = (1 << LEVEL_BITS) - 1 - place
        key = key << LEVEL_BITS | digit
        first = False
    return _Threshold(key, above + counts[:, digit + 1 :].sum(axis=1), counts[:, digit], wanted)
