"""Optimizers that count their steps once, for all parameters: what Keras's and MLX's terms have in common.

torch counts per parameter; Keras and MLX have one counter, and evaluate a learning rate schedule on it before it is
advanced. It is kept in every param group under `counter`, equal in all of them, so that torch's `state_dict` carries
it without a key of its own. A group's other keys are the family's hyperparameters, except that the learning rate is
`lr`, because torch's LR schedulers write there:

    a number            `lr` of each group is the truth; LR schedulers and the user set it
    a schedule          it is the truth: every step writes its value into every group's `lr`, to be seen, and a
                        value written there by anybody else is a TypeError at the next step, not a silent loss

Steps take the kernels wherever those can step a parameter, and the same rule in torch operations (`eager`) elsewhere.
A sparse gradient is made dense first: neither family has any other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import dispatch, eager
from .dispatch import Path, path_of
from .learning_rate import Schedule
from .optimizer import FusedOptimizer, StateDtype
from .step import Step, number


class OneCountOptimizer(FusedOptimizer):
    """A `FusedOptimizer` with one step counter and, if asked, a learning rate schedule."""

    counter: ClassVar[str]
    """The counter's key in the param groups."""
    peer: ClassVar[str]
    """Whose terms these are."""

    _schedule: Schedule | None
    _shown_lr: float | None
    """What the schedule last wrote into the groups; None: it has not, or a state dict was loaded since."""

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
    def _count(self) -> int:
        return int(self.param_groups[0][self.counter])

    def _advance(self) -> None:
        count = self._count + 1
        for group in self.param_groups:
            group[self.counter] = count

    def _evaluate(self, schedule: Schedule) -> float:
        """The schedule's value now, on the count before it is advanced."""
        return number(schedule(self._count))

    def _write_lr(self) -> None:
        """Let the schedule, if there is one, set every group's `lr` for this step."""
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
        """torch's; the group joins at the present count."""
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
        """Move everything that the states hold (not the counter) into shared memory, making it first if need be."""
        for group in self.param_groups:
            for param in group["params"]:
                for value in self._state_of(param, group).values():
                    value.share_memory_()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_schedule": self._schedule, "_shown_lr": self._shown_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's. ValueError for a state dict in other terms, or one that holds more or less than this one would."""
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
        if self.state_dtype is None:  # torch rounded what the rule's own names do not cover
            saved_ids = itertools.chain.from_iterable(g["params"] for g in saved["param_groups"])
            for saved_id, param in zip(saved_ids, self._all_params(), strict=True):
                if param.dtype in (torch.float16, torch.bfloat16):
                    for name, value in saved["state"].get(saved_id, {}).items():
                        state["state"][param][name] = value.to(dtype=torch.float32, device=param.device)

    # ---- the step --------------------------------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler unscales before `step`, and leaves `step` out when it found an infinity: the count stands."""
        return False

    def path(self, param: Tensor, group: dict[str, Any] | None = None) -> Path:
        """Which path the next step of `param` takes with its present gradient, and why."""
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
        """Step these parameters of one group; `factors` is one per parameter, `ema` and `copy_out` name states.

        A backend may remember a list between steps; `list_name` tells a group's lists apart.
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
    """The gradient as a strided tensor."""
    return grad if grad.layout is torch.strided else grad.to_dense()


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """A group in the words of `dispatch.path_of`; torch's other switches have no counterpart here."""
    return {"fused": group["fused"], "foreach": None, "differentiable": False}
