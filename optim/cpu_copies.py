"""Copies by the thread pool; see `copies`."""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Final

import torch
from torch import Tensor

from .copy_kernels import LINE_BYTES, SIGNATURE, lines, widen
from .kernel_cache import compiled
from .operands import check_run
from .pool import over_slices
from .table import KIND

# From here on the cache is passed by: whoever reads the target next would find little of it there.
PAST_CACHE_BYTES: Final = 8 << 20
SLICE_LINES: Final = (512 << 10) // LINE_BYTES
INLINE_LINES: Final = (1 << 20) // LINE_BYTES
SLICE_ELEMENTS: Final = 128 << 10
INLINE_ELEMENTS: Final = 256 << 10


def copy_bytes(target: Tensor, source: Tensor) -> None:
    """Copy a contiguous tensor's bytes into another of the same size."""
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
        over_slices(work, whole, threads=None, slice_size=SLICE_LINES, inline=INLINE_LINES)
    ctypes.memmove(to + end, of + end, max(0, nbytes - end))


def copy_wider(target: Tensor, source: Tensor) -> None:
    """Write a contiguous tensor of a half type into a contiguous float32 one of the same size."""
    check_run("the target", target, source.numel(), torch.float32)
    check_run("the source", source, source.numel(), torch.bfloat16, torch.float16)
    work = partial(compiled(widen, SIGNATURE, KIND[source.dtype]), target.data_ptr(), source.data_ptr())
    over_slices(work, target.numel(), threads=None, slice_size=SLICE_ELEMENTS, inline=INLINE_ELEMENTS)
