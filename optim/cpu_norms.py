"""Block norms on the CPU; see `norms`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Final

import numpy as np
from torch import Tensor

from .kernel_cache import compiled
from .norm_kernels import BLOCK_ELEMENTS, SIGNATURE, block_sums
from .pool import over_slices
from .table import KIND

SLICE_BLOCKS: Final = 64
INLINE_BLOCKS: Final = 32


def square_sums(tensors: Sequence[Tensor], *, threads: int | None = None) -> list[float]:
    """Sums of squares of CPU tensors, one per tensor, in the order that `norm_kernels` states."""
    totals = [0.0] * len(tensors)
    for dtype in {t.dtype for t in tensors}:
        members = [k for k, t in enumerate(tensors) if t.dtype == dtype]
        # a view more of each would take as long as the kernel does for some thousand elements
        flat = [
            t if _is_flat(t) else t.detach().resolve_neg().contiguous()
            for t in map(tensors.__getitem__, members)
        ]
        addresses = np.array([t.data_ptr() for t in flat], np.int64)
        sizes = np.array([t.numel() for t in flat], np.int64)
        starts = np.zeros(len(flat) + 1, np.int64)
        np.cumsum(-(-sizes // BLOCK_ELEMENTS), out=starts[1:])
        blocks = int(starts[-1])
        sums = np.zeros(blocks)
        kernel = compiled(block_sums, SIGNATURE, KIND[dtype])

        work = partial(kernel, addresses, sizes, starts, sums)
        over_slices(work, blocks, threads=threads, slice_size=SLICE_BLOCKS, inline=INLINE_BLOCKS)
        for k, total in zip(members, added_in_order(sums, starts), strict=True):
            totals[k] = total
    return totals


def _is_flat(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_neg()


def added_in_order(sums: np.ndarray[Any, Any], starts: np.ndarray[Any, Any]) -> list[float]:
    """The total of each tensor's block sums, block after block. starts: (tensors + 1,) first block of each."""
    parts = (sums[start:stop] for start, stop in pairwise(starts))
    # cumsum adds in order; sum does not
    return [float(np.cumsum(part)[-1]) if len(part) else 0.0 for part in parts]
