"""A list of tensors as a kernel wants it: one row of addresses per tensor, all of them flat runs of memory.

Making a table means looking at every tensor several times, which for a thousand small ones costs more than
stepping them. So a table is remembered between steps of the same list and only compared: the tensors must be the
same objects and lie where they lay. Gradients are new at every step and always looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, call, is_
from typing import Any, Final
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from . import intrinsics, kernels
from .dispatch import Step

KIND: Final = {
    torch.float32: intrinsics.FLOAT32,
    torch.float64: intrinsics.FLOAT64,
    torch.bfloat16: intrinsics.BFLOAT16,
    torch.float16: intrinsics.FLOAT16,
}
STATE_COLUMNS: Final = (intrinsics.FIRST, intrinsics.SECOND)

_dtype, _is_cpu = attrgetter("dtype"), attrgetter("is_cpu")


@dataclass(slots=True)
class Table:
    """What the dense kernel is launched with, less the numbers."""

    addresses: Any
    starts: Any
    dtypes: dict[int, torch.dtype]


@dataclass(slots=True)
class Known:
    """A list as it was at an earlier step; everything but its gradients. It keeps nothing alive."""

    fixed: dict[int, list[ref[Tensor]]]
    pointers: dict[int, list[int]]
    sizes: list[int]
    table: Table


def operands(step: Step) -> dict[int, Sequence[Tensor]]:
    """The tensors by column, gradients included, step counters not."""
    by_column = {intrinsics.PARAM: step.params, intrinsics.GRAD: step.grads}
    by_column.update(zip(STATE_COLUMNS, step.states, strict=False))
    if step.ema is not None:
        by_column[intrinsics.EMA] = step.ema
    if step.copy_out is not None:
        by_column[intrinsics.COPY] = step.copy_out
    return by_column


def table_of(step: Step) -> Table | None:
    """The table for a step whose tensors are all flat and alike in dtype; None if they are not."""
    by_column = operands(step)
    if len(step.params) == 1 and step.memo is None and step.steps is None:
        return _table_of_one({column: tensors[0] for column, tensors in by_column.items()})
    grads = by_column.pop(intrinsics.GRAD)
    columns: Mapping[int, Sequence[Tensor]] = by_column
    if step.steps is not None:
        columns = {**by_column, kernels.STEP_COLUMN: step.steps}
    known: Known | None = None if step.memo is None else step.memo.get("cpu")
    if known is None or not _still_so(known, columns):
        known = _look(columns)
        if known is None:
            return None
        if step.memo is not None:
            step.memo["cpu"] = known
    if not _flat(grads, known.sizes) or any(map(Tensor.is_neg, grads)):
        return None
    table = known.table
    pointers = list(map(Tensor.data_ptr, grads))
    if not _null_is_empty(pointers, known.sizes):
        return None
    addresses = table.addresses.copy()  # the remembered one may be in use by another thread
    addresses[:, intrinsics.GRAD] = pointers
    return Table(addresses, table.starts, {**table.dtypes, intrinsics.GRAD: grads[0].dtype})


def _table_of_one(tensors: Mapping[int, Tensor]) -> Table | None:
    """The table of a lone parameter, which a server steps many times a second: 7 us, where the way of lists takes 30."""
    size = tensors[intrinsics.PARAM].numel()
    addresses = np.zeros((1, kernels.COLUMNS), np.int64)
    dtypes = {}
    for column, tensor in tensors.items():
        pointer = tensor.data_ptr()
        if not tensor.is_contiguous() or tensor.numel() != size or (pointer == 0 and size):
            return None
        addresses[0, column] = pointer
        dtypes[column] = tensor.dtype
    if tensors[intrinsics.GRAD].is_neg():
        return None
    return Table(addresses, np.array([0, size], np.int64), dtypes)


def _still_so(known: Known, columns: Mapping[int, Sequence[Tensor]]) -> bool:
    """Whether the same tensors lie where they lay: states may have moved, parameters been given other data."""
    if known.fixed.keys() != columns.keys():
        return False
    for column, tensors in columns.items():
        before = known.fixed[column]
        if len(before) != len(tensors) or not all(map(is_, tensors, map(call, before))):
            return False
        if list(map(Tensor.data_ptr, tensors)) != known.pointers[column]:
            return False
    params = columns[intrinsics.PARAM]
    return list(map(Tensor.numel, params)) == known.sizes and all(map(Tensor.is_contiguous, params))


def _look(columns: Mapping[int, Sequence[Tensor]]) -> Known | None:
    sizes = list(map(Tensor.numel, columns[intrinsics.PARAM]))
    for column, tensors in columns.items():
        if column != kernels.STEP_COLUMN and not _flat(tensors, sizes):
            return None
    pointers = {column: list(map(Tensor.data_ptr, tensors)) for column, tensors in columns.items()}
    addresses = np.zeros((len(sizes), kernels.COLUMNS), np.int64)
    starts = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    for column, values in pointers.items():
        addresses[:, column] = values
    dtypes = {column: tensors[0].dtype for column, tensors in columns.items()}
    steps = columns.get(kernels.STEP_COLUMN, ())
    if not (all(map(_is_cpu, steps)) and set(map(_dtype, steps)) in ({torch.float32}, {torch.float64})):
        dtypes.pop(kernels.STEP_COLUMN, None)  # counters of other kinds are advanced by torch
    table = Table(addresses, starts, dtypes)
    for column in columns:
        if column != kernels.STEP_COLUMN and not _null_is_empty(pointers[column], sizes):
            return None
    return Known(
        {column: list(map(ref, tensors)) for column, tensors in columns.items()}, pointers, sizes, table
    )


def _flat(tensors: Sequence[Tensor], sizes: list[int]) -> bool:
    """Whether all are contiguous, of one dtype and of these sizes."""
    return (
        len(set(map(_dtype, tensors))) == 1
        and all(map(Tensor.is_contiguous, tensors))
        and list(map(Tensor.numel, tensors)) == sizes
    )


def _null_is_empty(pointers: list[int], sizes: list[int]) -> bool:
    """Whether only empty tensors have no memory: others without are lazy zeros, or have been freed."""
    return 0 not in pointers or not any(size for p, size in zip(pointers, sizes, strict=True) if p == 0)


def is_one_layout(tensors: Sequence[Tensor]) -> bool:
    """Whether the same flat index means the same element in all of them, in whatever order of dimensions."""
    param = tensors[0]
    if any(t.is_neg() or t.data_ptr() == 0 or t.shape != param.shape for t in tensors):
        return False
    if all(t.is_contiguous() for t in tensors):
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(param.stride(), param.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    places = [d for d, n in enumerate(param.shape) if n > 1]
    return all(t.stride(d) == param.stride(d) for t in tensors for d in places)
