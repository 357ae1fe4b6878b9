"""Optimizers in torch's terms: the walk over groups that replaces torch's steps with fused ones.

A group's tensors are sorted by the path that steps them. Those that the kernels take go to their backend in one call.
The rest go to torch's functional rule, also in one call. torch's own `step` is never called: torch wraps the `step` of
every class in its hooks, so that call would run every hook twice.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused, _use_grad_for_differentiable

from ..backends import dispatch
from ..backends import reference as eager
from ..backends.dispatch import Backend, Path, path_of
from ..step.footprint import Seen
from ..step.overlaps import waves_of
from ..step.step import RowStep, Step
from .base import FusedOptimizer


def _grad_only_if_differentiable(step: Callable[..., Any]) -> Callable[..., Any]:
    """torch's `_use_grad_for_differentiable`, but outside torch.compile without its import of torch._dynamo.

    That import takes a second.
    """
    under_compile: Callable[..., Any] = _use_grad_for_differentiable(step)

    @functools.wraps(step)
    def wrapper(self: TorchTerms, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return under_compile(self, *args, **kwargs)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *args, **kwargs)

    return wrapper


class TorchTerms(FusedOptimizer, ABC):
    """Base of Adadelta and Adagrad in torch's terms: it hands each parameter to the path that steps it."""

    @_grad_only_if_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        closure: reevaluates the model and returns the loss.
        """
        if "capturable" in self.defaults:
            self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = group["params"]
        grads: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]  # None is dropped below
        if any(map(is_, grads, itertools.repeat(None))):
            params = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        if not params:
            return
        memo = self._memo_of(group)
        device_type = params[0].device.type
        seen = self._all_dense(device_type, params, grads, group, memo)
        if seen is not None:
            self._step_by(dispatch.backend(device_type), params, grads, group, memo, seen)
            return
        # Parameters that share memory step in torch's order. torch's own functions keep that order by themselves.
        waves = waves_of([params]) if len(params) > 1 and path_of(None, group).fused else None
        if waves is None:
            self._step_each(params, grads, group, memo)
            return
        for members in waves:
            self._step_each([params[k] for k in members], [grads[k] for k in members], group, memo)

    def _step_each(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], group: dict[str, Any], memo: dict[str, Any]
    ) -> None:
        """Step parameters of any kind that do not overlap, each by its path."""
        row_wise = self._option(group, "row_wise")
        fused: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        by_torch: list[Tensor] = []
        for param, grad in zip(params, grads, strict=True):
            if grad.is_sparse:
                self._check_sparse(group)
            who = path_of(param, group)
            if grad.is_sparse and (who.fused or row_wise or not self._torch_takes_sparse):
                self._step_sparse(who, param, grad, group)
            elif who.fused:
                members = fused.setdefault(who.backend, ([], []))
                members[0].append(param)
                members[1].append(grad)
            else:
                by_torch.append(param)
        for device_type, (some, their_grads) in fused.items():
            self._step_by(dispatch.backend(device_type), some, their_grads, group, memo)
        if by_torch and row_wise:  # torch has no row-wise rule
            self._check_row_wise(group)
            left = [param.grad for param in by_torch if param.grad is not None]
            self._step_by(eager, by_torch, left, group, None)
        elif by_torch:
            self._step_torch(by_torch, group)

    def _arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        given = self.rule.arguments({name: group[name] for name in self.rule.defaults})
        # GradScaler sets these attributes around a step. At other times they must not exist: it would multiply its
        # scale by a `grad_scale` that is there.
        handed = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        return {**given, **handed}

    def _step_by(
        self,
        kernels: Backend | None,
        params: list[Tensor],
        grads: list[Tensor],
        group: dict[str, Any],
        memo: dict[str, Any] | None,
        seen: Seen | None = None,
    ) -> None:
        states = list(map(self.state.__getitem__, params))
        if not all(states):
            states = [self._state_of(param, group) for param in params]
        step = Step(
            rule=self.rule.name,
            params=params,
            grads=grads,
            states=[[state[name] for state in states] for name in self.rule.state_names],
            steps=[state["step"] for state in states],
            memo=memo,
            seen=seen,
            **self._arguments(group),
        )
        if kernels is None:
            raise RuntimeError(f"no kernels for {params[0].device.type}")
        kernels.step(step)
        torch.autograd.graph.increment_version(step.written())

    def _check_row_wise(self, group: dict[str, Any]) -> None:
        """RuntimeError if a row-wise step would be differentiated, traced or taken by `foreach`.

        torch has no row-wise rule for that.
        """
        if group["differentiable"] or group["foreach"] is not None or torch.compiler.is_compiling():
            why = path_of(None, group).reason
            raise RuntimeError(f"row_wise=True needs the fused path, which is not taken: {why}")

    def _step_sparse(self, who: Path, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self._state_of(param, group)
        states = [state[name] for name in self.rule.state_names]
        ids, rows, unique = _rows_of(grad)
        table = [param, *states]
        if grad.sparse_dim() != 1:  # several sparse dimensions step as one, of their product
            lead = grad.shape[: grad.sparse_dim()].numel()
            table = [t.view(lead, *grad.shape[grad.sparse_dim() :]) for t in table]
        step = RowStep(
            rule=self.rule.name,
            param=table[0],
            ids=ids,
            rows=rows,
            unique=unique,
            states=table[1:],
            steps=state["step"],
            **self._arguments(group),
        )
        (dispatch.backend(who.backend) or eager).step_rows(step)
        torch.autograd.graph.increment_version(step.written())

    # ---- where the two rules differ --------------------------------------------------------------------------

    _torch_takes_sparse: ClassVar[bool]

    @abstractmethod
    def _check_sparse(self, group: dict[str, Any]) -> None:
        """Raise torch's RuntimeError if a sparse gradient is not allowed."""

    @abstractmethod
    def _step_torch(self, params: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Step the parameters by torch's functional rule."""

    def _torch_lists(
        self, params: Sequence[Tensor], group: dict[str, Any]
    ) -> tuple[list[list[Tensor]], bool]:
        """The lists that torch's functional rules take, and whether any parameter is complex.

        The lists are parameters, gradients, each state, and step counters. RuntimeError if `fused` and torch has no
        fused step for a parameter.
        """
        if group["fused"]:
            for param in params:
                _device_dtype_check_for_fused(param)
        states = [self._state_of(param, group) for param in params]
        lists = [
            list(params),
            [param.grad for param in params if param.grad is not None],
            *([state[name] for state in states] for name in self.rule.state_names),
            [state["step"] for state in states],
        ]
        return lists, any(map(torch.is_complex, params))


def _rows_of(grad: Tensor) -> tuple[Tensor, Tensor, bool]:
    """A sparse gradient's ids, its rows, and whether the ids are known to be unique."""
    indices, values = grad._indices(), grad._values()
    if indices.shape[0] == 1:
        return indices[0], values, grad.is_coalesced()
    ids = torch.zeros(indices.shape[1], dtype=torch.int64, device=indices.device)
    for index, size in zip(indices, grad.shape, strict=False):
        ids = ids * size + index
    return ids, values, grad.is_coalesced()
