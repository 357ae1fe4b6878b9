"""A list of tensors as a kernel wants it: one row of addresses per tensor, all of them flat runs of memory.

Making a table means looking at every tensor several times, which for a thousand small ones costs more than
stepping them. So a table is remembered between steps of the same list under the footprints that it was made from, and
they are compared. Gradients are new at every step and always looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import intrinsics, kernels
from .footprint import Footprint, footprint
from .operands import OperandError
from .overlaps import Waves, waves_of_runs
from .step import Step


class Kinds(dict[torch.dtype, int]):
    """What kernels call a dtype; OperandError for one that they do not know."""

    def __missing__(self, dtype: torch.dtype) -> int:
        raise OperandError(f"{dtype} has no kernel")


KIND: Final = Kinds(
    {
        torch.float32: intrinsics.FLOAT32,
        torch.float64: intrinsics.FLOAT64,
        torch.bfloat16: intrinsics.BFLOAT16,
        torch.float16: intrinsics.FLOAT16,
    }
)
STATE_COLUMNS: Final = (intrinsics.FIRST, intrinsics.SECOND)

_dtype, _is_cpu = attrgetter("dtype"), attrgetter("is_cpu")

Counters = tuple[list[int], list[torch.dtype]]


@dataclass(slots=True)
class Table:
    """What the dense kernel is launched with, less the numbers."""

    addresses: Any
    starts: Any
    dtypes: dict[int, torch.dtype]


class Known(NamedTuple):
    """A list as it was at an earlier step; everything but its gradients."""

    footprints: dict[int, Footprint]
    counters: Counters | None
    table: Table
    waves: Waves | None
    """What may be stepped at a time, where tensors overlap."""


def operands(step: Step) -> dict[int, Sequence[Tensor]]:
    """The tensors by column, gradients included, step counters not."""
    by_column = {intrinsics.PARAM: step.params, intrinsics.GRAD: step.grads}
    by_column.update(zip(STATE_COLUMNS, step.states, strict=False))
    if step.ema is not None:
        by_column[intrinsics.EMA] = step.ema
    if step.copy_out is not None:
        by_column[intrinsics.COPY] = step.copy_out
    return by_column


def table_of(step: Step) -> Table | Waves | None:
    """The table for a step whose tensors are all flat and alike in dtype; None if they are not.

    Where some overlap: which are to be stepped together, and what after them.
    """
    columns = operands(step)
    memo = step.memo
    if len(step.params) == 1 and memo is None and step.steps is None:
        return _table_of_one({column: tensors[0] for column, tensors in columns.items()})
    try:
        params, grads = step.seen or (footprint(step.params), footprint(step.grads))
        footprints = {
            column: footprint(tensors) if column != intrinsics.PARAM else params
            for column, tensors in columns.items()
            if column != intrinsics.GRAD
        }
    except RuntimeError:  # not all of them have memory: some are sparse
        return None
    counters = None if step.steps is None else _counters(step.steps)
    known: Known | None = None if memo is None else memo.get("cpu")
    if known is None or known.footprints != footprints or known.counters != counters:
        known = _look(step, columns, footprints, counters)
        if known is None:
            return None
        if memo is not None:
            memo["cpu"] = known
    if any(map(Tensor.is_neg, step.grads)):
        return None
    if memo is None or memo.get("cpu gradients") != grads:
        if not (_is_flat(grads, params) and all(map(_is_cpu, step.grads))):
            return None
        if memo is not None:
            memo["cpu gradients"] = grads
    if step.writes_grad and len(set(grads[0])) < len(grads[0]):
        return None  # some have one gradient, which changes with each
    if known.waves is not None:
        return known.waves
    addresses = known.table.addresses.copy()  # the remembered one may be in use by another thread
    addresses[:, intrinsics.GRAD] = grads[0]
    return Table(addresses, known.table.starts, {**known.table.dtypes, intrinsics.GRAD: grads[1][0]})


def _counters(steps: Sequence[Tensor]) -> Counters:
    """Where step counters lie, and as what; each is one number."""
    return list(map(Tensor.data_ptr, steps)), list(map(_dtype, steps))


def _table_of_one(tensors: Mapping[int, Tensor]) -> Table | None:
    """The table of a lone parameter, which a server steps many times a second: 7 us, where the way of lists takes 30."""
    shape, size = tensors[intrinsics.PARAM].shape, tensors[intrinsics.PARAM].numel()
    addresses = np.zeros((1, kernels.COLUMNS), np.int64)
    dtypes = {}
    for column, tensor in tensors.items():
        pointer = tensor.data_ptr()
        if (
            tensor.shape != shape
            or not tensor.is_cpu
            or not tensor.is_contiguous()
            or (pointer == 0 and size)
        ):
            return None
        addresses[0, column] = pointer
        dtypes[column] = tensor.dtype
    second = dtypes.get(intrinsics.SECOND)
    if any(map(Tensor.is_neg, tensors.values())) or (
        second is not None and second != dtypes[intrinsics.FIRST]
    ):
        return None
    return Table(addresses, np.array([0, size], np.int64), dtypes)


def _look(
    step: Step,
    columns: Mapping[int, Sequence[Tensor]],
    footprints: dict[int, Footprint],
    counters: Counters | None,
) -> Known | None:
    params = footprints[intrinsics.PARAM]
    if not all(map(_fits, step.params, step.grads)):  # later ones come from autograd, which sees to it
        return None
    if counters is not None and set(map(Tensor.numel, step.steps or ())) != {1}:
        return None
    for column, lies in footprints.items():
        tensors = columns[column]
        if not (
            _is_flat(lies, params)
            and all(map(_is_cpu, tensors))
            and not any(map(Tensor.is_neg, tensors))
            and all(map(_fits, step.params, tensors))
        ):
            return None
    dtypes = {column: dtype[0] for column, (_, dtype, _, _) in footprints.items()}
    if dtypes.get(intrinsics.SECOND, dtypes[intrinsics.FIRST]) != dtypes[intrinsics.FIRST]:
        return None
    addresses = np.zeros((len(step.params), kernels.COLUMNS), np.int64)
    starts = np.zeros(len(step.params) + 1, np.int64)
    np.cumsum(params[2], out=starts[1:])
    begins = np.array([pointers for pointers, _, _, _ in footprints.values()], np.int64)
    addresses[:, list(footprints)] = begins.T
    if counters is not None and _can_count(step.steps or ()):
        addresses[:, kernels.STEP_COLUMN] = counters[0]
        dtypes[kernels.STEP_COLUMN] = counters[1][0]
    lengths = np.outer([dtypes[column].itemsize for column in footprints], params[2])
    waves = waves_of_runs(begins, begins + lengths)
    return Known(footprints, counters, Table(addresses, starts, dtypes), waves)


def _can_count(steps: Sequence[Tensor]) -> bool:
    """Whether a kernel can; counters of other kinds are advanced by torch."""
    return set(map(_dtype, steps)) in ({torch.float32}, {torch.float64}) and all(map(_is_cpu, steps))


def _fits(param: Tensor, tensor: Tensor) -> bool:
    """Whether the same place means the same element; a state of one number per row may be one of each element."""
    return tensor.shape == param.shape or tuple(tensor.shape) == (*param.shape, 1)


def _is_flat(lies: Footprint, params: Footprint) -> bool:
    """Whether all are contiguous, of one dtype that a kernel knows and of the parameters' sizes.

    Only empty ones may have no memory: others without are lazy zeros, or have been freed.
    """
    pointers, dtypes, sizes, contiguous = lies
    return (
        contiguous
        and dtypes[0] in KIND
        and dtypes.count(dtypes[0]) == len(dtypes)
        and sizes == params[2]
        and (0 not in pointers or not any(n for p, n in zip(pointers, sizes, strict=True) if p == 0))
    )


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
