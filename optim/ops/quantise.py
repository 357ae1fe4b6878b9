"""Gradients as int8 codes with one scale per block, to send fewer bytes.

`kernels/quantise.py` has the arithmetic. What a code loses is written to the rest. The caller adds the rest to its next
gradient (error feedback). The sum of all values that were sent then differs from the sum of all gradients only by the
last rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ..cpu.norms import added_in_order
from ..cpu.pointer_table import KIND
from ..cpu.pool import over_slices
from ..kernels.cache import compiled
from ..kernels.norms import BLOCK_ELEMENTS
from ..kernels.quantise import DEQUANTISE_SIGNATURE, QUANTISE_SIGNATURE, SCALE_BYTES
from ..kernels.quantise import dequantise as dequantise_kernel
from ..kernels.quantise import quantise as quantise_kernel
from ..step.operands import OperandError, check_run

Array = np.ndarray[Any, Any]

# 16 M float32 are quantised in 29 ms on two cores, in the same minute in which torch copies them in 14 ms.
SLICE_ELEMENTS: Final = 1 << 16
INLINE_ELEMENTS: Final = 1 << 16


def code_bytes(length: int, block: int) -> int:
    """Number of bytes that the codes and scales of a unit of `length` elements take."""
    return length + SCALE_BYTES * -(-length // block)


def check_block(block: int) -> None:
    """OperandError unless a norm block consists of whole quantisation blocks of `block` elements."""
    if block <= 0 or BLOCK_ELEMENTS % block:
        raise OperandError(f"blocks of {block} elements; it must be a divisor of {BLOCK_ELEMENTS}")


def quantise(
    source: Tensor,
    residual: Tensor,
    rest: Tensor,
    codes: Tensor,
    *,
    length: int,
    block: int,
    begin: int = 0,
    end: int | None = None,
) -> None:
    """Write the codes of `source + residual`, and what they lose, for blocks [begin, end) of all units.

    The loss goes to `rest`. source: contiguous floats, whole units of `length` elements. residual, rest: float32 of as
    many elements. codes: uint8, `code_bytes` of them for each unit. OperandError for tensors or blocks that do not fit.
    """
    check_block(block)
    elements = source.numel()
    units = elements // length if length > 0 else 0
    check_run("the gradient", source, units * length, *KIND)
    check_run("the residual", residual, elements, torch.float32)
    check_run("the rest", rest, elements, torch.float32)
    check_run("the codes", codes, units * code_bytes(length, block), torch.uint8)
    per_unit = -(-length // block)
    blocks = per_unit * units
    stop = blocks if end is None else min(end, blocks)
    if not 0 <= begin <= stop:
        raise OperandError(f"blocks {begin} to {stop} of {blocks}")
    kernel = compiled(quantise_kernel, QUANTISE_SIGNATURE, (KIND[source.dtype], block))
    addresses = (t.data_ptr() for t in (source, residual, rest, codes))
    work = partial(kernel, *addresses, length, begin)
    over_slices(
        work,
        stop - begin,
        slice_size=max(1, SLICE_ELEMENTS // block),
        inline=INLINE_ELEMENTS // block,
    )


def dequantise(codes: Tensor, values: Tensor, lengths: Sequence[int], *, block: int) -> list[float]:
    """Write the float32 values of units, one after the other. Returns each unit's sum of squares, as `norms`.

    codes: uint8. lengths: elements of each unit. OperandError for tensors that do not fit.
    """
    sums, starts = _dequantise(codes, values, np.asarray(lengths, np.int64), block, True)
    return added_in_order(sums, starts)


def dequantise_rows(codes: Tensor, values: Tensor, *, block: int) -> None:
    """Write the float32 values of rows, each a unit of its own.

    values: contiguous, of shape (rows, elements of a row). OperandError for tensors that do not fit.
    """
    if values.dim() != 2:
        raise OperandError(f"rows of shape {tuple(values.shape)}; they must have two dimensions")
    rows, length = values.shape
    _dequantise(codes, values, np.full(rows, length, np.int64), block, False)


def _dequantise(
    codes: Tensor, values: Tensor, lengths: Array, block: int, summed: bool
) -> tuple[Array, Array]:
    check_block(block)
    if (lengths < 0).any():
        raise OperandError(f"a unit has {lengths.min()} elements")
    froms, tos, starts = (np.zeros(len(lengths) + 1, np.int64) for _ in range(3))
    np.cumsum(lengths + SCALE_BYTES * -(-lengths // block), out=froms[1:])
    np.cumsum(lengths, out=tos[1:])
    np.cumsum(-(-lengths // BLOCK_ELEMENTS), out=starts[1:])
    check_run("the codes", codes, int(froms[-1]), torch.uint8)
    check_run("the values", values, int(tos[-1]), torch.float32)
    sums = np.zeros(int(starts[-1]) if summed else 1)
    kernel = compiled(dequantise_kernel, DEQUANTISE_SIGNATURE, (block, summed))
    work = partial(kernel, codes.data_ptr(), values.data_ptr(), froms, tos, lengths, starts, sums)
    over_slices(
        work,
        int(starts[-1]),
        slice_size=SLICE_ELEMENTS // BLOCK_ELEMENTS,
        inline=INLINE_ELEMENTS // BLOCK_ELEMENTS,
    )
    return sums, starts
