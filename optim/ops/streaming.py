"""Norms, and values of int8 codes, of a body whose bytes are still arriving.

A block is processed as soon as all of it has arrived, by the thread that wrote it, while it is still in the cache. The
kernels and the order are those of `norms` and `quantise`, so the bits are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cpu import floating_mode
from ..cpu.norms import added_in_order
from ..cpu.pointer_table import KIND
from ..kernels.cache import compiled
from ..kernels.intrinsics import STRIDE
from ..kernels.norms import BLOCK_ELEMENTS, SIGNATURE, block_sums
from ..kernels.quantise import DEQUANTISE_SIGNATURE, SCALE_BYTES
from ..kernels.quantise import dequantise as dequantise_kernel
from ..step.operands import OperandError, check_run
from .quantise import check_block, code_bytes

Array = np.ndarray[Any, Any]


class StreamingNorms:
    """The sums of squares of neighbouring parameters, by blocks, each taken once all its bytes are there."""

    def __init__(self, work: Callable[[Array, int], None], ends: Array, sums: Array, starts: Array) -> None:
        """`ends` and `sums` have one entry per block.

        `work(plan, worker)` fills `sums`. ends: the number of bytes at which each block is complete, ascending. starts:
        shape (parameters + 1,), each parameter's first block.
        """
        self._work = work
        self._ends = ends
        self._sums = sums
        self._starts = starts
        self._done = 0

    def advance(self, arrived_bytes: int) -> None:
        """Process the blocks that are complete once the first `arrived_bytes` bytes are there."""
        stop = int(np.searchsorted(self._ends, arrived_bytes, side="right"))
        if stop > self._done:
            plan = np.zeros(2 * STRIDE, np.int64)
            plan[:3] = 1, 1, stop  # workers, blocks in a slice, blocks
            plan[STRIDE : STRIDE + 2] = self._done, stop
            with floating_mode.default() if floating_mode.flushes() else contextlib.nullcontext():
                self._work(plan, 0)
            self._done = stop

    def first_block_sums(self) -> list[float]:
        """The first parameter's sums by blocks, valid once all bytes are there."""
        return [float(one) for one in self._sums[: self._starts[1]]]

    def square_sums(self) -> list[float]:
        """Each parameter's sum of squares, valid once all bytes are there."""
        return added_in_order(self._sums, self._starts)


class Blocks:
    """Where neighbouring parameters and their blocks begin. Made once for parameters of these lengths."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """OperandError for a negative length."""
        self.sizes = np.asarray(lengths, np.int64)
        if (self.sizes < 0).any():
            raise OperandError(f"a parameter has {self.sizes.min()} elements")
        # first element, and first block; both end with the total
        self.tos, self.starts = (np.zeros(len(self.sizes) + 1, np.int64) for _ in range(2))
        np.cumsum(self.sizes, out=self.tos[1:])
        np.cumsum(-(-self.sizes // BLOCK_ELEMENTS), out=self.starts[1:])


def floats(values: Tensor, blocks: Blocks) -> StreamingNorms:
    """Norms of parameters that lie one after the other in `values`.

    values: contiguous floats on the CPU, of a dtype that has kernels. OperandError if they do not fit.
    """
    sizes, tos, starts = blocks.sizes, blocks.tos, blocks.starts
    check_run("the values", values, int(tos[-1]), *KIND)
    sums = np.zeros(int(starts[-1]))
    kernel = compiled(block_sums, SIGNATURE, KIND[values.dtype])
    work = partial(kernel, values.data_ptr() + tos[:-1] * values.itemsize, sizes, starts, sums)
    return StreamingNorms(work, _ends(sizes, starts, lambda count: count * values.itemsize), sums, starts)


def codes(source: Tensor, values: Tensor, blocks: Blocks, *, block: int) -> StreamingNorms:
    """Norms of parameters that arrive as int8 codes. Their values are written in the same pass.

    source: uint8; values: float32. OperandError if they do not fit.
    """
    sizes, tos, starts = blocks.sizes, blocks.tos, blocks.starts
    sums = np.zeros(int(starts[-1]))
    froms = np.zeros(len(sizes) + 1, np.int64)
    check_block(block)
    np.cumsum(sizes + SCALE_BYTES * -(-sizes // block), out=froms[1:])
    check_run("the codes", source, int(froms[-1]), torch.uint8)
    check_run("the values", values, int(tos[-1]), torch.float32)
    kernel = compiled(dequantise_kernel, DEQUANTISE_SIGNATURE, (block, True))
    work = partial(kernel, source.data_ptr(), values.data_ptr(), froms, tos, sizes, starts, sums)
    return StreamingNorms(work, _ends(sizes, starts, lambda count: code_bytes(count, block)), sums, starts)


def _ends(sizes: Array, starts: Array, nbytes: Callable[[Any], Any]) -> Array:
    """The number of bytes at which each block is complete.

    `nbytes(n)` is the number of bytes of a parameter's first n elements.
    """
    blocks = np.diff(starts)
    whole = nbytes(sizes)
    before = np.repeat(np.cumsum(whole) - whole, blocks)
    place = np.arange(int(starts[-1])) - np.repeat(starts[:-1], blocks) + 1
    elements = np.minimum(place * BLOCK_ELEMENTS, np.repeat(sizes, blocks))
    ends: Array = before + nbytes(elements)
    return ends
