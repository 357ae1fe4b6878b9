"""One `apply` of a Keras optimizer, in Keras's order, for torch parameters.

With k = gradient_accumulation_steps, n the micro-steps taken before this one, t = n // k (`iterations`):

    g = g / loss_scale_factor
    acc = acc + g                            only with accumulation; no update then unless k divides n + 1
    g = acc / k; acc = 0                     every accumulator is cleared, also those of parameters that have no
                                             gradient now and so are not updated
    clip g                                   see `keras_clipping`
    p = p * (1 - lr*weight_decay)            decoupled, on the weights from before the update; lr = schedule(n)
    update p by g
    m = ema_momentum if t > 0 else 0
    average = m*average + (1-m)*p            on every micro-step, of every parameter, with or without gradient
    p = average                              if ema_overwrite_frequency divides t + 1
    n = n + 1

`step()` is torch's door to it (gradients from `.grad`; none at all: nothing happens) and `apply(grads)` Keras's (none
at all: ValueError; some missing: a warning). Both run the step hooks.

What differs from Keras, on purpose: norms are summed in float64 (Keras: in the gradient's dtype, where large float32
gradients overflow); half parameters keep float32 states, averages and accumulators (`state_dtype="param"`: their own
dtype) and are updated in float32 with an unrounded lr; a zero-argument learning rate is called once per update, where
Keras calls it again for the decay; accumulators are cleared, where Keras's torch backend multiplies them by 0 and so
keeps a NaN for ever. Keras's variables may carry constraints or be overwritten by their gradients (float8 scales);
torch's parameters have neither.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .keras_terms import ACCUMULATOR, AVERAGE, KerasTerms
from .one_count import dense


class KerasOptimizer(KerasTerms, ABC):
    """What Keras's Adadelta and Adagrad share: everything but the update."""

    @abstractmethod
    def _update_arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        """The update rule in the words of `dispatch.Step`."""

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Tensor | None, Tensor]]) -> int:
        """`apply` for pairs; returns the number of micro-steps so far."""
        pairs = list(grads_and_vars)
        self.apply([grad for grad, _ in pairs], [param for _, param in pairs])
        return self._count

    def apply(
        self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Tensor] | None = None
    ) -> None:
        """Step with these gradients instead of the parameters' `.grad`, which stay as they are.

        grads: one per parameter of this optimizer, in order, or one per entry of `trainable_variables`; cast to the
        parameter's dtype. No gradients: nothing. Only None: ValueError. Some None: a warning, and those are left out.
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
        """Take one step, or one micro-step of an accumulated one, with the gradients in `.grad`.

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
        """g / loss_scale_factor as a gradient and what it must yet be multiplied by: 1, or the inverse where exact."""
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
                        zero_grad=every is not None,  # the accumulator's, not the parameter's
                        lr=group["lr"],
                        **self._update_arguments(group),
                    )

    def _momentum(self) -> float:
        return self.ema_momentum if self.iterations > 0 else 0.0

    def _average(self, params: Sequence[Tensor]) -> None:
        """What the update does on the way, for parameters that it did not pass."""
        momentum = self._momentum()
        for param in params:
            average = self.state[param][AVERAGE]
            if momentum == 0.0:
                average.copy_(param)
            else:
                average.lerp_(param.to(average.dtype), 1 - momentum)  # sums its weights to 1, as the kernels
