"""Optimizers with one step counter for all parameters: what Keras's and MLX's terms have in common.

torch counts per parameter. Keras and MLX have one counter, and evaluate a learning rate schedule on it before it
advances. Every param group holds the counter under the key `counter`, with the same value, so torch's `state_dict`
carries it without a key of its own. A group's other keys are the family's hyperparameters. The learning rate is `lr` in
every family, because torch's LR schedulers write there:

    a number            each group's `lr` decides; LR schedulers and the user set it
    a schedule          the schedule decides: every step writes its value into every group's `lr`, where it can be read.
                        If anybody else has written there, the next step raises TypeError: no value is lost in silence

Steps use the kernels wherever those can step a parameter, and the same rule in torch operations
(`backends/reference.py`) elsewhere. A sparse gradient is made dense first: both families have dense gradients only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backends import dispatch
from ..backends import reference as eager
from ..backends.dispatch import Path, path_of
from ..step.step import Step, number
from .base import FusedOptimizer, StateDtype
from .schedule import Schedule


class SharedCounterOptimizer(FusedOptimizer):
    """A `FusedOptimizer` with one step counter and, optionally, a learning rate schedule."""

    counter: ClassVar[str]
    """The counter's key in the param groups."""
    peer: ClassVar[str]
    """The library whose terms these are."""

    _schedule: Schedule | None
    _shown_lr: float | None
    """The lr that the schedule last wrote into the groups. None before that, and after a state dict was loaded."""

    def _construct_counted(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        schedule: Schedule | None,
        fused: bool | None,
        state_dtype: StateDtype,
    ) -> None:
        if state_dtype not in (None, "param"):
            raise ValueError(f"Invalid state_dtype value: {state_dtype!r} (None or 'param')")
        self.state_dtype, self.row_wise, self.sparse = state_dtype, False, False
        self._schedule, self._shown_lr = schedule, None
        torch.optim.Optimizer.__init__(self, params, {**defaults, "fused": fused, self.counter: 0})

    # ---- the counter and the learning rate -------------------------------------------------------------------

    @property
    def has_schedule(self) -> bool:
        """True if the learning rate is a schedule or a callable, not a number."""
        return self._schedule is not None

    @property
    def _count(self) -> int:
        return int(self.param_groups[0][self.counter])

    def _advance(self) -> None:
        count = self._count + 1
        for group in self.param_groups:
            group[self.counter] = count

    def _evaluate(self, schedule: Schedule) -> float:
        """The schedule's value at the present count, which is not advanced yet."""
        return number(schedule(self._count))

    def _write_lr(self) -> None:
        """Write the schedule's value, if there is a schedule, into every group's `lr` for this step.

        TypeError if a group's `lr` is not what the schedule last wrote.
        """
        if self._schedule is None:
            return
        for group in self.param_groups:
            if self._shown_lr is not None and group["lr"] != self._shown_lr:
                raise TypeError(
                    f"a param group's lr was set to {group['lr']}, but this optimizer's learning rate is a schedule: "
                    "construct it with a number to set its learning rate or to use torch's LR schedulers"
                )
        self._shown_lr = self._evaluate(self._schedule)
        for group in self.param_groups:
            group["lr"] = self._shown_lr

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, at the present count.

        ValueError for an `lr` of its own beside a schedule, TypeError for complex parameters.
        """
        if self._schedule is not None and "lr" in param_group:
            raise ValueError("a group cannot have an lr of its own where the learning rate is a schedule")
        count = self._count if self.param_groups else 0
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group[self.counter] = count
        if self._shown_lr is not None:
            group["lr"] = self._shown_lr
        for param in group["params"]:
            if param.is_complex():
                del self.param_groups[-1]
                raise TypeError(f"{self.peer} has no rule for {param.dtype} parameters")

    # ---- state -----------------------------------------------------------------------------------------------

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _held_names(self) -> tuple[str, ...]:
        """The names of everything that a parameter's state holds."""
        return self.rule.state_names

    def _make_state(self, state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
        for name in self._held_names():
            state[name] = self._fresh(param, name, group)

    def share_memory(self) -> None:
        """Move all states into shared memory; make them first where there are none. The counter stays."""
        for group in self.param_groups:
            for param in group["params"]:
                for value in self._state_of(param, group).values():
                    value.share_memory_()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_schedule": self._schedule, "_shown_lr": self._shown_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does.

        ValueError for a state dict in other terms, with counters that differ, or with other state names than these
        settings keep.
        """
        super().load_state_dict(state_dict)
        self._shown_lr = None

    def _take_states(self, state: dict[str, Any], saved: dict[str, Any]) -> None:
        counts = [group.get(self.counter) for group in saved["param_groups"]]
        if None in counts:
            raise ValueError(
                f"the loaded state dict has no {self.counter!r} in its param groups, so it is not in {self.peer}'s "
                "terms; pushstep.optim.conversion.convert translates it"
            )
        if len(set(counts)) != 1:
            raise ValueError(f"the loaded state dict's groups differ in {self.counter}: {counts}")
        expected = set(self._held_names())
        for saved_id, held in saved["state"].items():
            if held and set(held) != expected:
                raise ValueError(
                    f"the loaded state of parameter {saved_id} holds {sorted(held)}; this optimizer's settings keep "
                    f"{sorted(expected)}"
                )
        super()._take_states(state, saved)
        if self.state_dtype is None:  # torch has rounded the states that the rule does not name
            saved_ids = itertools.chain.from_iterable(g["params"] for g in saved["param_groups"])
            for saved_id, param in zip(saved_ids, self._all_params(), strict=True):
                if self._is_widened(param):
                    for name, value in saved["state"].get(saved_id, {}).items():
                        state["state"][param][name] = value.to(dtype=torch.float32, device=param.device)

    # ---- the step --------------------------------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False: GradScaler unscales before `step`. It skips `step` on an infinity, so no step is counted."""
        return False

    def path(self, param: Tensor, group: dict[str, Any] | None = None) -> Path:
        """The path that the next step of `param` takes with its present gradient, and the reason."""
        if group is None:
            group = next(g for g in self.param_groups if any(p is param for p in g["params"]))
        return path_of(param, _options(group))

    def _run(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        *,
        list_name: str,
        factors: Sequence[float] | None = None,
        ema: str | None = None,
        copy_out: str | None = None,
        **arguments: Any,
    ) -> None:
        """Step these parameters of one group.

        `factors` has one number per parameter; `ema` and `copy_out` name states. A backend may remember a list between
        steps, and `list_name` tells a group's lists apart. RuntimeError if `fused=True` and no kernel takes a step.
        """
        memo = self._memo_of(group).setdefault(list_name, {})
        options = _options(group)
        seen = self._all_dense(params[0].device.type, params, grads, options, memo)
        if seen is not None:
            by_path: dict[str, Sequence[int]] = {params[0].device.type: range(len(params))}
        else:
            by_path = self._by_path(options, params)
        for backend, members in by_path.items():
            some = [params[k] for k in members]
            states = [self.state[param] for param in some]
            step = Step(
                rule=self.rule.kernel or self.rule.name,
                params=some,
                grads=[grads[k] for k in members],
                states=[[state[name] for state in states] for name in self.rule.state_names],
                factor=1.0 if factors is None else [factors[k] for k in members],
                ema=None if ema is None else [state[ema] for state in states],
                copy_out=None if copy_out is None else [state[copy_out] for state in states],
                memo=memo,
                seen=seen,
                **arguments,
            )
            kernels = dispatch.backend(backend)
            if kernels is None:
                eager.step(step)
            else:
                kernels.step(step)
                torch.autograd.graph.increment_version(step.written())

    def _by_path(self, options: dict[str, Any], params: list[Tensor]) -> dict[str, Sequence[int]]:
        members: dict[str, list[int]] = {}
        for k, param in enumerate(params):
            who = path_of(param, options)
            if options["fused"] and not who.fused:
                raise RuntimeError(f"fused=True, but no kernel takes this step: {who.reason}")
            members.setdefault(who.backend, []).append(k)
        return dict(members)


def dense(grad: Tensor) -> Tensor:
    """The gradient as a strided tensor: itself if it is one."""
    return grad if grad.layout is torch.strided else grad.to_dense()


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """A group's options for `dispatch.path_of`. Keras and MLX have no `foreach` or `differentiable`."""
    return {"fused": group["fused"], "foreach": None, "differentiable": False}
