"""The user's original optimizers: what can be attached, and how a RemoteOptimizer takes them over.

The originals keep their parameters and groups, so schedulers made before attach continue to steer them. Their hooks move
to the RemoteOptimizer, their state is cleared, and from then on their own step is refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, NoReturn

import torch
from torch import Tensor

from pushstep.optim import keras as keras
from pushstep.optim import mlx as mlx
from pushstep.optim.keras.step import KerasOptimizer
from pushstep.optim.mlx import MlxOptimizer
from pushstep.optim.optimizers.counted import SharedCounterOptimizer
from pushstep.proto.errors import NotAttached, UnsupportedModule

_HOOK_TABLES = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def rule_of(optimizer: torch.optim.Optimizer) -> str:
    """Return the server's name of an optimizer's rule. Raises UnsupportedModule if the server has no such rule."""
    if getattr(optimizer, "row_wise", False) or any(g.get("row_wise") for g in optimizer.param_groups):
        raise UnsupportedModule(
            problem="row_wise=True keeps one accumulator per row, the server one per element: attach without it"
        )
    if getattr(optimizer, "state_dtype", None) == "param":
        raise UnsupportedModule(
            problem="state_dtype='param' keeps half parameters' state in halves, the server in float32: "
            "attach without it"
        )
    for kind, name in ((torch.optim.Adadelta, "adadelta"), (torch.optim.Adagrad, "adagrad")):
        if isinstance(optimizer, kind):
            return name
    for terms, name in ((keras.Adadelta, "keras_adadelta"), (keras.Adagrad, "keras_adagrad")):
        if isinstance(optimizer, terms):
            _check_keras(optimizer)
            return name
    for form, name in ((mlx.AdaDelta, "mlx_adadelta"), (mlx.Adagrad, "mlx_adagrad")):
        if isinstance(optimizer, form):
            _check_mlx(optimizer)
            return name
    raise UnsupportedModule(
        problem=f"{type(optimizer).__name__} is not a rule that the server steps; use Adadelta or Adagrad"
    )


def _check_keras(optimizer: KerasOptimizer) -> None:
    """Raise UnsupportedModule for options of Keras's beside the update; the message names the replacement here."""
    for asked, what, instead in (
        (
            any((optimizer.clipnorm, optimizer.clipvalue, optimizer.global_clipnorm)),
            "clipping",
            "the hook clipnorm or global_clipnorm, or clip_grad_value for clipvalue",
        ),
        (optimizer.use_ema, "use_ema", "an ema hook"),
        (optimizer.loss_scale_factor, "loss_scale_factor", "a torch.amp.GradScaler"),
        (
            optimizer.gradient_accumulation_steps,
            "gradient_accumulation_steps",
            "backward() several times before step()",
        ),
        (
            optimizer.has_schedule,
            "a schedule as learning_rate",
            "a number, and a torch scheduler or an lr_scheduler hook",
        ),
        (optimizer.has_exclusions, "exclude_from_weight_decay", "a param group with weight_decay=None"),
    ):
        if asked:
            raise UnsupportedModule(problem=f"the server does not do Keras's {what}: use {instead}")


def _check_mlx(optimizer: MlxOptimizer) -> None:
    """Raise UnsupportedModule for a callable as the learning rate: the server cannot call it."""
    if optimizer.has_schedule:
        raise UnsupportedModule(
            problem="the server does not do MLX's callable learning rates: use a number, and a torch scheduler or an "
            "lr_scheduler hook"
        )


def as_optimizers(given: Any) -> list[torch.optim.Optimizer]:
    """Return one optimizer or several as a list.

    Raises UnsupportedModule for anything else; the message says what to attach instead.
    """
    several = isinstance(given, Iterable) and not isinstance(given, (str, torch.optim.Optimizer))
    optimizers = list(given) if several else [given]
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Optimizer):
            continue
        kind = type(optimizer)
        problem = f"{kind.__module__}.{kind.__qualname__} is no torch optimizer: attach torch.optim's or pushstep.optim's"
        if kind.__module__.partition(".")[0] == "keras":
            problem = (
                f"keras.optimizers.{kind.__name__} steps Keras's own variables: pushstep.optim.keras has it, for torch "
                "parameters, with the same arguments; for fit(), pushstep.client.keras.attach(session, optimizer)"
            )
        raise UnsupportedModule(problem=problem)
    return optimizers


def check_distinct(parameters: Iterable[Tensor]) -> None:
    """Raise UnsupportedModule if a parameter would be stepped twice."""
    seen: set[int] = set()
    for parameter in parameters:
        if id(parameter) in seen:
            raise UnsupportedModule(problem="a parameter is in two optimizers or twice in one")
        seen.add(id(parameter))


def stepped_states(optimizers: Sequence[torch.optim.Optimizer]) -> dict[Tensor, dict[str, Any]]:
    """Return the state of each parameter that has been stepped."""
    return {
        parameter: state
        for optimizer in optimizers
        for parameter, state in map(partial(_counted, optimizer), optimizer.state.items())
        if state and float(state.get("step", 0)) > 0
    }


def _counted(
    optimizer: torch.optim.Optimizer, entry: tuple[Tensor, dict[str, Any]]
) -> tuple[Tensor, dict[str, Any]]:
    """Return a parameter and its state; a shared count is added as the state's `step`."""
    parameter, state = entry
    if state and isinstance(optimizer, SharedCounterOptimizer):
        return parameter, {**state, "step": optimizer.param_groups[0][optimizer.counter]}
    return parameter, state


class _HookTable(OrderedDict[int, Callable[..., Any]]):
    """One of torch's hook tables that holds the hooks of several optimizers; handles made before still remove hooks.

    A handle deletes from the table that it was made for. This table keeps those tables, and does not call a hook that
    was deleted from its own table.
    """

    def __init__(self, tables: Sequence[OrderedDict[int, Callable[..., Any]]]) -> None:
        super().__init__()
        self._own_table = {number: table for table in tables for number in table}
        for table in tables:
            self.update(table)

    def values(self) -> Any:
        """Return the hooks to call, in order."""
        if not self:
            return ()
        return [hook for number, hook in self.items() if number in self._own_table.get(number, self)]


# Methods that an attached optimizer refuses: its state is on the server, so they would act on nothing.
_REFUSED: Final = ("step", "state_dict", "load_state_dict", "add_param_group")
# Attribute in which an optimizer keeps the tables whose hooks have moved, so that another session can attach it again.
_GIVEN: Final = "_pushstep_given_tables"


class Takeover:
    """Takes optimizers over for a server: moves their hooks, clears their state, makes them refuse to step."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], taker: torch.optim.Optimizer) -> None:
        self._taker = taker
        self._before = [(optimizer, dict(vars(optimizer)), dict(optimizer.state)) for optimizer in optimizers]

    def do(self) -> None:
        """Take the optimizers over."""
        tables = {
            table: [[*before.get(_GIVEN, {}).get(table, ()), before[table]] for _, before, _ in self._before]
            for table in _HOOK_TABLES
        }
        for table, of_each in tables.items():
            setattr(self._taker, table, _HookTable([one for several in of_each for one in several]))
        for number, (optimizer, *_) in enumerate(self._before):
            vars(optimizer)[_GIVEN] = {table: tables[table][number] for table in _HOOK_TABLES}
            vars(optimizer).update({table: OrderedDict() for table in _HOOK_TABLES})
            vars(optimizer).update({method: _refusal(method) for method in _REFUSED})
            optimizer.state.clear()

    def undo(self) -> None:
        """Give the optimizers back as they were."""
        for optimizer, before, state in self._before:
            for name in (_GIVEN, *_HOOK_TABLES, *_REFUSED):
                if name in before:
                    vars(optimizer)[name] = before[name]
                else:
                    vars(optimizer).pop(name, None)
            optimizer.state.update(state)


def _refusal(method: str) -> Callable[..., NoReturn]:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise NotAttached(
            problem=f"this optimizer was attached to a server: call {method}() of what attach() returned"
        )

    # else a scheduler warns that its own wrapper of step is gone
    refuse._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return refuse
