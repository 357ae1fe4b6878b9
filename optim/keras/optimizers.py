"""Adadelta and Adagrad in Keras's terms, for torch parameters.

The arguments, defaults, order of operations and errors are those of `keras.optimizers`. The classes are torch
optimizers, with param groups, hooks, `state_dict` and torch's LR schedulers. `keras/step.py` states one step in
full. These are the updates in the middle of it (Keras's state names in brackets):

    Adadelta    v = rho*v + (1-rho)*g*g                      [accumulated_grad]
                d = (sqrt(u + epsilon) * g) / sqrt(v + epsilon)
                u = rho*u + (1-rho)*d*d                      [accumulated_delta_var]
                p = p - lr*d

    Adagrad     h = h + g*g                                  [accumulator], initial_accumulator_value at first
                p = p - lr*g / sqrt(h + epsilon)             epsilon inside the root, unlike torch's and MLX's

A training step, in torch's manner and in Keras's:

    optimizer.scale_loss(loss).backward()                    grads = torch.autograd.grad(loss, params)
    optimizer.step()                                         optimizer.apply(grads)

State is made at the first step, for every parameter. `state_dict` holds it under the names above, with `average`
(use_ema) and `gradient_accumulator` (gradient_accumulation_steps). Every param group holds `iterations`, counted in
micro-steps, beside `lr`, `rho`, `epsilon`, `weight_decay` and the like. Source: keras/src/optimizers of Keras 3.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from ..optimizers.base import StateDtype
from ..optimizers.schedule import LearningRate
from ..rules.keras import KerasAdadeltaRule, KerasAdagradRule
from .clipping import Clipping
from .step import KerasOptimizer

__all__ = ["Adadelta", "Adagrad"]


class Adadelta(KerasOptimizer):
    """keras.optimizers.Adadelta for torch parameters.

    params: parameters, named parameters or param groups, as for any torch optimizer. A group may have its own `lr`
        (unless the learning rate is a schedule), `rho`, `epsilon` and `weight_decay`. Real floating dtypes.
    learning_rate: a float; a schedule, called with the micro-steps taken so far; or a callable without arguments.
    rho, epsilon: see the equations in this module.
    weight_decay: decoupled; None is off.
    clipnorm, clipvalue, global_clipnorm: at most one; see `keras/clipping.py`.
    use_ema, ema_momentum, ema_overwrite_frequency: a moving average of every parameter, taken after each micro-step.
        It is written over the parameters every `ema_overwrite_frequency` updates, or by `finalize_variable_values`.
    loss_scale_factor: divides the gradients; `scale_loss` multiplies the loss by it.
    gradient_accumulation_steps: micro-steps per update, which uses the mean gradient since the last update.
    name: kept as `name`.
    fused: None uses the kernels wherever they can step. True raises RuntimeError at a step that no kernel takes. False
        never uses them.
    state_dtype: None keeps float32 states for half parameters; "param" keeps them in the parameter's dtype, as Keras.
    """

    rule = KerasAdadeltaRule()

    def __init__(
        self,
        params: ParamsT,
        learning_rate: LearningRate = 0.001,
        rho: float = 0.95,
        epsilon: float = 1e-7,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str = "adadelta",
        *,
        fused: bool | None = None,
        state_dtype: StateDtype = None,
        **kwargs: Any,
    ) -> None:
        self._construct_keras(
            params,
            learning_rate,
            {"rho": rho, "epsilon": epsilon},
            weight_decay=weight_decay,
            clipping=Clipping(clipnorm, clipvalue, global_clipnorm),
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            fused=fused,
            state_dtype=state_dtype,
            unknown=kwargs,
        )

    def _update_arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"rho": group["rho"], "eps": group["epsilon"], "multiply_first": True}


class Adagrad(KerasOptimizer):
    """keras.optimizers.Adagrad for torch parameters.

    initial_accumulator_value: the first value of every accumulator. A group's own value is not read, as in torch.

    A group may have its own `lr` (unless the learning rate is a schedule), `epsilon` and `weight_decay`. Every other
    argument is Adadelta's.
    """

    rule = KerasAdagradRule()

    def __init__(
        self,
        params: ParamsT,
        learning_rate: LearningRate = 0.001,
        initial_accumulator_value: float = 0.1,
        epsilon: float = 1e-7,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str = "adagrad",
        *,
        fused: bool | None = None,
        state_dtype: StateDtype = None,
        **kwargs: Any,
    ) -> None:
        self._construct_keras(
            params,
            learning_rate,
            {"initial_accumulator_value": initial_accumulator_value, "epsilon": epsilon},
            weight_decay=weight_decay,
            clipping=Clipping(clipnorm, clipvalue, global_clipnorm),
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            fused=fused,
            state_dtype=state_dtype,
            unknown=kwargs,
        )

    def _update_arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"eps": group["epsilon"], "eps_inside_root": True}
