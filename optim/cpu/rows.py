"""Steps over rows of a table on the CPU: some rows named by ids, or every row with row-wise state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels import intrinsics
from ..kernels.cache import compiled
from ..kernels.rows import step as row_kernels
from ..step.operands import check_bounds, check_memory, check_rows, run_of
from ..step.step import RowStep, Step, number, one_by_one
from ..step.unscaling import unscale
from .merging import Arranged, check_all_bounds
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
    operands = _Operands(flat_param.view(rows, -1), None, flat_grad, states)
    if operands.width:
        _launch(_spec(step, operands, factor), [operands], [(lr, factor)], scalars_of(step))()
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
    whole_operands = [step.param, *step.states]
    ids, rows = run_of(step.ids), run_of(step.rows)
    arranged = None
    if step.unique:
        check_bounds(ids, step.param.shape[0])
    else:
        found = Arranged([ids], [step.param.shape[0]])
        if not found.is_as_given(0):
            ids, arranged = found.ids(0), found
    t: float = step.step if step.steps is None else (step.steps + 1).item()
    lr = _rate(step, t)
    whole = all(operand.is_contiguous() and not operand.is_neg() for operand in whole_operands)
    # A table with gaps: the named rows are copied out, stepped as a small table, and copied back.
    taken = whole_operands if whole else [operand.index_select(0, ids) for operand in whole_operands]
    named = ids if whole else torch.arange(ids.numel(), dtype=torch.int64, device="cpu")
    unscaled = step if step.grad_scale is None else replace(step, grad_scale=None)
    operands = _Operands(taken[0], named, rows, taken[1:], arranged)
    launch = _nothing
    if operands.width and ids.numel():
        launch = _launch(
            _spec(unscaled, operands, step.factor), [operands], [(lr, step.factor)], scalars_of(unscaled)
        )

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
                for table, touched in zip(whole_operands, taken, strict=True):
                    table.index_copy_(0, ids, touched)

    return run


def _nothing() -> None:
    """Do nothing: the plan of a step that has nothing to step."""


def plan_tables(steps: Sequence[RowStep]) -> Callable[[], None]:
    """Return a callable that takes the steps of several tables, as `plan_rows` would one after the other.

    Tables of the same dtypes and hyperparameters are stepped together. No two steps are of the same table.
    """
    kinds: dict[Any, list[tuple[RowStep, Any]]] = {}
    others: list[RowStep] = []
    named: list[tuple[Tensor, int]] = []
    for step in steps:
        if not _is_plain(step):
            others.append(step)
            continue
        check_rows(step)
        ids, rows = run_of(step.ids), run_of(step.rows)
        named.append((ids, step.param.shape[0]))
        operands = _Operands(step.param, ids, rows, step.states, None, step.marks)
        if not operands.width or not ids.numel():
            continue
        # of a plain step, these are all that `scalars_of` reads
        kind = _spec(step, operands, step.factor), (step.rho, step.eps, step.weight_decay), step.mark
        kinds.setdefault(kind, []).append((step, operands))
    if named:
        check_all_bounds(*zip(*named, strict=True))
    plans = [one_by_one(plan_rows, others)] if others else []
    for (spec, _, mark), members in kinds.items():
        rates = [(_rate(step, step.step), step.factor) for step, _ in members]
        scalars = scalars_of(members[0][0])
        plans.append(_launch(spec, [operands for _, operands in members], rates, scalars, mark))

    def run() -> None:
        for take in plans:
            take()

    return run


def _is_plain(step: RowStep) -> bool:
    """True if the kernel can step the table where it lies, together with others."""
    counts = step.steps is not None or step.grad_scale is not None or step.found_inf is not None
    tables = (step.param, *step.states)
    lie = all(table.is_contiguous() and not table.is_neg() for table in tables)
    return step.unique and not counts and lie


def _rate(step: RowStep, count: float) -> float:
    """The learning rate at a table's step of this number."""
    return number(step.lr) / (1 + (count - 1) * step.lr_decay)


class _Operands(NamedTuple):
    """What the kernel reads and writes of one table. Without ids, every row is stepped."""

    param: Tensor
    ids: Tensor | None
    rows: Tensor
    states: Sequence[Tensor]
    arranged: Arranged | None = None
    marks: Tensor | None = None

    @property
    def width(self) -> int:
        """Elements of a row."""
        table_rows = self.param.shape[0] if self.param.dim() else 1
        return self.param.numel() // table_rows if table_rows else 0

    @property
    def stepped(self) -> int:
        """How many rows are stepped."""
        if self.ids is not None:
            return self.ids.numel()
        return self.param.shape[0] if self.param.dim() else 1

    def entries(self) -> list[int]:
        """The table's columns for the kernel. OperandError for a tensor without memory."""
        pointers = [self.param.data_ptr(), self.rows.data_ptr(), *map(Tensor.data_ptr, self.states)]
        if not all(pointers):
            named = ("parameter", "rows", "state", "state")
            for what, tensor in zip(named, (self.param, self.rows, *self.states), strict=False):
                check_memory(what, tensor)
        arranged = self.arranged
        return [
            *[*pointers, 0][:4],
            0 if self.ids is None else self.ids.data_ptr(),
            0 if arranged is None else arranged.arranged.ctypes.data,
            0 if arranged is None else arranged.segments.ctypes.data,
            0 if self.marks is None else self.marks.data_ptr(),
            self.width,
        ]


def _spec(step: Step | RowStep, operands: _Operands, factor: float) -> row_kernels.RowSpec:
    param, first = operands.param, operands.states[0]
    return row_kernels.RowSpec(
        adadelta=step.rule == "adadelta",
        wide=wide(param.dtype, first.dtype),
        param=KIND[param.dtype],
        grad=KIND[operands.rows.dtype],
        state=KIND[first.dtype],
        row_wise=first.numel() != param.numel(),
        every_row=operands.ids is None,
        merged=operands.arranged is None,
        unscale=step.grad_scale is not None,
        scaled=factor != 1.0,
        maximize=step.maximize,
        coupled=step.weight_decay != 0,
    )


def _launch(
    spec: row_kernels.RowSpec,
    members: Sequence[_Operands],
    rates: Sequence[tuple[float, float]],
    scalars: Any,
    mark: int = 0,
) -> Callable[[], None]:
    """Return a call of the kernel for tables of one kind, with its arguments bound. rates: learning rates and factors."""
    kernel = compiled(row_kernels.rows_step, row_kernels.ROWS_SIGNATURE, spec)
    tables = np.array([operands.entries() for operands in members], np.int64)
    starts = np.zeros(len(members) + 1, np.int64)
    np.cumsum([operands.stepped for operands in members], out=starts[1:])
    work = partial(kernel, tables, starts, np.array(rates, np.float64), scalars, mark)
    width = int(tables[:, row_kernels.TABLE_WIDTH].max())
    slice_rows, inline = max(1, SLICE_ELEMENTS // width), max(1, INLINE_ELEMENTS // width)

    def launch(_: Any = members) -> None:  # keeps the tensors alive, whose addresses it uses
        over_slices(work, int(starts[-1]), slice_size=slice_rows, inline=inline)

    return launch
