"""Norms, and values of int8 codes, of a body whose bytes are still coming in.

A block is worked on as soon as all of it is there, which is while it is in the cache, by the thread that put it there.
The kernels and the order are those of `norms` and `quantise`, and so are the bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import floating_mode
from .cpu_norms import added_in_order
from .intrinsics import STRIDE
from .kernel_cache import compiled
from .norm_kernels import BLOCK_ELEMENTS, SIGNATURE, block_sums
from .operands import OperandError, check_run
from .quantise import check_block, code_bytes
from .quantise_kernels import DEQUANTISE_SIGNATURE, SCALE_BYTES
from .quantise_kernels import dequantise as dequantise_kernel
from .table import KIND

Array = np.ndarray[Any, Any]


class Arriving:
    """The blocks of neighbouring parameters, in order; each with the byte at which it is complete."""

    def __init__(self, work: Callable[[Array, int], None], ends: Array, sums: Array, starts: Array) -> None:
        """`work(plan, worker)` fills `sums`, one of each block; starts: (parameters + 1,) first block of each."""
        self._work = work
        self._ends = ends
        self._sums = sums
        self._starts = starts
        self._done = 0

    def advance(self, arrived_bytes: int) -> None:
        """Work on what is complete now that so many bytes are there."""
        stop = int(np.searchsorted(self._ends, arrived_bytes, side="right"))
        if stop > self._done:
            plan = np.zeros(2 * STRIDE, np.int64)
            plan[:3] = 1, 1, stop  # workers, blocks in a slice, blocks
            plan[STRIDE : STRIDE + 2] = self._done, stop
            with floating_mode.default() if floating_mode.flushes() else contextlib.nullcontext():
                self._work(plan, 0)
            self._done = stop

    def square_sums(self) -> list[float]:
        """Each parameter's sum of squares, once all is there."""
        return added_in_order(self._sums, self._starts)


def floats(values: Tensor, lengths: Sequence[int]) -> Arriving:
    """Norms of parameters of these lengths, one after the other in `values`: flat, of a dtype that is sent."""
    sizes, tos, starts = _places(lengths)
    check_run("the values", values, int(tos[-1]), *KIND)
    sums = np.zeros(int(starts[-1]))
    kernel = compiled(block_sums, SIGNATURE, KIND[values.dtype])
    work = partial(kernel, values.data_ptr() + tos[:-1] * values.itemsize, sizes, starts, sums)
    return Arriving(work, _ends(sizes, starts, lambda count: count * values.itemsize), sums, starts)


def codes(source: Tensor, values: Tensor, lengths: Sequence[int], *, block: int) -> Arriving:
    """Norms of parameters in int8, whose values are written on the way. source: uint8; values: float32."""
    sizes, tos, starts = _places(lengths)
    sums = np.zeros(int(starts[-1]))
    froms = np.zeros(len(sizes) + 1, np.int64)
    check_block(block)
    np.cumsum(sizes + SCALE_BYTES * -(-sizes // block), out=froms[1:])
    check_run("the codes", source, int(froms[-1]), torch.uint8)
    check_run("the values", values, int(tos[-1]), torch.float32)
    kernel = compiled(dequantise_kernel, DEQUANTISE_SIGNATURE, (block, True))
    work = partial(kernel, source.data_ptr(), values.data_ptr(), froms, tos, sizes, starts, sums)
    return Arriving(work, _ends(sizes, starts, lambda count: code_bytes(count, block)), sums, starts)


def _places(lengths: Sequence[int]) -> tuple[Array, Array, Array]:
    """Elements of each parameter, its first one, and its first block."""
    sizes = np.asarray(lengths, np.int64)
    if (sizes < 0).any():
        raise OperandError(f"a parameter has {sizes.min()} elements")
    tos, starts = (np.zeros(len(sizes) + 1, np.int64) for _ in range(2))
    np.cumsum(sizes, out=tos[1:])
    np.cumsum(-(-sizes // BLOCK_ELEMENTS), out=starts[1:])
    return sizes, tos, starts


def _ends(sizes: Array, starts: Array, nbytes: Callable[[Any], Any]) -> Array:
    """The byte at which each block is complete; nbytes: of so many elements of one parameter."""
    blocks = np.diff(starts)
    whole = np.array([nbytes(int(size)) for size in sizes], np.int64)
    before = np.repeat(np.cumsum(whole) - whole, blocks)
    place = np.arange(int(starts[-1])) - np.repeat(starts[:-1], blocks) + 1
    elements = np.minimum(place * BLOCK_ELEMENTS, np.repeat(sizes, blocks))
    ends: Array = before + nbytes(elements)
    return ends
