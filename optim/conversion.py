"""Convert optimizer state between torch's, Keras's and MLX's terms; refuse, with the reason, if not exact.

    rule        torch                       Keras                                       MLX
    Adadelta    square_avg, acc_delta       accumulated_grad, accumulated_delta_var     v, u
    Adagrad     sum                         accumulator                                 v
    counter     step, one per parameter     iterations, one                             step, one

In each row the accumulators are the same quantities: running means of g*g and of d*d, or the sum of g*g. No family
folds lr or eps into them, so they carry over although the rules differ.

**Exact** means: the result holds every number that the source's rule will read again, bit for bit. Those numbers are
the accumulators of every parameter and the count of updates. `ConversionError` refuses what cannot be kept exactly:

- torch's counts when they differ between parameters that have been stepped; parameters never stepped do not matter
- a count that has reached 2**24, if the source or the target keeps it in torch's float32 counters, which stop there
- accumulators with values that the target's state dtype would round
- row-wise state (one number per row) and complex state, which only torch's terms have
- Keras's state in the middle of a gradient accumulation
- Keras's `average` for a target that keeps none (unless dropped on request), or no `average` for one that keeps it
- an Adagrad accumulator that does not exist yet and would start at another value in the target

Hyperparameters are not state: the target keeps its own. `differences` lists those that make its next step differ from
the source's. Rules with the same equations still differ in rounding: Keras's Adadelta multiplies before it divides, and
MLX rounds lr to the gradient's dtype.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _get_scalar_dtype

from .keras.base import ACCUMULATOR, AVERAGE, KerasTerms
from .optimizers.counted import SharedCounterOptimizer
from .step.step import number

StateDict = dict[str, Any]

FLOAT32_COUNTS: Final = 1 << 24


class ConversionError(ValueError):
    """The state has no exact counterpart in the target. The message says why."""


class Terms(NamedTuple):
    """One rule in one family's terms: its accumulators, and the group keys that identify it."""

    family: str
    rule: str
    accumulators: tuple[str, ...]
    known_by: frozenset[str]
    """Group keys by which its state dicts are known. No other terms have all of them."""


_TERMS: Final = (
    Terms("torch", "Adadelta", ("square_avg", "acc_delta"), frozenset(("rho", "eps", "maximize"))),
    Terms("torch", "Adagrad", ("sum",), frozenset(("lr_decay", "eps", "maximize"))),
    Terms(
        "Keras",
        "Adadelta",
        ("accumulated_grad", "accumulated_delta_var"),
        frozenset(("rho", "epsilon", "iterations")),
    ),
    Terms(
        "Keras",
        "Adagrad",
        ("accumulator",),
        frozenset(("initial_accumulator_value", "epsilon", "iterations")),
    ),
    Terms("MLX", "Adadelta", ("v", "u"), frozenset(("rho", "eps", "step"))),
    Terms("MLX", "Adagrad", ("v",), frozenset(("eps", "step"))),
)


def terms_of(param_groups: Sequence[Mapping[str, Any]]) -> Terms:
    """The family and rule that these param groups belong to. ConversionError if they match no known terms."""
    for terms in _TERMS:
        if param_groups and all(terms.known_by <= group.keys() for group in param_groups):
            return terms
    keys = sorted(set().union(*(group.keys() for group in param_groups)))
    raise ConversionError(f"neither Adadelta nor Adagrad in any known terms: the groups have {keys}")


def convert(state_dict: StateDict, target: Optimizer, *, drop: Collection[str] = ()) -> StateDict:
    """The state of `state_dict` as a state dict for `target.load_state_dict`. Neither argument is changed.

    state_dict: from any of this package's six optimizers or torch's two. target: one of the same optimizers, with the
    same rule, over parameters of the same shapes in the same order and groups; it keeps its hyperparameters. drop:
    ("average",) converts Keras's state without its moving averages. ConversionError if the conversion is not exact.
    """
    groups = state_dict["param_groups"]
    source, aim = terms_of(groups), terms_of(target.param_groups)
    if source.rule != aim.rule:
        raise ConversionError(f"{source.rule}'s state says nothing about {aim.rule}'s")
    sizes = [len(group["params"]) for group in groups]
    target_sizes = [len(group["params"]) for group in target.param_groups]
    if sizes != target_sizes:
        raise ConversionError(f"groups of {sizes} parameters do not match groups of {target_sizes}")
    count = _updates(state_dict, source)
    states: dict[int, dict[str, Any]] = {}
    ids = itertools.chain.from_iterable(group["params"] for group in groups)
    pairs = [(group, param) for group in target.param_groups for param in group["params"]]
    for k, (saved_id, (group, param)) in enumerate(zip(ids, pairs, strict=True)):
        held = state_dict["state"].get(saved_id, {})
        if held:
            states[k] = _state(k, held, source, aim, target, group, param, count, drop)
        else:
            _check_fresh(k, groups, source, target)
    return {"state": states, "param_groups": _groups(target, aim, count)}


def differences(source: Optimizer, target: Optimizer) -> list[str]:
    """What makes the target's next steps differ from the source's after a conversion, other than rounding.

    One line per rule, hyperparameter or setting. Empty if both take the same steps from the same state.
    """
    theirs, ours = terms_of(source.param_groups), terms_of(target.param_groups)
    if theirs.rule != ours.rule:
        return [f"rule: {theirs.rule} there, {ours.rule} here"]
    found: list[str] = []
    pairs = zip(source.param_groups, target.param_groups, strict=True)
    for k, (group, target_group) in enumerate(pairs):
        there, here = _meaning(group, theirs), _meaning(target_group, ours)
        if there["eps"] == here["eps"] == 0.0:
            there.pop("place of eps", None)
        found += [f"group {k}: {line}" for line in _unequal(there, here)]
    return found + _unequal(_settings(source), _settings(target))


def _unequal(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [f"{name}: {there[name]} there, {here[name]} here" for name in there if there[name] != here[name]]


# ---- one parameter -------------------------------------------------------------------------------------------


def _state(
    k: int,
    held: Mapping[str, Any],
    source: Terms,
    aim: Terms,
    target: Optimizer,
    group: Mapping[str, Any],
    param: Tensor,
    count: int,
    drop: Collection[str],
) -> dict[str, Any]:
    """Parameter k's state in the target's terms. ConversionError if that is not exact."""
    unknown = held.keys() - {*source.accumulators, "step", AVERAGE, ACCUMULATOR}
    missing = [name for name in source.accumulators if name not in held]
    if unknown or missing:
        raise ConversionError(
            f"parameter {k} holds {sorted(held)}, which is not {source.family} {source.rule} state"
        )
    kept = dict(zip(aim.accumulators, source.accumulators, strict=True))
    averages = isinstance(target, KerasTerms) and target.use_ema
    if averages:
        if AVERAGE not in held:
            raise ConversionError(
                f"the target averages its parameters and {source.family}'s state has no average: convert to an "
                "optimizer with use_ema=False"
            )
        kept[AVERAGE] = AVERAGE
    elif AVERAGE in held and AVERAGE not in drop:
        raise ConversionError(
            f"{aim.family}'s target keeps no moving average of the parameters: write it to them "
            f"(finalize_variable_values) or leave it out with drop=({AVERAGE!r},)"
        )
    dtype = _state_dtype(target, param)
    if group.get("row_wise", getattr(target, "row_wise", False)):
        raise ConversionError("the target's state is row-wise, one number per row")
    state: dict[str, Any] = {}
    if aim.family == "torch":
        counter = _get_scalar_dtype()  # type: ignore[no-untyped-call]
        if counter == torch.float32 and count >= FLOAT32_COUNTS:
            raise ConversionError(f"torch's float32 step counters stand still at 2**24: {count} does not fit")
        state["step"] = torch.tensor(float(count), dtype=counter, device="cpu")
    for name, source_name in kept.items():
        state[name] = _cast(k, source_name, held[source_name], param, dtype)
    if isinstance(target, KerasTerms) and target.gradient_accumulation_steps:
        state[ACCUMULATOR] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
    return state


def _cast(k: int, name: str, value: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of one accumulator in the target's state dtype. ConversionError if a value would be rounded."""
    where = f"parameter {k}: {name}"
    if value.is_complex() or param.is_complex():
        raise ConversionError(f"{where} is complex, which only torch's terms have")
    if value.shape != param.shape:
        if value.dim() == 2 and value.shape[1] == 1:
            raise ConversionError(f"{where} is row-wise, one number per row, which only torch's terms have")
        raise ConversionError(f"{where} has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}")
    cast = value.detach().clone().to(dtype)
    if torch.promote_types(value.dtype, dtype) != dtype:
        back = cast.to(value.dtype)
        changed = int(((back != value) & ~(back.isnan() & value.isnan())).sum())
        if changed:
            raise ConversionError(
                f"{where} is {value.dtype} and {changed} of its values do not fit into the target's {dtype} state"
            )
    return cast


def _state_dtype(target: Optimizer, param: Tensor) -> torch.dtype:
    wide = getattr(target, "state_dtype", "param") is None
    return torch.promote_types(param.dtype, torch.float32) if wide else param.dtype


def _check_fresh(k: int, groups: Sequence[Mapping[str, Any]], source: Terms, target: Optimizer) -> None:
    """ConversionError if the target would start parameter k's missing accumulator at another value."""
    start = groups[0].get("initial_accumulator_value", 0.0)
    target_start = target.defaults.get("initial_accumulator_value", 0.0)
    if start != target_start:
        raise ConversionError(
            f"parameter {k} has no accumulator yet: it would start at {start} in {source.family}'s terms and at "
            f"{target_start} in the target"
        )


# ---- counts and groups ---------------------------------------------------------------------------------------


def _updates(state_dict: StateDict, source: Terms) -> int:
    """How many updates the state has taken. ConversionError if one counter cannot hold that exactly."""
    group = state_dict["param_groups"][0]
    if source.family == "MLX":
        return int(group["step"])
    if source.family == "Keras":
        taken, every = int(group["iterations"]), group.get("gradient_accumulation_steps") or 1
        if taken % every:
            raise ConversionError(
                f"{taken % every} of {every} gradients have been accumulated and not applied: convert after "
                "the next update"
            )
        return taken // every
    counts: dict[int, list[int]] = {}
    for saved_id, held in state_dict["state"].items():
        if not held:
            continue
        step = held["step"]
        counts.setdefault(int(number(step)), []).append(saved_id)
        if isinstance(step, Tensor) and step.dtype == torch.float32 and step.item() >= FLOAT32_COUNTS:
            raise ConversionError(
                f"parameter {saved_id}'s float32 step stands still at 2**24: the true count is lost"
            )
    counts.pop(0, None)
    if len(counts) > 1:
        shown = ", ".join(f"{count} (parameter {min(ids)})" for count, ids in sorted(counts.items()))
        raise ConversionError(f"the parameters' step counts differ, which one counter cannot say: {shown}")
    return next(iter(counts), 0)


def _groups(target: Optimizer, aim: Terms, count: int) -> list[dict[str, Any]]:
    """The target's param groups in a state dict's form, with the counter at `count` updates."""
    groups, first = [], 0
    for group in target.param_groups:
        packed = copy.deepcopy({name: value for name, value in group.items() if name != "params"})
        packed["params"] = list(range(first, first + len(group["params"])))
        first += len(group["params"])
        if aim.family == "Keras":
            packed["iterations"] = count * (group["gradient_accumulation_steps"] or 1)
        elif aim.family == "MLX":
            packed["step"] = count
        groups.append(packed)
    return groups


def _meaning(group: Mapping[str, Any], terms: Terms) -> dict[str, Any]:
    """A group's hyperparameters under names that have the same meaning in every family."""
    keras = terms.family == "Keras"
    decay = float(group.get("weight_decay") or 0.0)
    meaning: dict[str, Any] = {
        "lr": number(group["lr"]),
        "eps": float(group["epsilon" if keras else "eps"]),
        "coupled weight decay": 0.0 if keras else decay,
        "decoupled weight decay": decay if keras else 0.0,
        "maximize": bool(group.get("maximize", False)),
    }
    if terms.rule == "Adadelta":
        meaning["rho"] = float(group["rho"])
    else:
        meaning["lr_decay"] = float(group.get("lr_decay", 0.0))
        meaning["place of eps"] = "inside the root" if keras else "outside the root"
    return meaning


def _settings(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's settings besides its rule: schedule, clipping, averages, loss scale, accumulation."""
    keras = optimizer if isinstance(optimizer, KerasTerms) else None
    scheduled = isinstance(optimizer, SharedCounterOptimizer) and optimizer._schedule is not None
    frequency = keras.ema_overwrite_frequency if keras is not None and keras.use_ema else None
    return {
        "learning rate": optimizer._schedule if scheduled else "a number",  # type: ignore[attr-defined]
        "clipnorm": keras and keras.clipnorm,
        "clipvalue": keras and keras.clipvalue,
        "global_clipnorm": keras and keras.global_clipnorm,
        "ema_overwrite_frequency": frequency,
        "loss_scale_factor": keras and keras.loss_scale_factor,
        "gradient_accumulation_steps": keras and keras.gradient_accumulation_steps,
    }
