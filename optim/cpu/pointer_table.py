"""Tables of addresses for the dense kernel: one row per tensor of a list, each tensor a flat run of memory.

Making a table looks at every tensor several times. For a thousand small tensors that costs more than the step. So a
table is kept between steps of one list, together with the footprints (`step/footprint.py`) that it was made from. It is
used again only if the footprints are equal. Gradients are new at every step, so they are always looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels import dense as kernels
from ..kernels import intrinsics
from ..step.footprint import Footprint, footprint
from ..step.operands import OperandError
from ..step.overlaps import Waves, waves_of_runs
from ..step.step import Step


class Kinds(dict[torch.dtype, int]):
    """Maps a dtype to the element kind of the kernels. OperandError for a dtype that has no kernel."""

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
    """The tensors of one launch of the dense kernel; the hyperparameters are passed beside it.

    addresses: int64 (tensors, COLUMNS). starts: int64 (tensors + 1,), the first element of each tensor when all are
    laid end to end. dtypes: by column.
    """

    addresses: Any
    starts: Any
    dtypes: dict[int, torch.dtype]


class Known(NamedTuple):
    """What is remembered of a list from an earlier step: everything but its gradients."""

    footprints: dict[int, Footprint]
    counters: Counters | None
    table: Table
    waves: Waves | None
    """The waves in which the list is stepped; None if no tensors overlap."""


def operands(step: Step) -> dict[int, Sequence[Tensor]]:
    """The tensors of a step by column. Gradients are included, step counters are not."""
    by_column = {intrinsics.PARAM: step.params, intrinsics.GRAD: step.grads}
    by_column.update(zip(STATE_COLUMNS, step.states, strict=False))
    if step.ema is not None:
        by_column[intrinsics.EMA] = step.ema
    if step.copy_out is not None:
        by_column[intrinsics.COPY] = step.copy_out
    return by_column


def table_of(step: Step) -> Table | Waves | None:
    """The table of a step whose tensors are all contiguous and of one dtype per column; None if they are not.

    If some tensors overlap in memory, it returns waves instead: they must be stepped one after the other.
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
    except RuntimeError:  # some tensors have no memory of their own: they are sparse
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
        return None  # two parameters share a gradient: the first one's step changes it for the second
    if known.waves is not None:
        return known.waves
    addresses = known.table.addresses.copy()  # another thread may be using the remembered table
    addresses[:, intrinsics.GRAD] = grads[0]
    return Table(addresses, known.table.starts, {**known.table.dtypes, intrinsics.GRAD: grads[1][0]})


def _counters(steps: Sequence[Tensor]) -> Counters:
    """The addresses and the dtypes of step counters. Each counter is one number."""
    return list(map(Tensor.data_ptr, steps)), list(map(_dtype, steps))


def _table_of_one(tensors: Mapping[int, Tensor]) -> Table | None:
    """The table of a step of one parameter, or None if its tensors are not flat.

    A server takes such a step many times a second: this takes 7 us, the code for lists 30.
    """
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
    # Only here: later gradients come from autograd, which checks their shapes.
    if not all(map(_fits, step.params, step.grads)):
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
    """Whether the kernel can advance these counters: all float32 or all float64, on the CPU. Else torch does."""
    return set(map(_dtype, steps)) in ({torch.float32}, {torch.float64}) and all(map(_is_cpu, steps))


def _fits(param: Tensor, tensor: Tensor) -> bool:
    """Whether a flat index means the same element in both tensors.

    A row-wise state fits, too, if the rows of its parameter have one element.
    """
    return tensor.shape == param.shape or tuple(tensor.shape) == (*param.shape, 1)


def _is_flat(lies: Footprint, params: Footprint) -> bool:
    """Whether all tensors are contiguous, of one dtype that has a kernel, and of the parameters' sizes.

    Only an empty tensor may have no memory. Any other tensor without memory holds lazy zeros or was freed.
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
    """Whether all tensors share one dense layout, with any order of dimensions.

    A flat index then means the same element in all of them.
    """
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
