"""The base of every optimizer here, in whichever terms: its states, and which path steps which tensor.

States are made, kept and loaded as torch does. They may be wider than a half parameter, or hold one number per row. A
few C loops recognise a list whose every tensor the kernels take. What they find out is kept until the list's next step.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from operator import attrgetter
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import (
    _get_scalar_dtype,
)

from ..backends.dispatch import Path, path_of
from ..rules.rule import Rule
from ..step.footprint import Footprint, Seen, footprint
from ..step.step import FUSED_DTYPES

StateDtype = Literal["param"] | None

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_HALF = (torch.float16, torch.bfloat16)
_STATE_OPTIONS = ("row_wise", "sparse")

_is_sparse = attrgetter("is_sparse")
_IS_ON = {"cpu": attrgetter("is_cpu"), "cuda": attrgetter("is_cuda")}


class FusedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose steps are single passes over memory where the kernels take them."""

    rule: ClassVar[Rule]
    state_dtype: StateDtype
    row_wise: bool
    sparse: bool

    def _construct(
        self, params: Any, defaults: dict[str, Any], *, state_dtype: StateDtype, row_wise: bool, sparse: bool
    ) -> None:
        """Construct as `torch.optim.Optimizer` does, not as torch's Adadelta and Adagrad do.

        Those allocate states in other shapes. ValueError for an argument out of range, RuntimeError if `fused` is
        combined with `differentiable` or `foreach`, both as in torch.
        """
        if isinstance(defaults["lr"], Tensor) and defaults["lr"].numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        self.rule.validate({name: defaults[name] for name in self.rule.defaults})
        if state_dtype not in (None, "param"):
            raise ValueError(f"Invalid state_dtype value: {state_dtype!r} (None or 'param')")
        if defaults["fused"]:
            if defaults["differentiable"]:
                raise RuntimeError("`fused` does not support `differentiable`")
            if defaults["foreach"]:
                raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        self.state_dtype, self.row_wise, self.sparse = state_dtype, row_wise, sparse
        torch.optim.Optimizer.__init__(self, params, defaults)

    # ---- state -----------------------------------------------------------------------------------------------

    def _option(self, group: dict[str, Any], name: str) -> bool:
        return bool(group.get(name, getattr(self, name)))

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The parameter's state. It is made now if there is none."""
        state: dict[str, Any] = self.state[param]
        if len(state) == 0:
            with ordinary_tensors():
                self._make_state(state, param, group)
        return state

    def _make_state(self, state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
        on_device = group["fused"] or group.get("capturable", False)
        state["step"] = torch.zeros(
            (),
            dtype=_get_scalar_dtype(is_fused=group["fused"]),  # type: ignore[no-untyped-call]
            device=param.device if on_device else "cpu",
        )
        for name in self.rule.state_names:
            state[name] = self._fresh(param, name, group)

    def _is_widened(self, param: Tensor) -> bool:
        """True if the states of `param` are float32 and the parameter is not."""
        return param.dtype in _HALF and self.state_dtype is None

    def _fresh(self, param: Tensor, name: str, group: dict[str, Any]) -> Tensor:
        # As in torch, the constructor's initial value counts even where a group has its own.
        value: Any = self.rule.initial_value(name, self.defaults)
        dtype = torch.float32 if self._is_widened(param) else param.dtype
        if self._option(group, "row_wise"):
            if param.is_complex():
                raise RuntimeError("row_wise does not support complex parameters")
            return torch.full(_row_shape(param), value, dtype=dtype, device=param.device)
        if param.is_complex():
            value = complex(value, value)
        return torch.full_like(param, value, dtype=dtype, memory_format=torch.preserve_format)

    def share_memory(self) -> None:
        """Move the states, made first if need be, into shared memory. Counters stay, as in torch."""
        for group in self.param_groups:
            for param in group["params"]:
                state = self._state_of(param, group)
                for name in self.rule.state_names:
                    state[name].share_memory_()

    def __getstate__(self) -> dict[str, Any]:
        own = {"state_dtype": self.state_dtype, "row_wise": self.row_wise, "sparse": self.sparse}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups", [])
        loading = self.__dict__.pop("_loading", None)
        if loading is not None:
            self._take_states(state, loading)
        for live, new in zip(before, state["param_groups"], strict=False):
            for name in _STATE_OPTIONS:
                if name in live:
                    new.setdefault(name, live[name])
        super().__setstate__(state)
        self.__dict__.pop("_memos", None)
        self.__dict__.setdefault("state_dtype", None)
        self.__dict__.setdefault("row_wise", False)
        self.__dict__.setdefault("sparse", False)
        self.defaults.setdefault("fused", None)
        for group in self.param_groups:
            group.setdefault("fused", None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep float32 states of half parameters, and row-wise states.

        With `state_dtype="param"` the states of half parameters are cast, as in torch. ValueError if a state is row-wise
        and `row_wise` is off, or the other way round.
        """

        # It runs after the user's hooks and sees the final state dict, before torch casts it to the parameters' dtypes.
        def remember(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            self.__dict__["_loading"] = final

        handle = self.register_load_state_dict_pre_hook(remember)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_loading", None)
        with ordinary_tensors():
            for state in self.state.values():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.is_inference():
                        state[name] = value.clone()

    def _take_states(self, state: dict[str, Any], saved: dict[str, Any]) -> None:
        """Check the shapes of the states being loaded; put back float32 states that torch has cast to half.

        state: torch's cast copy, changed in place. saved: the state dict before the cast. ValueError if a shape does
        not fit `row_wise`.
        """
        saved_ids = itertools.chain.from_iterable(g["params"] for g in saved["param_groups"])
        params = itertools.chain.from_iterable((p, g) for g in self.param_groups for p in g["params"])
        pairs = zip(saved_ids, zip(params, params, strict=True), strict=True)
        for saved_id, (param, group) in pairs:
            for name in self.rule.state_names:
                value = saved["state"].get(saved_id, {}).get(name)
                if not isinstance(value, Tensor):
                    continue
                row_wise, shape = self._option(group, "row_wise"), _row_shape(param)
                if row_wise and value.shape != shape:
                    raise ValueError(
                        f"{name} has shape {tuple(value.shape)}; row_wise=True keeps {tuple(shape)}"
                    )
                if not row_wise and value.shape == shape and value.shape != param.shape:
                    raise ValueError(
                        f"{name} is row-wise, shape {tuple(value.shape)}, for a parameter of shape "
                        f"{tuple(param.shape)}: load it with row_wise=True"
                    )
                if self._is_widened(param):
                    state["state"][param][name] = value.to(dtype=torch.float32, device=param.device)

    # ---- which path steps what ----------------------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True if kernels take every tensor of this step. GradScaler then leaves unscaling to the step."""
        return all(
            self.path(param, group).fused
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        )

    def path(self, param: Tensor, group: dict[str, Any] | None = None) -> Path:
        """Which path the next step of `param` takes with its present gradient, and why."""
        if group is None:
            group = next(g for g in self.param_groups if any(p is param for p in g["params"]))
        return path_of(param, group)

    def _all_dense(
        self,
        device_type: str,
        params: list[Tensor],
        grads: list[Tensor],
        group: dict[str, Any],
        memo: dict[str, Any],
    ) -> Seen | None:
        """`path_of` for a whole list, by a few C loops: its footprints if the kernels take every tensor.

        None means that the caller has to look at each tensor. `memo` keeps the footprint of the parameters.
        """
        if not (
            path_of(None, group).fused
            and not (device_type == "cpu" and group.get("capturable", False))
            and _PLAIN.issuperset(map(type, params))
            and _PLAIN.issuperset(map(type, grads))
            and not any(map(_is_sparse, grads))  # faster than the error below
        ):
            return None
        try:
            seen = footprint(params)
            grads_seen = footprint(grads)
        except RuntimeError:  # some tensor has no memory of its own
            return None
        known: Footprint | None = memo.get("plain")
        if known is not None and known == seen:
            return known, grads_seen
        _, dtypes, _, contiguous = seen
        if not (
            device_type in _IS_ON
            and all(map(_IS_ON[device_type], params))
            and FUSED_DTYPES.issuperset(dtypes)
            and contiguous
            and not any(map(Tensor.is_inference, params))
            and all(path_of(p, group).fused for p in params)  # a device may be too old for the kernels
        ):
            return None
        memo["plain"] = seen
        return seen, grads_seen

    def _memo_of(self, group: dict[str, Any]) -> dict[str, Any]:
        """What this group's last step found out about its list. It is dropped when the group is replaced."""
        memos: dict[int, dict[str, Any]] = self.__dict__.setdefault("_memos", {})
        memo = memos.get(id(group))
        if memo is None or memo["group"] is not group:
            if len(memos) > 2 * len(self.param_groups):
                memos.clear()
            memo = memos[id(group)] = {"group": group}
        return memo


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """A block whose new tensors can be written to later, in any mode.

    Tensors that are made in inference mode cannot be written to outside it.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def _row_shape(param: Tensor) -> torch.Size:
    return torch.Size((param.shape[0] if param.dim() else 1, 1))
