"""Copies in host memory by the thread pool; `ops/copies.py` calls them."""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from ..kernels.cache import compiled
from ..kernels.copies import LINE_BYTES, RUNS_SIGNATURE, SIGNATURE, lines, runs, widen
from ..step.operands import check_run
from .pointer_table import KIND
from .pool import over_slices

# A copy of this size or more bypasses the cache: little of so large a target would still be there when it is next read.
PAST_CACHE_BYTES: Final = 8 << 20
SLICE_LINES: Final = (512 << 10) // LINE_BYTES
INLINE_LINES: Final = (1 << 20) // LINE_BYTES
SLICE_ELEMENTS: Final = 128 << 10
INLINE_ELEMENTS: Final = 256 << 10


def copy_bytes(target: Tensor, source: Tensor) -> None:
    """Copy a contiguous CPU tensor's bytes into another of the same size and dtype.

    OperandError if the tensors do not fit.
    """
    check_run("the target", target, source.numel(), source.dtype)
    check_run("the source", source, source.numel(), source.dtype)
    nbytes, to, of = target.numel() * target.itemsize, target.data_ptr(), source.data_ptr()
    head = -to % LINE_BYTES
    whole = max(0, nbytes - head) // LINE_BYTES
    end = head + whole * LINE_BYTES
    ctypes.memmove(to, of, min(head, nbytes))
    if whole:
        kernel = compiled(lines, SIGNATURE, nbytes >= PAST_CACHE_BYTES)
        work = partial(kernel, to + head, of + head)
        over_slices(work, whole, slice_size=SLICE_LINES, inline=INLINE_LINES)
    ctypes.memmove(to + end, of + end, max(0, nbytes - end))


def copy_wider(target: Tensor, source: Tensor) -> None:
    """Write a contiguous bfloat16 or float16 CPU tensor into a contiguous float32 tensor of the same size.

    OperandError if the tensors do not fit.
    """
    check_run("the target", target, source.numel(), torch.float32)
    check_run("the source", source, source.numel(), torch.bfloat16, torch.float16)
    work = partial(compiled(widen, SIGNATURE, KIND[source.dtype]), target.data_ptr(), source.data_ptr())
    over_slices(work, target.numel(), slice_size=SLICE_ELEMENTS, inline=INLINE_ELEMENTS)


def copy_runs(targets: Any, sources: Any, starts: Any, begin: int, end: int) -> None:
    """Copy runs of memory between addresses; `kernels/copies.py` describes the arguments.

    Laid end to end, the bytes [begin, end) of the runs are copied. The caller has checked the addresses.
    """
    if end > begin:
        kernel = compiled(runs, RUNS_SIGNATURE, end - begin >= PAST_CACHE_BYTES)
        work = partial(kernel, targets, sources, starts, begin)
        over_slices(work, end - begin, slice_size=SLICE_LINES * LINE_BYTES, inline=INLINE_LINES * LINE_BYTES)
