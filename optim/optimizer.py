"""What the two classes share: torch's optimizer, with the walk over groups replaced by fused steps.

A group's tensors are sorted by who can step them. Those that the kernels take go to their backend in one call;
the rest go to torch's own functional rule, in one call too. torch's `step` is never called: it is wrapped by the
hooks of its own class, and ours by those of ours, so calling it would run every hook twice.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from operator import attrgetter, call, is_
from typing import Any, ClassVar, Literal
from weakref import ref

import torch
from torch import Tensor
from torch.optim.optimizer import (
    _device_dtype_check_for_fused,
    _get_scalar_dtype,
    _use_grad_for_differentiable,
)

from . import dispatch, eager
from .dispatch import FUSED_DTYPES, Path, RowStep, Step, path_of
from .kernel_rule import KernelRule

StateDtype = Literal["param"] | None

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_HALF = (torch.float16, torch.bfloat16)
_STATE_OPTIONS = ("row_wise", "sparse")

_layout, _dtype = attrgetter("layout"), attrgetter("dtype")
_IS_ON = {"cpu": attrgetter("is_cpu"), "cuda": attrgetter("is_cuda")}


def _grad_only_if_differentiable(step: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of the same purpose, without its import of torch._dynamo (a second) outside torch.compile."""
    under_compile: Callable[..., Any] = _use_grad_for_differentiable(step)

    @functools.wraps(step)
    def wrapper(self: FusedOptimizer, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return under_compile(self, *args, **kwargs)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *args, **kwargs)

    return wrapper


class FusedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose steps are single passes over memory wherever they can be."""

    rule: ClassVar[KernelRule]
    state_dtype: StateDtype
    row_wise: bool
    sparse: bool

    def _construct(
        self, params: Any, defaults: dict[str, Any], *, state_dtype: StateDtype, row_wise: bool, sparse: bool
    ) -> None:
        """torch's construction without its classes' own, which would allocate states in other shapes."""
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
        """This parameter's state, made now if it has none."""
        state: dict[str, Any] = self.state[param]
        if len(state) == 0:
            on_device = group["fused"] or group.get("capturable", False)
            state["step"] = torch.zeros(
                (),
                dtype=_get_scalar_dtype(is_fused=group["fused"]),  # type: ignore[no-untyped-call]
                device=param.device if on_device else "cpu",
            )
            for name in self.rule.state_names:
                state[name] = self._fresh(param, name, group)
        return state

    def _fresh(self, param: Tensor, name: str, group: dict[str, Any]) -> Tensor:
        # torch reads the constructor's initial value even where a group names its own.
        value: Any = self.rule.initial_value(name, self.defaults)
        dtype = torch.float32 if param.dtype in _HALF and self.state_dtype is None else param.dtype
        if self._option(group, "row_wise"):
            if param.is_complex():
                raise RuntimeError("row_wise does not support complex parameters")
            return torch.full(_row_shape(param), value, dtype=dtype, device=param.device)
        if param.is_complex():
            value = complex(value, value)
        return torch.full_like(param, value, dtype=dtype, memory_format=torch.preserve_format)

    def share_memory(self) -> None:
        """Move the states (not the step counters, as torch) into shared memory, making them first if need be."""
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
        """torch's, but half parameters keep float32 states (see `state_dtype`), and row-wise states stay row-wise."""

        # Runs after the user's own hooks, so it sees what is really loaded, before torch rounds it to the parameter's dtype.
        def remember(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            self.__dict__["_loading"] = final

        handle = self.register_load_state_dict_pre_hook(remember)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_loading", None)

    def _take_states(self, state: dict[str, Any], saved: dict[str, Any]) -> None:
        """Check the shapes of the states being loaded, and undo torch's cast where ours are wider."""
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
                if param.dtype in _HALF and self.state_dtype is None:
                    state["state"][param][name] = value.to(dtype=torch.float32, device=param.device)

    # ---- the step --------------------------------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler asks: true if kernels take every tensor of this step, so that none needs unscaling before."""
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
        grads: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]  # the None are dropped here
        if any(map(is_, grads, itertools.repeat(None))):
            params = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        if not params:
            return
        memo = self._memo_of(group)
        device_type = params[0].device.type
        if self._all_dense(device_type, params, grads, group, memo):
            self._step_fused(device_type, params, grads, group, memo)
            return
        fused: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        by_torch: list[Tensor] = []
        for param, grad in zip(params, grads, strict=True):
            if grad.is_sparse:
                self._check_sparse(group)
            who = path_of(param, group)
            if grad.is_sparse and (who.fused or not self._torch_takes_sparse):
                self._step_sparse(who, param, grad, group)
            elif who.fused:
                members = fused.setdefault(who.backend, ([], []))
                members[0].append(param)
                members[1].append(grad)
            else:
                by_torch.append(param)
        for device_type, (some, their_grads) in fused.items():
            self._step_fused(device_type, some, their_grads, group, memo)
        if by_torch:
            self._step_torch(by_torch, group)

    def _all_dense(
        self,
        device_type: str,
        params: list[Tensor],
        grads: list[Tensor],
        group: dict[str, Any],
        memo: dict[str, Any],
    ) -> bool:
        """`path_of` for a whole list at the price of a few C loops; False means: look at each."""
        if not (
            path_of(None, group).fused
            and not (device_type == "cpu" and group.get("capturable", False))
            and device_type in _IS_ON
            and all(map(_IS_ON[device_type], params))
            and FUSED_DTYPES.issuperset(map(_dtype, params))
            and _PLAIN.issuperset(map(type, grads))
            and set(map(_layout, grads)) == {torch.strided}
        ):
            return False
        known: list[ref[Tensor]] = memo.get("plain", [])
        if len(known) == len(params) and all(map(is_, params, map(call, known))):
            return True
        plain = _PLAIN.issuperset(map(type, params)) and not any(map(Tensor.is_inference, params))
        if not plain or not all(map(Tensor.is_contiguous, params)):
            return False
        if not all(path_of(p, group).fused for p in params):  # a device may be too old for the kernels
            return False
        memo["plain"] = list(map(ref, params))
        return True

    def _memo_of(self, group: dict[str, Any]) -> dict[str, Any]:
        """What was learned about this group's list at its last step; forgotten when the group is replaced."""
        memos: dict[int, dict[str, Any]] = self.__dict__.setdefault("_memos", {})
        memo = memos.get(id(group))
        if memo is None or memo["group"] is not group:
            if len(memos) > 2 * len(self.param_groups):
                memos.clear()
            memo = memos[id(group)] = {"group": group}
        return memo

    def _arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        given = self.rule.arguments({name: group[name] for name in self.rule.defaults})
        # GradScaler sets these around a step; it minds if they exist at other times.
        handed = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        return {**given, **handed}

    def _step_fused(
        self,
        device_type: str,
        params: list[Tensor],
        grads: list[Tensor],
        group: dict[str, Any],
        memo: dict[str, Any],
    ) -> None:
        states = [self.state[param] for param in params]
        if not all(states):
            states = [self._state_of(param, group) for param in params]
        step = Step(
            rule=self.rule.name,
            params=params,
            grads=grads,
            states=[[state[name] for state in states] for name in self.rule.state_names],
            steps=[state["step"] for state in states],
            memo=memo,
            **self._arguments(group),
        )
        backend = dispatch.backend(device_type)
        if backend is None:
            raise RuntimeError(f"no kernels for {device_type}")
        backend.step(step)
        torch.autograd.graph.increment_version(step.written())

    def _step_sparse(self, who: Path, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self._state_of(param, group)
        states = [state[name] for name in self.rule.state_names]
        ids, rows, unique = _rows_of(grad)
        table = [param, *states]
        if grad.sparse_dim() != 1:  # several sparse dimensions are one, of their product
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

    # ---- what the two rules differ in ------------------------------------------------------------------------

    _torch_takes_sparse: ClassVar[bool]

    def _check_sparse(self, group: dict[str, Any]) -> None:
        """Raise torch's RuntimeError if a sparse gradient is not allowed."""
        raise NotImplementedError

    def _step_torch(self, params: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Step by torch's functional rule."""
        raise NotImplementedError

    def _torch_lists(
        self, params: Sequence[Tensor], group: dict[str, Any]
    ) -> tuple[list[list[Tensor]], bool]:
        """Lists as torch's functional rules want them, and whether any parameter is complex."""
        if group["fused"]:
            for param in params:
                _device_dtype_check_for_fused(param)
        if self._option(group, "row_wise"):
            why = path_of(params[0], group).reason
            raise RuntimeError(f"row_wise=True needs the fused path, which is not taken: {why}")
        states = [self._state_of(param, group) for param in params]
        lists = [
            list(params),
            [param.grad for param in params if param.grad is not None],
            *([state[name] for state in states] for name in self.rule.state_names),
            [state["step"] for state in states],
        ]
        return lists, any(map(torch.is_complex, params))


def _row_shape(param: Tensor) -> torch.Size:
    return torch.Size((param.shape[0] if param.dim() else 1, 1))


def _rows_of(grad: Tensor) -> tuple[Tensor, Tensor, bool]:
    """ids, rows, and whether the ids are known to be unique."""
    indices, values = grad._indices(), grad._values()
    if indices.shape[0] == 1:
        return indices[0], values, grad.is_coalesced()
    ids = torch.zeros(indices.shape[1], dtype=torch.int64, device=indices.device)
    for index, size in zip(indices, grad.shape, strict=False):
        ids = ids * size + index
    return ids, values, grad.is_coalesced()
