"""A Keras optimizer without its step: arguments, learning rate, exclusions, averages and state.

Errors are Keras's, word for word. The arguments with one value per optimizer (clipping, averages, loss scale,
accumulation) are attributes. The arguments that may differ between param groups (`lr`, `rho`, `epsilon`,
`weight_decay`) are group keys. `gradient_accumulation_steps` is a group key, too, because a saved counter means nothing
without it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..optimizers.base import StateDtype
from ..optimizers.counted import SharedCounterOptimizer
from ..optimizers.schedule import as_schedule
from ..step.step import number
from .clipping import Clipping

AVERAGE, ACCUMULATOR = "average", "gradient_accumulator"

_PICKLED = (
    "name",
    "clipping",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
    "_excluded",
    "_excluded_names",
)


class KerasTerms(SharedCounterOptimizer):
    """A Keras optimizer without its step: it owns the arguments, schedule, exclusions and states."""

    counter = "iterations"
    peer = "Keras"

    name: str
    clipping: Clipping
    use_ema: bool
    ema_momentum: float
    ema_overwrite_frequency: int | None
    loss_scale_factor: float | None
    gradient_accumulation_steps: int | None

    def _construct_keras(
        self,
        params: Any,
        learning_rate: Any,
        own: dict[str, Any],
        *,
        weight_decay: float | None,
        clipping: Clipping,
        use_ema: bool,
        ema_momentum: float,
        ema_overwrite_frequency: int | None,
        loss_scale_factor: float | None,
        gradient_accumulation_steps: int | None,
        name: str,
        fused: bool | None,
        state_dtype: StateDtype,
        unknown: dict[str, Any],
    ) -> None:
        if unknown.pop("decay", None) is not None:
            warnings.warn("Argument `decay` is no longer supported and will be ignored.", stacklevel=3)
        if unknown:
            raise ValueError(f"Argument(s) not recognized: {unknown}")
        self.name = name
        self.gradient_accumulation_steps = gradient_accumulation_steps or None
        self.loss_scale_factor = loss_scale_factor
        self.use_ema, self.ema_momentum = use_ema, ema_momentum
        self.ema_overwrite_frequency = ema_overwrite_frequency
        self.clipping = clipping
        self._check_arguments()
        self._excluded: set[Tensor] = set()
        self._excluded_names: str | None = None
        schedule = as_schedule(learning_rate)
        if schedule is None and not isinstance(learning_rate, float):
            raise ValueError(
                "Argument `learning_rate` should be float, or an instance of LearningRateSchedule, or a callable "
                "(that takes in the current iteration value and returns the corresponding learning rate value). "
                f"Received instead: learning_rate={learning_rate}"
            )
        defaults = {
            "lr": number(learning_rate if schedule is None else schedule(0)),
            **own,
            "weight_decay": weight_decay,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
        }
        self._construct_counted(params, defaults, schedule=schedule, fused=fused, state_dtype=state_dtype)

    def _check_arguments(self) -> None:
        every, frequency = self.gradient_accumulation_steps, self.ema_overwrite_frequency
        if every and not every >= 2:
            raise ValueError(
                "`gradient_accumulation_steps` must be an integer >= 2. Received: "
                f"gradient_accumulation_steps={every}"
            )
        if self.use_ema:
            if self.ema_momentum > 1 or self.ema_momentum < 0:
                raise ValueError(
                    f"`ema_momentum` must be in the range [0, 1]. Received: ema_momentum={self.ema_momentum}"
                )
            if frequency and (not isinstance(frequency, int) or frequency < 1):
                raise ValueError(
                    "`ema_overwrite_frequency` must be an integer >= 1 or None. Received: "
                    f"ema_overwrite_frequency={frequency}"
                )
        self.clipping.check()

    # ---- properties ------------------------------------------------------------------------------------------

    @property
    def clipnorm(self) -> float | None:
        """See `keras/clipping.py`."""
        return self.clipping.clipnorm

    @property
    def clipvalue(self) -> float | None:
        """See `keras/clipping.py`."""
        return self.clipping.clipvalue

    @property
    def global_clipnorm(self) -> float | None:
        """See `keras/clipping.py`."""
        return self.clipping.global_clipnorm

    @property
    def has_exclusions(self) -> bool:
        """True if any parameters are excluded from weight decay."""
        return bool(self._excluded or self._excluded_names)

    @property
    def iterations(self) -> int:
        """Number of updates so far; with accumulation, micro-steps // gradient_accumulation_steps."""
        return self._count // (self.gradient_accumulation_steps or 1)

    @property
    def learning_rate(self) -> float:
        """The next step's learning rate: the schedule's or callable's value now, else the first group's `lr`.

        Assignment of a number sets every group's `lr`. Assignment of a schedule or a callable replaces what was there.
        A number cannot replace a schedule (TypeError, as in Keras) or a callable (TypeError; Keras fails in another
        way).
        """
        if self._schedule is not None:
            return self._evaluate(self._schedule)
        return number(self.param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        schedule = as_schedule(learning_rate)
        if schedule is not None:
            self._schedule, self._shown_lr = schedule, None
            return
        if self._schedule is not None:
            raise TypeError(
                "This optimizer was created with a `LearningRateSchedule` object as its `learning_rate` constructor "
                "argument, hence its learning rate is not settable. If you need the learning rate to be settable, you "
                "should instantiate the optimizer with a float `learning_rate` argument."
            )
        for group in self.param_groups:
            group["lr"] = number(learning_rate)

    # ---- methods ---------------------------------------------------------------------------------------------

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss times `loss_scale_factor`: call `backward` on the result."""
        return loss if self.loss_scale_factor is None else loss * self.loss_scale_factor

    def exclude_from_weight_decay(
        self, var_list: Iterable[Tensor] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Exclude parameters from weight decay: those in `var_list`, and those that `var_names` match.

        Each of `var_names` is a regular expression that is searched for in the parameter's name. `var_names` needs
        named parameters, else ValueError. A call replaces the exclusions of the call before. Keras intends the call to
        come before the first step and accepts it later; so does this class.
        """
        names = sorted(set(var_names or ()))
        if names and any("param_names" not in group for group in self.param_groups):
            raise ValueError(
                "`var_names` needs parameters with names: construct the optimizer with named_parameters()"
            )
        self._excluded = set(var_list or ())
        self._excluded_names = "|".join(names) or None

    def finalize_variable_values(self, var_list: Sequence[Tensor] | None = None) -> None:
        """With `use_ema`, write the averages to the parameters, or to `var_list` in the same order.

        Before the first step the averages are the parameters. ValueError if `var_list` has another length.
        """
        if not self.use_ema:
            return
        params = self._all_params()
        targets = params if var_list is None else list(var_list)
        if len(targets) != len(params):
            raise ValueError(
                f"The length of model variables ({len(targets)}) to override does not match the length of model "
                f"variables stored in the optimizer ({len(params)}). Please check if the optimizer was called on your "
                "model."
            )
        with torch.no_grad():
            for target, param in zip(targets, params, strict=True):
                target.copy_(self.state[param][AVERAGE] if self.state[param] else param)

    # ---- names and state -------------------------------------------------------------------------------------

    def _names(self) -> dict[Tensor, str]:
        """Each parameter's name; without names, "group.index"."""
        return {
            param: group["param_names"][k] if "param_names" in group else f"{g}.{k}"
            for g, group in enumerate(self.param_groups)
            for k, param in enumerate(group["params"])
        }

    def _undecayed(self) -> set[Tensor]:
        """The parameters that are excluded from weight decay."""
        if self._excluded_names is None:
            return self._excluded
        names = self._names().items()
        return self._excluded | {p for p, name in names if re.search(self._excluded_names, name)}

    def _held_names(self) -> tuple[str, ...]:
        more = ((AVERAGE, self.use_ema), (ACCUMULATOR, self.gradient_accumulation_steps is not None))
        return self.rule.state_names + tuple(name for name, held in more if held)

    def _fresh(self, param: Tensor, name: str, group: dict[str, Any]) -> Tensor:
        fresh = super()._fresh(param, name, group)
        if name == AVERAGE:  # it starts at the parameter, also for a parameter that joins later
            return fresh.copy_(param)
        return fresh.zero_() if name == ACCUMULATOR else fresh

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _PICKLED}}

    def _take_states(self, state: dict[str, Any], saved: dict[str, Any]) -> None:
        for group in saved["param_groups"]:
            every = group.get("gradient_accumulation_steps")
            if self.counter in group and every != self.gradient_accumulation_steps:
                raise ValueError(
                    f"the loaded state dict counts with gradient_accumulation_steps={every}, this optimizer with "
                    f"{self.gradient_accumulation_steps}"
                )
        super()._take_states(state, saved)
