"""Keras's own `fit` with the step taken by the server, on Keras's torch backend.

    optimizer = attach(session, keras.optimizers.Adagrad(0.05))
    model.compile(optimizer=optimizer, loss="mse")
    model.fit(...)

`attach` returns an optimizer of Keras's. Everything that Keras does around an update is still done by Keras, in this process:
schedules, accumulation, loss scaling, clipping. In place of the update it pushes the gradients, and takes the parameters
that come back. The server steps by Keras's equations (`optim/keras/`), weight decay included, and holds the state.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import keras
import numpy as np
import torch

from pushstep.optim import keras as steps
from pushstep.proto.errors import UnsupportedModule

from .membership.receipt import Receipt
from .optimizer.remote_optimizer import RemoteOptimizer
from .session import Session

# Arguments of an update that the server does; Keras does those that every optimizer of its has.
_OF_THE_RULE: Final = {
    keras.optimizers.Adadelta: (steps.Adadelta, ("rho", "epsilon")),
    keras.optimizers.Adagrad: (steps.Adagrad, ("initial_accumulator_value", "epsilon")),
}
_OF_ALL: Final = (
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "loss_scale_factor",
    "gradient_accumulation_steps",
    "name",
)
_NUMBERED: Final = re.compile(r"_\d+$")


def attach(session: Session, optimizer: keras.optimizers.Optimizer, **options: Any) -> KerasOptimizer:
    """Return an optimizer for `compile` whose updates the server does, in place of Keras's Adadelta or Adagrad.

    The model is created, or joined, at the first update, when Keras says what the variables are. `options` are those of
    `Session.attach`: policy, workers, edits and the like. Raises UnsupportedModule for another optimizer, another backend
    and what would write to the variables between two updates.
    """
    return KerasOptimizer(session, optimizer, options)


@keras.saving.register_keras_serializable(package="pushstep")
class KerasOptimizer(keras.optimizers.Optimizer):  # type: ignore[misc]
    """An optimizer of Keras's whose updates the server does. A saved model has the local optimizer in its place."""

    def __init__(
        self, session: Session, optimizer: keras.optimizers.Optimizer, options: dict[str, Any]
    ) -> None:
        rule = next((kind for kind in _OF_THE_RULE if isinstance(optimizer, kind)), None)
        _require_supported(optimizer, rule)
        made, names = _OF_THE_RULE[rule]
        values = {name: getattr(optimizer, name) for name in names}
        lr = optimizer._learning_rate  # a schedule, a callable or a variable
        super().__init__(
            float(lr) if isinstance(lr, keras.Variable) else lr,
            **{name: getattr(optimizer, name) for name in _OF_ALL},
        )
        self._session, self._local, self._options = session, optimizer, options
        self._rule, self._values = made, values
        self._remote: RemoteOptimizer | None = None
        self._sent_lr: float | None = None

    @property
    def remote(self) -> RemoteOptimizer:
        """The attached optimizer: param groups, the last receipt, state_dict. UnsupportedModule before the first update."""
        if self._remote is None:
            raise UnsupportedModule(
                problem="nothing is attached before the first update; build() attaches, too"
            )
        return self._remote

    @property
    def last_receipt(self) -> Receipt | None:
        """What the server did with the last push."""
        return None if self._remote is None else self._remote.last_receipt

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Attach: create the model on the server from the variables, or take its values."""
        if self._options.get("edits") != "upload":
            _require_unconstrained(variables)
        super().build(variables)
        parameters = [variable.value for variable in variables]
        decays = [self.weight_decay if self._local._use_weight_decay(each) else None for each in variables]
        groups: list[dict[str, Any]] = []
        for decay in dict.fromkeys((self.weight_decay, None)):
            chosen = [parameter for parameter, own in zip(parameters, decays, strict=True) if own == decay]
            if chosen:
                groups.append({"params": chosen, "weight_decay": decay})
        lr = float(self._get_current_learning_rate())
        original = self._rule(groups, learning_rate=lr, **self._values)
        names = dict(zip(parameters, names_of(variables), strict=True))
        self._remote = self._session.attach(original, names=names, **self._options)
        self._sent_lr = lr
        # as if Keras had taken the steps that made the version: schedules go on where the model is
        self._iterations.assign(
            self._session._membership.member().version * (self.gradient_accumulation_steps or 1)
        )
        self._take_lr()

    def _backend_update_step(self, grads: Any, trainable_variables: Any, learning_rate: Any) -> None:
        """Push the gradients, and take what comes back. What Keras calls in place of each optimizer's own update."""
        for parameter in (parameter for group in self.remote.param_groups for parameter in group["params"]):
            parameter.grad = None
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            variable.value.grad = gradient.to(variable.value.dtype)
        lr = float(learning_rate)
        if lr != self._sent_lr:
            for group in self.remote.param_groups:
                group["lr"] = self._sent_lr = lr
        self.remote.step()
        self._take_lr()

    def scale_loss(self, loss: Any) -> Any:
        """See Keras. What it calls before backward."""
        if torch.compiler.is_compiling():
            raise UnsupportedModule(
                problem="jit_compile=True compiles the update, too, which the server does: leave it out of compile()"
            )
        return super().scale_loss(loss)

    def _take_lr(self) -> None:
        """Show what an operator, or another worker, has set. A schedule goes on as it is: it sets the next one."""
        lr = float(self.remote.param_groups[0]["lr"])
        if lr != self._sent_lr and isinstance(self._learning_rate, keras.Variable):
            self._learning_rate.assign(lr)
            # as the variable holds it, so that it is not sent back rounded
            self._sent_lr = float(np.float32(lr))

    def _apply_weight_decay(self, variables: Any) -> None:
        """The server does it, in the update."""

    def get_config(self) -> dict[str, Any]:
        """What a saved model keeps: the local optimizer, with the learning rate of now."""
        return {
            "optimizer": keras.optimizers.serialize(self._local),
            "learning_rate": float(self.learning_rate),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> keras.optimizers.Optimizer:
        """The local optimizer: attach it again to go on with the server."""
        local = keras.optimizers.deserialize(config["optimizer"], custom_objects)
        if isinstance(local._learning_rate, keras.Variable):
            local.learning_rate = config["learning_rate"]
        return local


def names_of(variables: Sequence[keras.Variable]) -> list[str]:
    """Names for the server, the same for each worker and each time a model is made or loaded.

    Of Keras's paths the layer and the variable are taken: Keras numbers layers on and on, and a model that was loaded or
    cloned lacks the outer parts.
    """
    names, seen = list[str](), Counter[str]()
    for variable in variables:
        name = "/".join(_NUMBERED.sub("", part) for part in variable.path.split("/")[-2:])
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}.{seen[name]}")
    return names


def _require_supported(optimizer: Any, rule: Any) -> None:
    """Raise UnsupportedModule, saying what to do instead."""
    problem = ""
    kind = type(optimizer)
    if keras.backend.backend() != "torch":
        problem = f"Keras runs on {keras.backend.backend()}: set KERAS_BACKEND=torch before it is imported"
    elif rule is None or not kind.__module__.startswith("keras."):
        problem = f"{kind.__name__} is not a rule that the server steps; use Keras's own Adadelta or Adagrad"
    elif optimizer.built and int(optimizer.iterations.numpy()):
        problem = "it has stepped already, and its state would be lost: attach a new one"
    elif optimizer.use_ema:
        problem = "use_ema writes the averages over the parameters of this worker alone: use an ema hook"
    if problem:
        raise UnsupportedModule(problem=problem)


def _require_unconstrained(variables: Sequence[keras.Variable]) -> None:
    """Raise UnsupportedModule for a variable that Keras writes to after each update, behind the server's back."""
    for variable in variables:
        if variable.constraint is not None:
            raise UnsupportedModule(
                problem=f"{type(variable.constraint).__name__} writes to {variable.path} after each update, which the server "
                'does not see: with attach(..., edits="upload") the next step sends it'
            )
