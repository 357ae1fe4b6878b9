"""The CPU backend's dense steps: the thread pool runs a kernel over a table of addresses.

Operands that share one dense layout (any permutation of strides) are one flat run of memory, and are stepped in
place. A gradient in another layout, an expanded gradient, or a parameter with gaps is stepped through contiguous
copies of at most `PIECE_ELEMENTS` elements. So a step never needs memory that grows with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ..kernels import dense as kernels
from ..kernels import intrinsics
from ..kernels.cache import compiled
from ..step.operands import check_dense, check_lists, run_of
from ..step.overlaps import Waves, waves_of
from ..step.step import FUSED_DTYPES, Step, number
from .norms import square_sums as square_sums
from .pointer_table import KIND, Table, is_one_layout, operands, table_of
from .pool import over_slices
from .rows import every_row, scalars_of, wide
from .rows import plan_rows as plan_rows
from .rows import plan_tables as plan_tables
from .rows import step_rows as step_rows

# Half a megabyte of float32: it bounds the copies of unusual layouts, and a copy stays in the cache.
PIECE_ELEMENTS: Final = 1 << 17
# Small enough that two threads share 100 K elements. Large enough that claims cost nothing: slices of 16 K to 256 K
# elements give the same 10.7 ms at 64 M elements.
SLICE_ELEMENTS: Final = 1 << 16
# Up to this size waking a helper costs more than it saves. Adagrad over 256 K elements on two busy cores takes 130 us
# in one thread and 152 us in two.
INLINE_ELEMENTS: Final = 1 << 18


def refuses(param: Tensor) -> str | None:
    """Why the CPU kernels cannot step `param`, or None."""
    if param.dtype not in FUSED_DTYPES:
        return f"{param.dtype} has no kernel"
    if param.layout is not torch.strided:
        return f"{param.layout} has no kernel"
    if not param.is_contiguous() and any(
        s == 0 and n > 1 for s, n in zip(param.stride(), param.shape, strict=True)
    ):
        return "several of its elements share one memory location"
    return None


def step(step: Step) -> None:
    """Take a dense step; `Step` in `step/step.py` describes it."""
    plan(step)()


def plan(step: Step) -> Callable[[], None]:
    """Return a callable that takes a dense step; `Step` in `step/step.py` describes it.

    What can fail fails here, before anything is written: OperandError for tensors that do not fit each other,
    NotImplementedError for an option that does not go with a row-wise state.
    """
    if not step.params or (step.found_inf is not None and number(step.found_inf) == 1.0):
        return _nothing
    check_lists(step)
    found: Table | Waves | None = table_of(step)
    if found is None:
        check_dense(step)
        found = waves_of([some for column, some in operands(step).items() if _is_written(step, column)])
    if found is not None and not isinstance(found, Table):
        return _in_waves(step, found)
    per_tensor = np.empty((len(step.params), 2))
    per_tensor[:, 1] = step.factor
    take = partial(_sort_out, step, per_tensor) if found is None else _launch(step, found, per_tensor)

    def run() -> None:
        _advance(step, found, per_tensor)
        take()

    return run


def _nothing() -> None:
    """Do nothing: the plan of a step that has nothing to step."""


def _in_waves(step: Step, waves: Waves) -> Callable[[], None]:
    """Return a callable that takes the waves in turn. Tensors that share memory are in different waves."""
    plans = []
    for wave, members in enumerate(waves):
        memo = None if step.memo is None else step.memo.setdefault(f"cpu, wave {wave}", {})
        plans.append(plan(step.only(members, memo)))

    def run() -> None:
        for take in plans:
            take()

    return run


def _is_written(step: Step, column: int) -> bool:
    return column != intrinsics.GRAD or step.writes_grad


def _advance(step: Step, table: Table | None, per_tensor: Any) -> None:
    """Advance the step counters and write each tensor's learning rate into `per_tensor[:, 0]`."""
    lr = number(step.lr)
    if step.steps is None:
        per_tensor[:, 0] = lr / (1 + (step.step - 1) * step.lr_decay)
    elif table is not None and kernels.STEP_COLUMN in table.dtypes:
        kind = KIND[table.dtypes[kernels.STEP_COLUMN]]
        kernel = compiled(kernels.advance, kernels.ADVANCE_SIGNATURE, kind)
        kernel(table.addresses, per_tensor, lr, step.lr_decay)
    else:
        for k, counter in enumerate(step.steps):
            counter += 1
            per_tensor[k, 0] = lr / (1 + (counter.item() - 1) * step.lr_decay)


def _launch(step: Step, table: Table, per_tensor: Any) -> Callable[[], None]:
    """Return a call of the kernel for `step` and the table's dtypes, with its arguments bound."""
    dtypes, addresses, starts = table.dtypes, table.addresses, table.starts
    kind = {column: KIND[dtype] for column, dtype in dtypes.items()}
    has_decay = step.weight_decay != 0
    spec = kernels.Spec(
        adadelta=step.rule == "adadelta",
        wide=wide(dtypes[intrinsics.PARAM], dtypes[intrinsics.FIRST]),
        param=kind[intrinsics.PARAM],
        grad=kind[intrinsics.GRAD],
        state=kind[intrinsics.FIRST],
        ema=kind.get(intrinsics.EMA, -1),
        copy=kind.get(intrinsics.COPY, -1),
        unscale=step.grad_scale is not None,
        scaled=step.factor != 1.0
        if isinstance(step.factor, float)
        else any(f != 1.0 for f in per_tensor[:, 1]),
        clip=step.clip_value is not None,
        maximize=step.maximize,
        coupled=has_decay and not step.decoupled,
        decoupled=has_decay and step.decoupled,
        write_grad=step.grad_scale is not None and not step.zero_grad,
        zero_grad=step.zero_grad,
        eps_inside_root=step.eps_inside_root,
        multiply_first=step.multiply_first,
    )
    kernel = compiled(kernels.dense, kernels.DENSE_SIGNATURE, spec)
    scalars = scalars_of(step)

    work = partial(kernel, addresses, starts, per_tensor, scalars)

    return partial(
        over_slices,
        work,
        int(starts[-1]),
        slice_size=SLICE_ELEMENTS,
        inline=INLINE_ELEMENTS,
    )


def _sort_out(step: Step, per_tensor: Any) -> None:
    """Step tensors of equal dtypes in one launch.

    Tensors with row-wise states, or with operands that differ in layout, are stepped one by one.
    """
    by_column = operands(step)
    alike: dict[tuple[torch.dtype, ...], list[int]] = {}
    for k, param in enumerate(step.params):
        tensors = {column: tensors[k] for column, tensors in by_column.items()}
        if param.numel() == 0:
            continue
        if _is_row_wise(tensors):
            every_row(step, tensors, float(per_tensor[k, 0]), float(per_tensor[k, 1]))
        elif is_one_layout(list(tensors.values())):
            alike.setdefault(tuple(t.dtype for t in tensors.values()), []).append(k)
        else:
            _in_pieces(step, tensors, per_tensor[k : k + 1])
    for dtypes, members in alike.items():
        addresses = np.zeros((len(members), kernels.COLUMNS), np.int64)
        for column, everything in by_column.items():
            addresses[:, column] = [everything[k].data_ptr() for k in members]
        starts = np.cumsum([0, *(step.params[k].numel() for k in members)])
        table = Table(addresses, starts, dict(zip(by_column, dtypes, strict=True)))
        _launch(step, table, np.ascontiguousarray(per_tensor[members]))()


def _pieces(shape: torch.Size | tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Cut a shape into boxes of at most PIECE_ELEMENTS elements, along its first dimensions."""
    inner = 1
    for n in shape[1:]:
        inner *= n
    if not shape or shape[0] * inner <= PIECE_ELEMENTS:
        yield ()
        return
    if inner > PIECE_ELEMENTS:
        for k in range(shape[0]):
            for rest in _pieces(tuple(shape[1:])):
                yield (slice(k, k + 1), *rest)
        return
    rows = PIECE_ELEMENTS // inner
    for k in range(0, shape[0], rows):
        yield (slice(k, k + rows),)


@torch.no_grad()
def _in_pieces(step: Step, tensors: dict[int, Tensor], per_tensor: Any) -> None:
    """Step one tensor whose operands differ in layout, through contiguous copies of bounded size."""
    for box in _pieces(tensors[intrinsics.PARAM].shape):
        views = {column: tensor[box] for column, tensor in tensors.items()}
        flat = {column: run_of(view) for column, view in views.items()}
        addresses = np.zeros((1, kernels.COLUMNS), np.int64)
        for column, tensor in flat.items():
            addresses[0, column] = tensor.data_ptr()
        starts = np.array([0, flat[intrinsics.PARAM].numel()])
        dtypes = {column: tensor.dtype for column, tensor in flat.items()}
        _launch(step, Table(addresses, starts, dtypes), per_tensor)()
        for column, view in views.items():
            if flat[column] is not view and _is_written(step, column):
                view.copy_(flat[column])


def _is_row_wise(tensors: dict[int, Tensor]) -> bool:
    param, state = tensors[intrinsics.PARAM], tensors[intrinsics.FIRST]
    return state.shape != param.shape and tuple(state.shape) == (param.shape[0] if param.dim() else 1, 1)
