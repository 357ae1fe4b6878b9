"""The rules in plain torch operations: for devices without kernels, and as the reference for the kernels.

It takes the same `Step` and `RowStep` as a backend and follows the same order of operations, with torch's
roundings. It is complete, but slow, and it allocates temporaries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..step.operands import check_bounds, check_dense, check_rows
from ..step.step import RowStep, Step, number, one_by_one
from ..step.unscaling import unscale


def refuses(param: Tensor) -> str | None:
    """None: every parameter can be stepped."""
    return None


def step(described: Step) -> None:
    """Take a dense step; see `step.step.Step`."""
    plan(described)()


def plan(described: Step) -> Callable[[], None]:
    """Prepare a dense step, which a call takes; see `step.step.Step`. OperandError if tensors do not fit."""
    check_dense(described, kernels=False)
    return partial(_take, described)


def step_rows(described: RowStep) -> None:
    """Take a step on rows of one table; see `step.step.RowStep`."""
    plan_rows(described)()


def plan_tables(described: Sequence[RowStep]) -> Callable[[], None]:
    """Prepare steps on rows of several tables. A call of the result takes them."""
    return one_by_one(plan_rows, described)


def plan_rows(described: RowStep) -> Callable[[], None]:
    """Prepare a step on rows, which a call takes; see `step.step.RowStep`.

    OperandError if its tensors do not fit, IndexError for an id outside the table.
    """
    check_rows(described, kernels=False)
    check_bounds(described.ids, described.param.shape[0])
    return partial(_take_rows, described)


@torch.no_grad()
def _take(given: Step) -> None:
    if given.found_inf is not None and number(given.found_inf) == 1.0:
        return
    step = _in_reals(given)
    for k, (param, grad) in enumerate(zip(step.params, step.grads, strict=True)):
        states = [state[k] for state in step.states]
        lr = _lr(step, None if step.steps is None else step.steps[k])
        if param.numel() == 0:  # a row of no elements has no mean
            continue
        dtype = torch.promote_types(states[0].dtype, torch.promote_types(param.dtype, torch.float32))
        g, p = grad.to(dtype), param.to(dtype)
        if step.grad_scale is not None:
            g = g / number(step.grad_scale)
            grad.copy_(g)
        factor = step.factor[k] if isinstance(step.factor, Sequence) else step.factor
        if factor != 1.0:
            g = g * factor
        if step.clip_value is not None:
            g = g.clamp(-step.clip_value, step.clip_value)
        if step.maximize:
            g = -g
        if step.weight_decay != 0 and not step.decoupled:
            g = g.add(p, alpha=step.weight_decay)
        if step.weight_decay != 0 and step.decoupled:
            p = p * (1 - lr * step.weight_decay)
        p = _update(step, p, g, states, lr)
        param.copy_(p)
        if step.ema is not None:
            average = step.ema[k].to(dtype)
            step.ema[k].copy_(average.add(p - average, alpha=1 - step.ema_momentum))
        if step.copy_out is not None:
            step.copy_out[k].copy_(p)
        if step.zero_grad:
            grad.zero_()

    if step.writes_grad:
        for grad, parts in zip(given.grads, step.grads, strict=True):
            if grad.is_conj():  # a copy of it was stepped
                grad.copy_(torch.view_as_complex(parts))


@torch.no_grad()
def _take_rows(given: RowStep) -> None:
    if given.found_inf is not None and number(given.found_inf) == 1.0:
        return
    if given.grad_scale is not None:
        unscale(given.rows, given.grad_scale)
    step = _rows_in_reals(given)
    lr = _lr(step, step.steps)
    ids, rows = step.ids, step.rows
    if not step.unique:
        ids, rows = coalesce(ids, rows)
    if ids.numel() == 0 or step.param.numel() == 0:
        return
    taken = [table.index_select(0, ids) for table in step.states]
    param = step.param.index_select(0, ids)
    dtype = torch.promote_types(taken[0].dtype, torch.promote_types(param.dtype, torch.float32))
    g, p = rows.to(dtype), param.to(dtype)
    if step.factor != 1.0:
        g = g * step.factor
    if step.maximize:
        g = -g
    if step.weight_decay != 0:
        g = g.add(p, alpha=step.weight_decay)
    p = _update(step, p, g, taken, lr)
    step.param.index_copy_(0, ids, p.to(step.param.dtype))
    for table, touched in zip(step.states, taken, strict=True):
        table.index_copy_(0, ids, touched)


def coalesce(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Unique ascending ids and their rows; see `ops.rows.coalesce`."""
    if ids.numel() < 2 or bool((ids[1:] > ids[:-1]).all()):
        return ids, rows
    order = torch.sort(ids, stable=True).indices
    arranged = ids[order]
    first = torch.ones_like(arranged, dtype=torch.bool)
    first[1:] = arranged[1:] != arranged[:-1]
    starts = first.nonzero().reshape(-1)
    ends = torch.cat([starts[1:], torch.full_like(starts[:1], ids.numel())])
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    merged = rows[order[starts]].to(wide)
    # Each pass adds the k-th duplicate of every id, so there are as many passes as the commonest id has rows.
    following = starts + 1
    left = (following < ends).nonzero().reshape(-1)
    while left.numel():
        merged[left] += rows[order[following[left]]].to(wide)
        following += 1
        left = left[following[left] < ends[left]]
    return arranged[starts], merged.to(rows.dtype)


def _reals(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Complex tensors as views of pairs of reals: torch steps the real and the imaginary part apart."""
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]


def _in_reals(step: Step) -> Step:
    if not any(map(Tensor.is_complex, step.params)):
        return step
    return replace(
        step,
        params=_reals(step.params),
        grads=_reals([grad.resolve_conj() for grad in step.grads]),
        states=[_reals(state) for state in step.states],
        ema=None if step.ema is None else _reals(step.ema),
        copy_out=None if step.copy_out is None else _reals(step.copy_out),
    )


def _rows_in_reals(step: RowStep) -> RowStep:
    if not step.param.is_complex():
        return step
    param, rows, *states = _reals([step.param, step.rows.resolve_conj(), *step.states])
    return replace(step, param=param, rows=rows, states=states)


def _lr(step: Step | RowStep, counter: Tensor | None) -> float:
    t: float = step.step
    if counter is not None:
        counter += 1
        t = counter.item()
    return number(step.lr) / (1 + (t - 1) * step.lr_decay)


def _add_square(state: Tensor, x: Tensor, weight: float = 1.0, *, square_first: bool = False) -> Tensor:
    """state + weight*x*x. For a state with one number per row: the mean of x*x over the row."""
    if square_first:
        return state.add(x * x, alpha=weight)
    if state.shape == x.shape:
        return state.addcmul(x, x, value=weight)  # rounds once, as the kernels do
    return state.add(x.reshape(state.shape[0], -1).square().mean(dim=1, keepdim=True), alpha=weight)


def _per_row(value: Tensor, x: Tensor) -> Tensor:
    if value.shape == x.shape:
        return value
    return value.reshape(value.shape[0] if x.dim() else (), *(1,) * (x.dim() - 1))


def _update(step: Step | RowStep, p: Tensor, g: Tensor, states: Sequence[Tensor], lr: float) -> Tensor:
    """Update the states in place and return the new parameter."""
    first = states[0].to(p.dtype)
    if step.rule == "adagrad":
        h = _add_square(first, g)
        states[0].copy_(h)
        inside = isinstance(step, Step) and step.eps_inside_root
        root = (h + step.eps).sqrt() if inside else h.sqrt() + step.eps
        return p + (-lr * g) / _per_row(root, g)
    keras = isinstance(step, Step) and step.multiply_first
    v = _add_square(step.rho * first, g, 1 - step.rho, square_first=keras)
    u = states[1].to(p.dtype)
    if keras:
        d = _per_row((u + step.eps).sqrt(), g) * g / _per_row((v + step.eps).sqrt(), g)
    else:
        d = _per_row((u + step.eps).sqrt() / (v + step.eps).sqrt(), g) * g
    states[0].copy_(v)
    states[1].copy_(_add_square(step.rho * u, d, 1 - step.rho, square_first=keras))
    return p - lr * d
