"""The k largest elements of a gradient, exactly. The number of threads does not change the result.

It is a radix selection. Counts of leading bits, eleven at a time, give the k-th largest magnitude; each count is one
read of memory. One more read takes the elements above it, in order of index. Of equal magnitudes the first are taken.
NaN counts as larger than everything else, so that it is not hidden.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..cpu.pointer_table import KIND
from ..cpu.pool import over_slices
from ..kernels.cache import compiled
from ..kernels.select import COUNT_SIGNATURE, LEVEL_BITS, TAKE_SIGNATURE, count, key_bits, take
from ..step.operands import OperandError, check_run

Array = np.ndarray[Any, Any]

# To take 1 % of 16 M float32 takes 91 ms; torch.topk and a sort take 540 ms.
# The counts of a slice are 16 KiB, so the number of slices is limited.
SLICE_ELEMENTS: Final = 1 << 16
MOST_SLICES: Final = 256
INLINE_ELEMENTS: Final = 1 << 15


class _Threshold(NamedTuple):
    """The end of the selection: the key of its last element, and each slice's counts above and at that key.

    `wanted_at` is how many elements at that key are taken.
    """

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
) -> tuple[Tensor, Tensor]:
    """The k largest elements of `source + residual`: ascending int64 indices, and values in dtype `wire`.

    What they leave is written to `rest`. source: contiguous, of at least k elements. residual, rest: both float32 or
    both float64, of as many elements. Where the rest would not be finite it is the residual, or zero without one.
    OperandError for tensors or a k that do not fit.
    """
    n = source.numel()
    check_run("the gradient", source, n, *KIND)
    check_run("the rest", rest, n, torch.float32, torch.float64)
    if residual is not None:
        check_run("the residual", residual, n, rest.dtype)
    if not min(n, 1) <= k <= n:
        raise OperandError(f"the {k} largest of {n} elements")
    size = max(SLICE_ELEMENTS, -(-n // MOST_SLICES))
    over = partial(over_slices, total=n, slice_size=size, inline=INLINE_ELEMENTS)
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
        # the first level takes the remainder of the bits, so that each other level has LEVEL_BITS
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
