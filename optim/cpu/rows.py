"""Steps over rows of a table on the CPU: some rows named by ids, or every row with row-wise state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ..kernels import intrinsics
from ..kernels import rows as row_kernels
from ..kernels.cache import compiled
from ..step.operands import check_bounds, check_memory, check_rows, run_of
from ..step.step import RowStep, Step, number
from ..step.unscaling import unscale
from .pointer_table import KIND, STATE_COLUMNS
from .pool import over_slices

# Elements of random rows take several times as long as contiguous ones, so slices are small: 512 rows of 32.
SLICE_ELEMENTS: Final = 1 << 14
INLINE_ELEMENTS: Final = 1 << 12


def scalars_of(step: Step | RowStep) -> Any:
    """The hyperparameters of a step in float64, in the order of the columns in `kernels/dense.py`."""
    momentum = step.ema_momentum if isinstance(step, Step) else 0.0
    clip = step.clip_value if isinstance(step, Step) else None
    return np.array(
        [
            step.rho,
            1 - step.rho,
            step.eps,
            step.weight_decay,
            1.0 if step.grad_scale is None else number(step.grad_scale),
            0.0 if clip is None else clip,
            momentum,
            1 - momentum,
        ]
    )


def wide(*dtypes: torch.dtype) -> bool:
    """Whether a step over these dtypes computes in float64."""
    return torch.float64 in dtypes


@torch.no_grad()
def every_row(step: Step, tensors: dict[int, Tensor], lr: float, factor: float) -> None:
    """Step every row of one dense tensor whose states have one number per row."""
    param, grad = tensors[intrinsics.PARAM], tensors[intrinsics.GRAD]
    flat_param, flat_grad = run_of(param), run_of(grad)
    own = [tensors[column] for column in STATE_COLUMNS if column in tensors]
    states = [run_of(state) for state in own]
    rows = param.shape[0] if param.dim() else 1
    _launch(
        step,
        flat_param,
        None,
        flat_grad,
        states,
        count=rows,
        arranged=None,
        lr=lr,
        factor=factor,
    )()
    for tensor, flat in zip((param, *own), (flat_param, *states), strict=True):
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat)
    if step.zero_grad:
        grad.zero_()
    elif step.grad_scale is not None:
        grad.div_(number(step.grad_scale))


def step_rows(step: RowStep) -> None:
    """Take a step on rows of one table; `RowStep` in `step/step.py` describes it."""
    plan_rows(step)()


def plan_rows(step: RowStep) -> Callable[[], None]:
    """Return a callable that takes a step on rows of one table; `RowStep` in `step/step.py` describes it.

    What can fail fails here, before anything is written: OperandError for tensors that do not fit each other,
    IndexError for an id outside the table.
    """
    if step.found_inf is not None and number(step.found_inf) == 1.0:
        return _nothing
    check_rows(step)
    operands = [step.param, *step.states]
    ids, rows = run_of(step.ids), run_of(step.rows)
    arranged = None
    if step.unique:
        check_bounds(ids, step.param.shape[0])
    else:
        unique, order, segments = arrange(ids, step.param.shape[0])
        if order is not None:
            ids, arranged = unique, (order, segments)
    t: float = step.step if step.steps is None else (step.steps + 1).item()
    lr = number(step.lr) / (1 + (t - 1) * step.lr_decay)
    whole = all(operand.is_contiguous() and not operand.is_neg() for operand in operands)
    # A table with gaps: the named rows are copied out, stepped as a small table, and copied back.
    taken = operands if whole else [operand.index_select(0, ids) for operand in operands]
    named = ids if whole else torch.arange(ids.numel(), dtype=torch.int64, device="cpu")
    unscaled = step if step.grad_scale is None else replace(step, grad_scale=None)
    launch = _launch(unscaled, taken[0], named, rows, taken[1:], ids.numel(), arranged, lr, step.factor)

    def run() -> None:
        if step.steps is not None:
            step.steps += 1
        if step.grad_scale is not None:
            unscale(step.rows, step.grad_scale)
            if rows is not step.rows:
                rows.copy_(step.rows)
        launch()
        if not whole:
            with torch.no_grad():
                for table, touched in zip(operands, taken, strict=True):
                    table.index_copy_(0, ids, touched)

    return run


_NO_IDS: Final = np.zeros(0, np.int64)


def _nothing() -> None:
    """Do nothing: the plan of a step that has nothing to step."""


def _launch(
    step: Step | RowStep,
    param: Tensor,
    ids: Tensor | None,
    rows: Tensor,
    states: Sequence[Tensor],
    count: int,
    arranged: tuple[Tensor, Tensor] | None,
    lr: float,
    factor: float,
) -> Callable[[], None]:
    """Return a call of the kernel for `step` and its operands' dtypes, with its arguments bound."""
    table_rows = param.shape[0] if param.dim() else 1
    width = param.numel() // table_rows if table_rows else 0
    if count == 0 or width == 0:
        return _nothing
    row_wise = states[0].numel() != param.numel()
    spec = row_kernels.RowSpec(
        adadelta=step.rule == "adadelta",
        wide=wide(param.dtype, states[0].dtype),
        param=KIND[param.dtype],
        grad=KIND[rows.dtype],
        state=KIND[states[0].dtype],
        row_wise=row_wise,
        every_row=ids is None,
        merged=arranged is None,
        unscale=step.grad_scale is not None,
        scaled=factor != 1.0,
        maximize=step.maximize,
        coupled=step.weight_decay != 0,
    )
    kernel = compiled(row_kernels.rows_step, row_kernels.ROWS_SIGNATURE, spec)
    pointers = [param.data_ptr(), rows.data_ptr(), *map(Tensor.data_ptr, states)]
    if not all(pointers):
        for what, tensor in zip(
            ("parameter", "rows", "state", "state"), (param, rows, *states), strict=False
        ):
            check_memory(what, tensor)
    addresses = np.array([*pointers, 0][:4], np.int64)
    named = _NO_IDS if ids is None else ids.numpy()
    order, segments = (_NO_IDS, _NO_IDS) if arranged is None else (arranged[0].numpy(), arranged[1].numpy())
    scalars = scalars_of(step)

    work = partial(kernel, addresses, named, order, segments, width, lr, factor, scalars)

    slice_rows, inline = max(1, SLICE_ELEMENTS // width), max(1, INLINE_ELEMENTS // width)
    operands = param, rows, *states

    def launch(_: Any = operands) -> None:  # keeps the tensors alive, whose addresses it uses
        over_slices(work, count, slice_size=slice_rows, inline=inline)

    return launch


def arrange(ids: Tensor, rows: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Unique ascending ids, positions grouped by id in order of appearance, and where each group starts.

    Ids that already ascend strictly are returned unchanged, and the positions are None. IndexError for an id outside
    [0, rows).
    """
    n = ids.numel()
    unique, order, segments = (torch.empty(size, dtype=torch.int64, device="cpu") for size in (n, n, n + 1))
    kernel = compiled(row_kernels.arrange, row_kernels.ARRANGE_SIGNATURE, row_kernels.DIGIT_BITS)
    count = kernel(ids.numpy(), rows, unique.numpy(), order.numpy(), segments.numpy())
    if count < 0:
        raise IndexError(f"index {int(ids[-1 - count])} is out of bounds for dimension 0 with size {rows}")
    if int(segments[0]) == -1:
        return ids, None, segments
    return unique[:count], order, segments[: count + 1]


def coalesce(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`coalesce` of `ops/rows.py` for CPU tensors of a dtype that has kernels. IndexError for a negative id."""
    unique, order, segments = arrange(ids.contiguous(), 2**63 - 1)
    if order is None:
        return ids, rows
    rows = run_of(rows)
    merged = torch.empty((unique.numel(), *rows.shape[1:]), dtype=rows.dtype, device="cpu")
    width = rows[0].numel()
    if width:
        kernel = compiled(row_kernels.merge, row_kernels.MERGE_SIGNATURE, KIND[rows.dtype])
        pointers = (rows.data_ptr(), merged.data_ptr(), order.numpy(), segments.numpy(), width)
        size = max(1, SLICE_ELEMENTS // width)
        over_slices(partial(kernel, *pointers), unique.numel(), slice_size=size, inline=size)
    return unique.clone(), merged
