"""Checks that the tensors of a step fit each other. Kernels take addresses and check nothing themselves.

Every launch of a kernel is checked here first, before anything is written. Only `check_bounds` reads elements. The
other checks look at shape, dtype, device and place in memory, so they cost the same for any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Final, NamedTuple

import torch
from torch import Tensor

from .step import FUSED_DTYPES, RowStep, Step

_is_cpu = attrgetter("is_cpu")

# The number of states that each rule's kernels take.
STATES: Final = {"adadelta": 2, "adagrad": 1}


class SomeRows(NamedTuple):
    """Some rows of a table: ascending ids, and their rows. The table has so many rows, and a stretch of it so many."""

    ids: Tensor
    rows: Tensor
    table_rows: int
    stretch_rows: int


class OperandError(ValueError, RuntimeError):
    """A tensor does not fit the others of its call. Nothing has been written.

    It is a RuntimeError, too, because torch raises that where shapes differ.
    """


class OutOfBounds(IndexError):
    """A row's id is outside its table, for which a kernel would write past it. `table`: its place in a list of tables."""

    def __init__(self, row: int, rows: int, table: int = 0) -> None:
        super().__init__(f"index {row} is out of bounds for dimension 0 with size {rows}")
        self.row = row
        self.table = table


def run_of(tensor: Tensor) -> Tensor:
    """The tensor if it is contiguous and its memory holds its values, else a contiguous copy.

    Memory does not hold the values of a tensor with the negative bit, nor of a zero tensor.
    """
    if tensor.is_contiguous() and not tensor.is_neg() and not tensor._is_zerotensor():
        return tensor
    if tensor._is_zerotensor():  # zeros that were never written
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.resolve_neg().contiguous()


def check_run(what: str, tensor: Tensor, elements: int, *dtypes: torch.dtype) -> None:
    """OperandError unless a tensor is contiguous, on the CPU, and of this size and one of these dtypes."""
    if not tensor.is_cpu or not tensor.is_contiguous() or tensor.is_neg():
        raise OperandError(f"{what} must be a contiguous tensor on the CPU")
    if tensor.dtype not in dtypes:
        raise OperandError(f"{what} is {tensor.dtype}; it must be {' or '.join(map(str, dtypes))}")
    if tensor.numel() != elements:
        raise OperandError(f"{what} has {tensor.numel()} elements; it must have {elements}")
    check_memory(what, tensor)


def check_ids(ids: Tensor, rows: Tensor) -> None:
    """OperandError unless `ids` is 1-d int64, with one id for each row, on the rows' device."""
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise OperandError(f"row ids are {ids.dim()}-d {ids.dtype}; they must be 1-d int64")
    if rows.dim() == 0 or rows.shape[0] != ids.numel():
        raise OperandError(f"{ids.numel()} row ids, but rows of shape {tuple(rows.shape)}")
    if ids.device != rows.device:
        raise OperandError(f"the row ids are on {ids.device}, the rows on {rows.device}")


def check_bounds(ids: Tensor, rows: int) -> None:
    """OutOfBounds, torch's IndexError, for an id outside [0, rows)."""
    if ids.numel():
        ends = torch.aminmax(ids)
        low, high = map(int, ends if ids.is_cpu else torch.stack(ends).tolist())
        if low < 0 or high >= rows:
            raise OutOfBounds(low if low < 0 else high, rows)


def check_rows(step: RowStep, *, kernels: bool = True) -> None:
    """OperandError unless ids, rows and states fit the table.

    With `kernels` their dtypes must also have kernels, and the table and its states must lie apart in memory.
    """
    param, rows = step.param, step.rows
    if kernels and _plainly_fit(step):
        return
    _check_count(step.rule, len(step.states))
    if param.dim() == 0:
        raise OperandError("a parameter without dimensions has no rows")
    check_ids(step.ids, rows)
    if rows.shape[1:] != param.shape[1:]:
        raise OperandError(
            f"rows of shape {tuple(rows.shape)} are not rows of a table of shape {tuple(param.shape)}"
        )
    _check_states(param, step.states)
    _check_alike("rows", rows, param, kernels=kernels)
    if step.steps is not None and step.steps.numel() != 1:
        raise OperandError(f"the step counter has shape {tuple(step.steps.shape)}; it must be one number")
    for state in step.states:
        _check_alike("state", state, param, kernels=kernels)
    for what, tensor in (("parameter", param), *(("state", state) for state in step.states)):
        _check_expanded(what, tensor)
        if kernels:
            check_memory(what, tensor)
    if kernels and not _lie_apart(param, step.states):
        raise OperandError(
            "the parameter and its states lie over each other in memory: give each tensor its own"
        )


def _plainly_fit(step: RowStep) -> bool:
    """True if the tensors of a step plainly fit, as most do. This takes a third of the full check's time.

    It does not check that there is a kernel for their dtypes, nor that they have memory. The launch checks both.
    """
    param, ids, rows, states = step.param, step.ids, step.rows, step.states
    if len(states) != STATES.get(step.rule):
        return False
    shape, first, last = param.shape, states[0], states[-1]
    return (
        len(shape) > 0
        and ids.dtype is torch.int64
        and ids.dim() == 1
        and rows.shape == (ids.numel(), *shape[1:])
        and first.shape == shape
        and last.shape == shape
        and first.dtype is last.dtype
        and all(map(_is_cpu, (param, ids, rows, *states)))
        and rows.layout is first.layout is last.layout is torch.strided
        and param.is_contiguous()
        and first.is_contiguous()
        and last.is_contiguous()
        and _lie_apart(param, states)
        and (step.steps is None or step.steps.numel() == 1)
    )


def _lie_apart(param: Tensor, states: Sequence[Tensor]) -> bool:
    """True if no two of them share a byte.

    Tensors with gaps are left out: they are stepped as copies, and may lie in each other's gaps.
    """
    end = 0
    for begin, nbytes in sorted([(t.data_ptr(), t.nbytes) for t in (param, *states) if t.is_contiguous()]):
        if begin < end:
            return False
        end = begin + nbytes
    return True


def check_lists(step: Step) -> None:
    """OperandError unless every list of the step has one entry for each parameter."""
    count = len(step.params)
    _check_count(step.rule, len(step.states))
    for some in (step.grads, *step.states, step.steps, step.ema, step.copy_out):
        if some is not None and len(some) != count:
            raise OperandError(f"a list of {len(some)} tensors beside {count} parameters")
    if isinstance(step.factor, float):  # the usual case; this test is faster than the next
        return
    if isinstance(step.factor, Sequence) and len(step.factor) != count:
        raise OperandError(f"{len(step.factor)} factors beside {count} parameters")


def check_dense(step: Step, *, kernels: bool = True) -> None:
    """OperandError unless each parameter's operands have its shape or are row-wise states.

    With `kernels` their dtypes must also have kernels, and they must have memory. NotImplementedError for what no
    kernel does beside row-wise states.
    """
    check_lists(step)
    for k, param in enumerate(step.params):
        states = [state[k] for state in step.states]
        for what, tensor in _beside(step, k):
            if tensor.shape != param.shape:
                raise OperandError(
                    f"the {what} has shape {tuple(tensor.shape)}, its parameter {tuple(param.shape)}"
                )
            _check_alike(what, tensor, param, kernels=kernels)
        _check_states(param, states)
        if states[0].shape != param.shape:
            step.check_row_wise()
        for state in states:
            _check_alike("state", state, param, kernels=kernels)
        if step.steps is not None and step.steps[k].numel() != 1:
            raise OperandError(
                f"a step counter has shape {tuple(step.steps[k].shape)}; it must be one number"
            )
        for what, tensor in (
            ("parameter", param),
            *(("state", state) for state in states),
            *_beside(step, k),
        ):
            if what != "gradient" or step.writes_grad:
                _check_expanded(what, tensor)
            if kernels and (what != "gradient" or not tensor._is_zerotensor()):
                check_memory(what, tensor)


def _beside(step: Step, k: int) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every operand that has parameter k's shape, except its states."""
    yield "gradient", step.grads[k]
    if step.ema is not None:
        yield "ema", step.ema[k]
    if step.copy_out is not None:
        yield "copy_out", step.copy_out[k]


def _check_count(rule: str, states: int) -> None:
    if rule not in STATES:
        raise OperandError(f"there is no kernel {rule!r}; there are {', '.join(STATES)}")
    if states != STATES[rule]:
        raise OperandError(f"{rule} keeps {STATES[rule]} states of a parameter, not {states}")


def _check_states(param: Tensor, states: Sequence[Tensor]) -> None:
    row_wise = (param.shape[0] if param.dim() else 1, 1)
    for state in states:
        if state.shape != param.shape and tuple(state.shape) != row_wise:
            raise OperandError(
                f"the state has shape {tuple(state.shape)}, its parameter {tuple(param.shape)}"
            )
        if (state.shape, state.dtype) != (states[0].shape, states[0].dtype):
            raise OperandError(
                f"the states of one parameter must be alike; they are {states[0].dtype} of shape "
                f"{tuple(states[0].shape)} and {state.dtype} of shape {tuple(state.shape)}"
            )


def _check_alike(what: str, tensor: Tensor, param: Tensor, *, kernels: bool) -> None:
    if tensor.device != param.device:
        raise OperandError(f"the {what} is on {tensor.device}, its parameter on {param.device}")
    for name, one in ((what, tensor), ("parameter", param)):
        if one.layout is not torch.strided:
            raise OperandError(f"the {name} has the layout {one.layout}, which has no kernel")
    if kernels and not FUSED_DTYPES.issuperset((tensor.dtype, param.dtype)):
        raise OperandError(
            f"the {what} is {tensor.dtype}, its parameter {param.dtype}: not both have a kernel"
        )


def _check_expanded(what: str, tensor: Tensor) -> None:
    """OperandError if several elements of a tensor that is written to share one place in memory."""
    if tensor.numel() and any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
        raise OperandError(
            f"the {what} is expanded, and is written to: several of its elements lie in one place"
        )


def check_memory(what: str, tensor: Tensor) -> None:
    """OperandError if a tensor has elements but no memory."""
    if tensor.numel() and tensor.data_ptr() == 0:
        raise OperandError(
            f"the {what} has no memory: it was freed, or is made of zeros that were never written"
        )
