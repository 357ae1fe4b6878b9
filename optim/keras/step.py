"""One step of a Keras optimizer, in Keras's order, for torch parameters.

k is gradient_accumulation_steps, n the number of micro-steps before this one, and t = n // k (`iterations`):

    g = g / loss_scale_factor
    acc = acc + g                            only with accumulation; then there is no update unless k divides n + 1
    g = acc / k; acc = 0                     every accumulator is cleared; a parameter without a gradient
                                             now is not updated
    clip g                                   see `keras/clipping.py`
    p = p * (1 - lr*weight_decay)            decoupled, on the weights from before the update; lr = schedule(n)
    update p by g
    m = ema_momentum if t > 0 else 0
    average = m*average + (1-m)*p            on every micro-step, of every parameter, with or without a gradient
    p = average                              if ema_overwrite_frequency divides t + 1
    n = n + 1

`step()` is torch's call: it takes the gradients in `.grad`, and does nothing if there are none. `apply(grads)` is
Keras's call: it raises ValueError if all gradients are None, and warns if some are. Both run the step hooks.

Differences from Keras, on purpose:

- Norms are summed in float64. Keras sums in the gradient's dtype, where large float32 gradients overflow.
- Half-precision parameters keep float32 states, averages and accumulators (`state_dtype="param"`: their own dtype). They are
  updated in float32 with an unrounded lr.
- A learning rate that is a callable without arguments is called once per update. Keras calls it again for the decay.
- Accumulators are cleared. Keras's torch backend multiplies them by 0 and so keeps a NaN for ever.
- In Keras a variable may have a constraint, and a float8 scale is replaced by its gradient. torch's parameters have
  neither.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..optimizers.counted import dense
from .base import ACCUMULATOR, AVERAGE, KerasTerms


class KerasOptimizer(KerasTerms, ABC):
    """Base of Keras's Adadelta and Adagrad: everything except the update's own arguments."""

    @abstractmethod
    def _update_arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        """The update rule's hyperparameters as fields of `Step`."""

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Tensor | None, Tensor]]) -> int:
        """`apply` for (gradient, parameter) pairs. Returns the number of micro-steps so far."""
        pairs = list(grads_and_vars)
        self.apply([grad for grad, _ in pairs], [param for _, param in pairs])
        return self._count

    def apply(
        self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Tensor] | None = None
    ) -> None:
        """Step with these gradients instead of the parameters' `.grad`, which does not change.

        grads: one per parameter of this optimizer, in order, or one per entry of `trainable_variables`. They are cast
        to the parameter's dtype. With no entries nothing happens. If some are None, a warning names their parameters,
        and those are left out. ValueError if all are None, if the number does not match, or for an unknown parameter.
        """
        if len(grads) == 0:
            return
        params = self._all_params()
        if trainable_variables is None:
            if len(grads) != len(params):
                raise ValueError(
                    "When passing `grads` as a list of gradient tensors, the gradients must match "
                    f"`optimizer.variables` one-to-on. Received a list of {len(grads)} gradients, but the optimizer is "
                    f"tracking {len(params)} trainable variables."
                )
            trainable_variables = params
        known = set(params)
        for param in trainable_variables:
            if param not in known:
                raise ValueError(
                    f"Unknown variable: {param}. This optimizer can only be called for the variables it was originally "
                    "built with. When working with a new set of variables, you should recreate a new optimizer instance."
                )
        given = {p: g for g, p in zip(grads, trainable_variables, strict=True) if g is not None}
        if not given:
            raise ValueError("No gradients provided for any variable.")
        names = self._names()
        missing = [names[param] for param in trainable_variables if param not in given]
        if missing:
            warnings.warn(
                f"Gradients do not exist for variables {missing} when minimizing the loss. If using `model.compile()`, "
                "did you forget to provide a `loss` argument?",
                stacklevel=2,
            )
        before = [param.grad for param in params]
        try:
            for param in params:
                grad = given.get(param)
                param.grad = None if grad is None else grad.detach().to(param.dtype)
            self.step()
        finally:
            for param, grad in zip(params, before, strict=True):
                param.grad = grad

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, or one micro-step with accumulation, by the gradients in `.grad`.

        closure: reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = self._all_params()
        grads = {param: dense(param.grad) for param in params if param.grad is not None}
        if not grads:
            return loss
        for group in self.param_groups:
            for param in group["params"]:
                self._state_of(param, group)
        every = self.gradient_accumulation_steps
        averaged: set[Tensor] = set()
        if every:
            self._accumulate(grads)
        if not every or (self._count + 1) % every == 0:
            self._write_lr()
            self._update(grads)
            averaged = set(grads)
            if every:
                for param in params:
                    if param not in grads:
                        self.state[param][ACCUMULATOR].zero_()
        if self.use_ema:
            self._average([param for param in params if param not in averaged])
            if self.ema_overwrite_frequency and (self.iterations + 1) % self.ema_overwrite_frequency == 0:
                for param in params:
                    param.copy_(self.state[param][AVERAGE])
        self._advance()
        return loss

    def _accumulate(self, grads: dict[Tensor, Tensor]) -> None:
        for param, grad in grads.items():
            divided, ratio = self._unscaled(grad)
            self.state[param][ACCUMULATOR].add_(divided, alpha=ratio)

    def _unscaled(self, grad: Tensor) -> tuple[Tensor, float]:
        """A gradient and a factor, whose product is g / loss_scale_factor.

        If the scale is a power of two, the factor is its inverse, which is exact. Else the factor is 1.
        """
        scale = self.loss_scale_factor
        if scale is None:
            return grad, 1.0
        fraction, exponent = math.frexp(scale)
        if abs(fraction) == 0.5 and abs(exponent) < 100:
            return grad, 1 / scale
        return grad.to(torch.promote_types(grad.dtype, torch.float32)) / scale, 1.0

    def _update(self, grads: dict[Tensor, Tensor]) -> None:
        """Clip, decay, update and average the parameters that have a gradient."""
        every, ratio = self.gradient_accumulation_steps, 1.0
        if every:
            grads = {param: self.state[param][ACCUMULATOR] for param in grads}
        else:
            for param, grad in grads.items():
                grads[param], ratio = self._unscaled(grad)
        clips = self.clipping.factors(list(grads.values()), ratio / (every or 1))
        factors = {param: ratio * clip for param, clip in zip(grads, clips, strict=True)}
        undecayed, momentum = self._undecayed(), self._momentum()
        for group in self.param_groups:
            decay = group["weight_decay"] or 0.0
            mine = [param for param in group["params"] if param in grads]
            for name, weight_decay, some in (
                ("decayed", decay, [param for param in mine if param not in undecayed]),
                ("undecayed", 0.0, [param for param in mine if param in undecayed]),
            ):
                if some:
                    self._run(
                        group,
                        some,
                        [grads[param] for param in some],
                        list_name=name,
                        factors=[factors[param] for param in some],
                        ema=AVERAGE if self.use_ema and momentum > 0.0 else None,
                        ema_momentum=momentum,
                        copy_out=AVERAGE if self.use_ema and momentum == 0.0 else None,
                        weight_decay=weight_decay,
                        decoupled=True,
                        clip_value=self.clipping.bound,
                        grad_scale=None if every is None else float(every),
                        zero_grad=every is not None,  # the gradient here is the accumulator
                        lr=group["lr"],
                        **self._update_arguments(group),
                    )

    def _momentum(self) -> float:
        return self.ema_momentum if self.iterations > 0 else 0.0

    def _average(self, params: Sequence[Tensor]) -> None:
        """Update the averages of parameters that this step has not updated; the kernels update the others."""
        momentum = self._momentum()
        for param in params:
            average = self.state[param][AVERAGE]
            if momentum == 0.0:
                average.copy_(param)
            else:
                average.lerp_(param.to(average.dtype), 1 - momentum)  # weights of sum 1, as in the kernels
