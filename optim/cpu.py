"""The CPU backend: describes tensors to the kernels as a table of addresses and runs them over the thread pool.

Tensors are taken as they lie: operands that share one dense layout (any permutation of strides) are one flat run
of memory. A gradient in another layout, an expanded one, or a parameter with gaps is stepped through contiguous
copies of at most `PIECE_ELEMENTS` at a time, so that even then a step needs no memory that grows with the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from . import intrinsics, kernels, row_kernels
from .dispatch import FUSED_DTYPES, RowStep, Step, number
from .kernel_cache import compiled
from .pool import over_slices

PIECE_ELEMENTS: Final = 1 << 20
SLICE_ELEMENTS: Final = 1 << 18
INLINE_ELEMENTS: Final = 1 << 16

KIND: Final = {
    torch.float32: intrinsics.FLOAT32,
    torch.float64: intrinsics.FLOAT64,
    torch.bfloat16: intrinsics.BFLOAT16,
    torch.float16: intrinsics.FLOAT16,
}
STATE_COLUMNS: Final = (intrinsics.FIRST, intrinsics.SECOND)

_dtype = attrgetter("dtype")
_device = attrgetter("device")


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
    """Take a dense step; see `dispatch.Step`."""
    if not step.params or (step.found_inf is not None and number(step.found_inf) == 1.0):
        return
    count = len(step.params)
    operands = _operands(step)
    sizes = list(map(Tensor.numel, step.params))
    addresses = np.zeros((count, kernels.COLUMNS), np.int64)
    per_tensor = np.empty((count, 2))
    per_tensor[:, 1] = step.factor
    _advance(step, addresses, per_tensor)
    for column, tensors in operands.items():
        addresses[:, column] = list(map(Tensor.data_ptr, tensors))
    if _uniform(operands, sizes) and (0 not in addresses[:, list(operands)] or 0 in sizes):
        _launch(
            step,
            {column: tensors[0].dtype for column, tensors in operands.items()},
            addresses,
            sizes,
            per_tensor,
        )
    else:
        _sort_out(step, operands, addresses, sizes, per_tensor)


def _operands(step: Step) -> dict[int, Sequence[Tensor]]:
    operands = {intrinsics.PARAM: step.params, intrinsics.GRAD: step.grads}
    operands.update(zip(STATE_COLUMNS, step.states, strict=False))
    if step.ema is not None:
        operands[intrinsics.EMA] = step.ema
    if step.copy_out is not None:
        operands[intrinsics.COPY] = step.copy_out
    return operands


def _uniform(operands: dict[int, Sequence[Tensor]], sizes: list[int]) -> bool:
    """Whether every operand is contiguous, of one dtype per role and of the parameters' sizes."""
    return (
        all(len(set(map(_dtype, tensors))) == 1 for tensors in operands.values())
        and all(all(map(Tensor.is_contiguous, tensors)) for tensors in operands.values())
        and all(list(map(Tensor.numel, tensors)) == sizes for tensors in operands.values())
        and not any(map(Tensor.is_neg, operands[intrinsics.GRAD]))
    )


def _advance(step: Step, addresses: Any, per_tensor: Any) -> None:
    """Advance the counters and write each tensor's learning rate."""
    lr, steps = number(step.lr), step.steps
    if steps is None:
        per_tensor[:, 0] = lr / (1 + (step.step - 1) * step.lr_decay)
        return
    dtypes = set(map(_dtype, steps))
    if len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64} and all(t.is_cpu for t in steps):
        addresses[:, kernels.STEP_COLUMN] = list(map(Tensor.data_ptr, steps))
        kernel = compiled(kernels.advance, kernels.ADVANCE_SIGNATURE, KIND[dtypes.pop()])
        kernel(addresses, per_tensor, lr, step.lr_decay)
        return
    for k, counter in enumerate(steps):
        counter += 1
        per_tensor[k, 0] = lr / (1 + (counter.item() - 1) * step.lr_decay)


def _scalars(step: Step | RowStep) -> Any:
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


def _wide(*dtypes: torch.dtype) -> bool:
    return torch.float64 in dtypes


def _launch(
    step: Step, dtypes: dict[int, torch.dtype], addresses: Any, sizes: list[int], per_tensor: Any
) -> None:
    """Run the kernel that `step` and `dtypes` ask for over a table of flat runs."""
    kind = {column: KIND[dtype] for column, dtype in dtypes.items()}
    has_decay = step.weight_decay != 0
    spec = kernels.Spec(
        adadelta=step.rule == "adadelta",
        wide=_wide(dtypes[intrinsics.PARAM], dtypes[intrinsics.FIRST]),
        param=kind[intrinsics.PARAM],
        grad=kind[intrinsics.GRAD],
        state=kind[intrinsics.FIRST],
        ema=kind.get(intrinsics.EMA, -1),
        copy=kind.get(intrinsics.COPY, -1),
        unscale=step.grad_scale is not None,
        scaled=bool((per_tensor[:, 1] != 1.0).any()),
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
    starts = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    scalars = _scalars(step)

    def work(start: int, stop: int) -> None:
        kernel(addresses, starts, per_tensor, scalars, start, stop)

    over_slices(
        work, int(starts[-1]), threads=step.threads, slice_size=SLICE_ELEMENTS, inline=INLINE_ELEMENTS
    )


def _sort_out(
    step: Step, operands: dict[int, Sequence[Tensor]], addresses: Any, sizes: list[int], per_tensor: Any
) -> None:
    """Launch tensors of equal dtypes together, and one by one those that are not flat runs."""
    alike: dict[tuple[torch.dtype, ...], list[int]] = {}
    for k, size in enumerate(sizes):
        tensors = {column: tensors[k] for column, tensors in operands.items()}
        if size == 0:
            continue
        if _is_row_wise(tensors):
            _launch_row_wise(step, tensors, per_tensor[k])
        elif _one_layout(list(tensors.values())):
            alike.setdefault(tuple(t.dtype for t in tensors.values()), []).append(k)
        else:
            _in_pieces(step, tensors, per_tensor[k : k + 1])
    for dtypes, members in alike.items():
        _launch(
            step,
            dict(zip(operands, dtypes, strict=True)),
            np.ascontiguousarray(addresses[members]),
            [sizes[k] for k in members],
            np.ascontiguousarray(per_tensor[members]),
        )


def _one_layout(tensors: list[Tensor]) -> bool:
    """Whether the same flat index means the same element in all of them."""
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


def _pieces(shape: torch.Size | tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Cut a shape into boxes of at most PIECE_ELEMENTS, along its first dimensions."""
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


def _in_pieces(step: Step, tensors: dict[int, Tensor], per_tensor: Any) -> None:
    """Step one tensor whose operands do not lie alike, through contiguous copies of bounded size."""
    for column, tensor in tensors.items():
        if tensor.shape != tensors[intrinsics.PARAM].shape:
            name = {intrinsics.GRAD: "gradient", intrinsics.EMA: "ema", intrinsics.COPY: "copy_out"}.get(
                column, "state"
            )
            raise RuntimeError(
                f"the {name} has shape {tuple(tensor.shape)}, its parameter {tuple(tensors[intrinsics.PARAM].shape)}"
            )
    writes_grad = step.zero_grad or step.grad_scale is not None
    for box in _pieces(tensors[intrinsics.PARAM].shape):
        views = {column: tensor[box] for column, tensor in tensors.items()}
        flat = {column: view.resolve_neg().contiguous() for column, view in views.items()}
        table = np.zeros((1, kernels.COLUMNS), np.int64)
        for column, tensor in flat.items():
            table[0, column] = tensor.data_ptr()
        dtypes = {column: tensor.dtype for column, tensor in flat.items()}
        _launch(step, dtypes, table, [flat[intrinsics.PARAM].numel()], per_tensor)
        for column, view in views.items():
            if flat[column] is not view and (column != intrinsics.GRAD or writes_grad):
                view.copy_(flat[column])


def _is_row_wise(tensors: dict[int, Tensor]) -> bool:
    param, state = tensors[intrinsics.PARAM], tensors[intrinsics.FIRST]
    return state.shape != param.shape and tuple(state.shape) == (param.shape[0] if param.dim() else 1, 1)


def _launch_row_wise(step: Step, tensors: dict[int, Tensor], per_tensor: Any) -> None:
    """One dense tensor with one state number per row: every row steps."""
    unsupported = {
        "ema": step.ema is not None,
        "copy_out": step.copy_out is not None,
        "clip_value": step.clip_value is not None,
        "decoupled": step.decoupled and step.weight_decay != 0,
        "eps_inside_root": step.eps_inside_root,
        "multiply_first": step.multiply_first,
    }
    for name, asked in unsupported.items():
        if asked:
            raise NotImplementedError(f"row-wise state does not go with {name}")
    param, grad = tensors[intrinsics.PARAM], tensors[intrinsics.GRAD]
    flat_param, flat_grad = param.contiguous(), grad.resolve_neg().contiguous()
    states = [tensors[column] for column in STATE_COLUMNS if column in tensors]
    rows = param.shape[0] if param.dim() else 1
    _run_rows(
        step,
        flat_param,
        None,
        flat_grad,
        states,
        count=rows,
        arranged=None,
        lr=float(per_tensor[0]),
        factor=float(per_tensor[1]),
    )
    if flat_param is not param:
        param.copy_(flat_param)
    if step.zero_grad:
        grad.zero_()
    elif step.grad_scale is not None:
        grad.div_(number(step.grad_scale))


def step_rows(step: RowStep) -> None:
    """Take a step on rows of one table; see `dispatch.RowStep`."""
    if step.found_inf is not None and number(step.found_inf) == 1.0:
        return
    lr = number(step.lr)
    t: float = step.step
    if step.steps is not None:
        step.steps += 1
        t = step.steps.item()
    lr = lr / (1 + (t - 1) * step.lr_decay)
    operands = [step.param, *step.states]
    ids = step.ids.contiguous()
    rows = step.rows.resolve_neg().contiguous()
    arranged = None
    if step.unique:
        check_bounds(ids, step.param.shape[0])
    else:
        unique, order, segments = arrange(ids, step.param.shape[0])
        if order is not None:
            ids, arranged = unique, (order, segments)
    if ids.numel() == 0:
        return
    if all(t.is_contiguous() for t in operands):
        _run_rows(step, step.param, ids, rows, step.states, ids.numel(), arranged, lr, step.factor)
        return
    # A table with gaps: its rows are taken out, stepped as a small table of their own, and put back.
    taken = [t.index_select(0, ids) for t in operands]
    own = torch.arange(ids.numel())
    _run_rows(step, taken[0], own, rows, taken[1:], ids.numel(), arranged, lr, step.factor)
    for table, touched in zip(operands, taken, strict=True):
        table.index_copy_(0, ids, touched)


_NO_IDS: Final = np.zeros(0, np.int64)


def _run_rows(
    step: Step | RowStep,
    param: Tensor,
    ids: Tensor | None,
    rows: Tensor,
    states: Sequence[Tensor],
    count: int,
    arranged: tuple[Tensor, Tensor] | None,
    lr: float,
    factor: float,
) -> None:
    table_rows = param.shape[0] if param.dim() else 1
    width = param.numel() // table_rows if table_rows else 0
    if count == 0 or width == 0:
        return
    row_wise = states[0].numel() != param.numel()
    spec = row_kernels.RowSpec(
        adadelta=step.rule == "adadelta",
        wide=_wide(param.dtype, states[0].dtype),
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
    second = states[1].data_ptr() if len(states) > 1 else 0
    addresses = np.array([param.data_ptr(), rows.data_ptr(), states[0].data_ptr(), second])
    named = _NO_IDS if ids is None else ids.numpy()
    order, segments = (_NO_IDS, _NO_IDS) if arranged is None else (arranged[0].numpy(), arranged[1].numpy())
    scalars = _scalars(step)

    def work(start: int, stop: int) -> None:
        kernel(addresses, named, order, segments, width, lr, factor, scalars, start, stop)

    slice_rows = max(1, SLICE_ELEMENTS // 16 // width)
    over_slices(
        work,
        count,
        threads=step.threads,
        slice_size=slice_rows,
        inline=max(1, INLINE_ELEMENTS // 16 // width),
    )


def check_bounds(ids: Tensor, rows: int) -> None:
    """Raise torch's IndexError for an id outside [0, rows): a kernel would write past the table."""
    if ids.numel():
        low, high = (int(t) for t in torch.aminmax(ids))
        if low < 0 or high >= rows:
            bad = low if low < 0 else high
            raise IndexError(f"index {bad} is out of bounds for dimension 0 with size {rows}")


def arrange(ids: Tensor, rows: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Unique ascending ids, positions grouped by id in order of appearance, and where each group starts.

    With ids that ascend strictly already, they come back as they are and the positions are None.
    """
    n = ids.numel()
    unique, order = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int64)
    segments = torch.empty(n + 1, dtype=torch.int64)
    kernel = compiled(row_kernels.arrange, row_kernels.ARRANGE_SIGNATURE, row_kernels.DIGIT_BITS)
    count = kernel(ids.numpy(), rows, unique.numpy(), order.numpy(), segments.numpy())
    if count < 0:
        raise IndexError(f"index {int(ids[-1 - count])} is out of bounds for dimension 0 with size {rows}")
    if int(segments[0]) == -1:
        return ids, None, segments
    return unique[:count], order, segments[: count + 1]
