"""The CUDA backend's steps and norms: one launch of a Triton kernel takes a list of tensors of any sizes.

Tensors of equal dtypes on one device go into one launch. A single tensor, such as an arena, is passed by its own
pointers; several are looked up in a table. The host does not wait for the device, with three exceptions: a step over
rows checks its ids (not under graph capture), `square_sums` returns numbers, and found_inf is read if counters are on
the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from operator import attrgetter
from typing import Any, Final

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..step.operands import check_bounds, check_dense, check_lists, check_rows, run_of
from ..step.overlaps import Waves, waves_of, waves_of_runs
from ..step.step import FUSED_DTYPES, RowStep, Step, one_by_one
from ..step.unscaling import unscale
from . import arithmetic, kernels, row_kernels
from . import launch as cuda_launch
from .launch import DTYPE, dense_flags, row_flags, scalars, skipped
from .layouts import (
    Copied,
    addresses_of,
    elementwise,
    give_back,
    has_null,
    in_one_layout,
    is_row_wise,
    plain,
    runs,
    shares_memory,
)
from .tables import capturing, extents, pointers, upload

PARAM, GRAD, FIRST, SECOND = (
    c.value for c in (arithmetic.PARAM, arithmetic.GRAD, arithmetic.FIRST, arithmetic.SECOND)
)
EMA, COPY, COUNTER = (c.value for c in (arithmetic.EMA, arithmetic.COPY, arithmetic.COUNTER))
STATE_COLUMNS: Final = (FIRST, SECOND)

LEAST_CAPABILITY: Final = (8, 0)


def refuses(param: Tensor) -> str | None:
    """Why the CUDA kernels cannot step `param`, or None."""
    if param.dtype not in FUSED_DTYPES:
        return f"{param.dtype} has no kernel"
    if param.layout is not torch.strided:
        return f"{param.layout} has no kernel"
    if shares_memory(param):
        return "several of its elements share one memory location"
    return _device_refuses(param.device)


@cache
def _device_refuses(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return "the kernels are for CUDA and were never tried on ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
    return None


def plan(described: Step) -> Callable[[], None]:
    """Check the lists (OperandError) and return a callable that takes the dense step."""
    check_lists(described)
    return partial(step, described)


def plan_tables(described: Sequence[RowStep]) -> Callable[[], None]:
    """Prepare steps on rows of several tables. A call of the result takes them."""
    return one_by_one(plan_rows, described)


def plan_rows(described: RowStep) -> Callable[[], None]:
    """Check the tensors (OperandError) and return a callable that takes the step on rows."""
    check_rows(described)
    return partial(step_rows, described)


@torch.no_grad()
def step(step: Step) -> None:
    """Take a dense step; `Step` in `step/step.py` describes it."""
    if not step.params or skipped(step, step.params[0].device):
        return
    check_lists(step)
    operands: dict[int, Sequence[Tensor]] = {PARAM: step.params, GRAD: step.grads}
    operands.update(zip(STATE_COLUMNS, step.states, strict=False))
    if step.ema is not None:
        operands[EMA] = step.ema
    if step.copy_out is not None:
        operands[COPY] = step.copy_out
    written = [column for column in operands if column != GRAD or step.writes_grad]
    factors = np.empty(len(step.params))
    factors[:] = step.factor
    addresses = addresses_of(operands)
    is_plain = plain(operands) and not has_null(addresses, operands) and _alike(step.steps)
    if is_plain:
        waves = waves_of_runs(*runs(addresses, {column: operands[column] for column in written}))
    else:
        check_dense(step)
        waves = waves_of([operands[column] for column in written])
    if waves is not None:
        _in_waves(step, waves)
        return
    if is_plain:
        _launch_dense(step, operands, addresses, step.steps, factors)
        return
    alike: dict[Any, list[int]] = {}
    flat: list[Mapping[int, Tensor]] = []
    copied: list[list[Copied]] = []
    for k, param in enumerate(step.params):
        own = {column: tensors[k] for column, tensors in operands.items()}
        copies: list[Copied] = []
        if is_row_wise(param, own[FIRST]):
            _step_row_wise(step, own, None if step.steps is None else [step.steps[k]], float(factors[k]))
            own = {}
        else:
            for column in STATE_COLUMNS:
                if column in own:
                    own[column] = elementwise(param, own[column])
            own, copies = in_one_layout(own)
            counter = None if step.steps is None else (step.steps[k].device, step.steps[k].dtype)
            key = (param.device, counter, *(t.dtype for t in own.values()))
            alike.setdefault(key, []).append(k)
        flat.append(own)
        copied.append(copies)
    for members in alike.values():
        together = {column: [flat[k][column] for k in members] for column in operands}
        _launch_dense(
            step,
            together,
            addresses_of(together),
            None if step.steps is None else [step.steps[k] for k in members],
            factors[members],
        )
    writes_grad = step.zero_grad or step.grad_scale is not None
    for copies, grad in zip(copied, step.grads, strict=True):
        give_back(copies, grad, grad_too=writes_grad)


def _in_waves(whole: Step, waves: Waves) -> None:
    """Step the waves in turn: tensors that overlap are in different waves. A stream runs launches in order."""
    for members in waves:
        step(whole.only(members))


def _alike(counters: Sequence[Tensor] | None) -> bool:
    """Whether counters, if any, are single numbers of one dtype on one device."""
    return counters is None or (
        len(set(map(attrgetter("dtype"), counters))) == 1
        and len(set(map(Tensor.get_device, counters))) == 1
        and set(map(Tensor.numel, counters)) == {1}
    )


def _launch_dense(
    step: Step,
    operands: Mapping[int, Sequence[Tensor]],
    addresses: Any,
    counters: Sequence[Tensor] | None,
    factors: Any,
) -> None:
    """Step tensors of equal dtypes on one device: one launch, and one before it if the learning rate decays."""
    params = operands[PARAM]
    device, count = params[0].device, len(params)
    sizes = list(map(Tensor.numel, params))
    known = cuda_launch.inputs(step, counters, device)
    flags = dense_flags(step) | known.flags
    if (factors != 1.0).any():
        flags |= arithmetic.SCALED.value
    numbers = (
        *scalars(step, known, float(factors[0])),
        0.0 if step.clip_value is None else float(step.clip_value),
        1 - step.ema_momentum,
    )
    wide = torch.float64 in (params[0].dtype, operands[FIRST][0].dtype)
    constants = {
        "REAL": tl.float64 if wide else tl.float32,
        "BLOCK": kernels.BLOCK,
        "num_warps": kernels.WARPS,
    }
    counted = counters if flags & arithmetic.COUNT.value else None
    if count == 1:
        own = [operands[column][0] if column in operands else None for column in range(COUNTER)]
        cuda_launch.launch(
            kernels.step_flat, (max(1, -(-sizes[0] // kernels.BLOCK)),), device, *own, counted and counted[0],
            known.lr_pointer, known.grad_scale_pointer, known.found_inf, sizes[0], *numbers,
            FLAGS=flags & ~arithmetic.LR_EACH.value, **constants,
        )  # fmt: skip
        return
    if not (addresses % 16).any():
        flags |= arithmetic.ALIGNED.value
    if counted:
        addresses[:, COUNTER] = list(map(Tensor.data_ptr, counted))
    each = None
    if (factors != factors[0]).any():
        each, flags = upload(factors, device), flags | arithmetic.FACTOR_EACH.value
    cut = extents(sizes, kernels.BLOCK, device)
    dtypes = {
        letter: DTYPE[operands[column][0].dtype] if column in operands else tl.float32
        for column, letter in enumerate("PGSUEC")
    }
    cuda_launch.launch(
        kernels.step_list, (cut.programs,), device, pointers(addresses, device), cut.extents, cut.blocks,
        known.lr_pointer, each, known.grad_scale_pointer, known.found_inf, *numbers, **dtypes,
        T=DTYPE[counted[0].dtype] if counted else tl.float32, FLAGS=flags, **constants,
    )  # fmt: skip


def _step_row_wise(
    step: Step, operands: Mapping[int, Tensor], counters: Sequence[Tensor] | None, factor: float
) -> None:
    """Step every row of one dense tensor whose states have one number per row."""
    param, grad = operands[PARAM], operands[GRAD]
    dense, copied = in_one_layout({PARAM: param.contiguous(), GRAD: grad})
    if dense[PARAM] is not param:
        copied.append(Copied(param, dense[PARAM]))
    states = [_contiguous(operands[column], copied) for column in STATE_COLUMNS if column in operands]
    extra = arithmetic.ZERO_GRAD.value if step.zero_grad else arithmetic.WRITE_GRAD.value
    rows = param.shape[0] if param.dim() else 1
    _launch_rows(step, dense[PARAM], None, None, dense[GRAD], states, counters, rows, factor, extra)
    give_back(copied, grad, grad_too=step.zero_grad or step.grad_scale is not None)


@torch.no_grad()
def step_rows(step: RowStep) -> None:
    """Take a step on rows of one table; `RowStep` in `step/step.py` describes it.

    An id outside the table raises IndexError before anything is written. Under graph capture the host cannot look, and
    the kernel skips such an id.
    """
    device = step.param.device
    if skipped(step, device):
        return
    check_rows(step)
    ids, order = step.ids.contiguous(), None
    if not capturing(device):
        check_bounds(ids, step.param.shape[0])
    if step.grad_scale is not None:
        unscale(step.rows, step.grad_scale, cuda_launch.on_device(step.found_inf, device))
        step = replace(step, grad_scale=None)
    if not step.unique:
        ids, order = torch.sort(ids, stable=True)
    copied: list[Copied] = []
    param = _contiguous(step.param, copied)
    states = [_contiguous(state, copied) for state in step.states]
    rows = run_of(step.rows)
    counters = None if step.steps is None else [step.steps]
    _launch_rows(step, param, ids, order, rows, states, counters, ids.numel(), step.factor, 0)
    give_back(copied, step.rows, grad_too=False)


def _contiguous(tensor: Tensor, copied: list[Copied]) -> Tensor:
    if tensor.is_contiguous():
        return tensor
    copied.append(Copied(tensor, tensor.contiguous()))
    return copied[-1].copy


def _launch_rows(
    step: Step | RowStep,
    param: Tensor,
    ids: Tensor | None,
    order: Tensor | None,
    rows: Tensor,
    states: Sequence[Tensor],
    counters: Sequence[Tensor] | None,
    count: int,
    factor: float,
    flags: int,
) -> None:
    device = param.device
    known = cuda_launch.inputs(step, counters, device)
    flags |= row_flags(step) | known.flags & ~arithmetic.LR_EACH.value
    if factor != 1.0:
        flags |= arithmetic.SCALED.value
    table_rows = param.shape[0] if param.dim() else 1
    width = param.numel() // table_rows if table_rows else 0
    if width == 0:  # a launch over nothing still advances the counter
        width, count = 1, 0
    row_wise = states[0].numel() != param.numel()
    columns = min(row_kernels.TILE, triton.next_power_of_2(width))
    tile_rows = row_kernels.TILE // columns
    wide = torch.float64 in (param.dtype, states[0].dtype)
    cuda_launch.launch(
        row_kernels.step_rows, (max(1, -(-count // tile_rows)), 1 if row_wise else -(-width // columns)), device,
        param, rows, ids, order, states[0], states[1] if len(states) > 1 else None,
        counters[0] if counters and flags & arithmetic.COUNT.value else None,
        known.lr_pointer, known.grad_scale_pointer, known.found_inf, count, table_rows,
        *scalars(step, known, factor), WIDTH=width, ROWS=tile_rows, COLS=columns, ROW_WISE=row_wise,
        EVERY_ROW=ids is None, MERGED=order is None, REAL=tl.float64 if wide else tl.float32, FLAGS=flags,
        num_warps=kernels.WARPS,
    )  # fmt: skip


def square_sums(tensors: Sequence[Tensor]) -> list[float]:
    """Float64 sums of squares, one per tensor, in the order that `ops/norms.py` states.

    A sum is not finite if an element is not.
    """
    totals = [0.0] * len(tensors)
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for k, tensor in enumerate(tensors):
        alike.setdefault((tensor.device, tensor.dtype), []).append(k)
    launched = []
    for (device, dtype), members in alike.items():
        flat = [run_of(tensors[k].detach()) for k in members]
        cut = extents([t.numel() for t in flat], row_kernels.NORM_BLOCK.value, device)
        addresses = np.array([t.data_ptr() for t in flat], np.int64)
        sums = torch.empty(cut.programs, dtype=torch.float64, device=device)
        flags = 0 if (addresses % 16).any() else arithmetic.ALIGNED.value
        cuda_launch.launch(
            row_kernels.square_blocks, (cut.programs,), device, pointers(addresses, device), cut.extents, cut.blocks,
            sums, G=DTYPE[dtype], FLAGS=flags, num_warps=row_kernels.NORM_WARPS,
        )  # fmt: skip
        launched.append((members, flat, sums))
    for members, flat, sums in launched:
        own, start = sums.cpu().numpy(), 0
        for k, tensor in zip(members, flat, strict=True):
            stop = start + max(1, -(-tensor.numel() // row_kernels.NORM_BLOCK.value))
            totals[k] = float(np.cumsum(own[start:stop])[-1])  # adds in order, which sum does not
            start = stop
    return totals
