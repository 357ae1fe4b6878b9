"""A Ray actor that holds torch's optimizer: gradients in, parameters out, through Ray's shared-memory store.

Needs the `bench` extra. There are two, which do the same work: `tensors` passes and returns torch tensors, as a program
does that has them, and Ray serialises them; `arrays` passes and returns the same memory as numpy arrays, of which
Ray makes no copy beyond the store's: the actor reads the gradient where the store has it. Either way the worker copies
what it gets back into its own parameter, as it must to go on training: what Ray returns is read-only and the store's.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Sequence
from typing import Any, Final, Literal, get_args

import torch

from .driver import Driver, End, Make, end_all
from .peer_local import Rule, optimizer_of, parameter_of
from .side import Side, side_of

Form = Literal["tensors", "arrays"]
FORMS: Final[tuple[Form, ...]] = get_args(Form)
STORE_BYTES = 2 << 30
CPUS = 2


def installed() -> bool:
    """Whether there is a Ray to compare with."""
    return importlib.util.find_spec("ray") is not None


def _start() -> End:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}  # it writes no files of ours
    import ray

    ray.init(
        address="local",
        num_cpus=CPUS * len(FORMS),
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    return ray.shutdown


class Holder:
    """The actor: the parameter, its optimizer, and a lock that Ray gives (one call at a time)."""

    def __init__(self, rule: Rule, elements: int) -> None:
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        self._parameter = parameter_of(elements)
        self._optimizer = optimizer_of(rule, self._parameter)

    def exchange(self, gradient: Any) -> Any:
        """Step by a gradient; the parameters, in the gradient's form."""
        as_tensor = isinstance(gradient, torch.Tensor)
        self._parameter.grad = gradient if as_tensor else torch.from_numpy(gradient)
        self._optimizer.step()
        return self._parameter.detach() if as_tensor else self._parameter.detach().numpy()


class RayWorker:
    """Calls the actor."""

    def __init__(self, form: Form, rule: Rule, elements: int) -> None:
        import ray

        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        self._ray = ray
        # a core for each thread of torch's step: by itself Ray gives an actor one
        self._actor = ray.remote(Holder).options(num_cpus=CPUS).remote(rule, elements)
        gradient = torch.randn(elements)
        self._gradient: Any = gradient if form == "tensors" else gradient.numpy()
        self._parameter = torch.zeros(elements)
        self.exchange()

    def exchange(self) -> None:
        """Push, step, pull."""
        self._parameter.copy_(torch.as_tensor(self._ray.get(self._actor.exchange.remote(self._gradient))))

    def close(self) -> None:
        """End the actor."""
        self._ray.kill(self._actor)


def _workers(form: Form, rule: Rule, elements: int) -> Sequence[RayWorker]:
    return [RayWorker(form, rule, elements)]


class Ray:
    """Owns a process that starts a Ray cluster of its own."""

    def __init__(self) -> None:
        self._driver = Driver(_start)
        self._driver.answer()

    def side(self, form: Form, rule: Rule, elements: int) -> Side:
        """One worker and the actor."""
        return side_of(f"ray actor, {form}", _workers, [self._driver], [(form, rule, elements)])

    def of(self, name: str, make: Make, *arguments: object) -> Side:
        """One worker of another load, and its actor."""
        return side_of(name, make, [self._driver], [arguments])

    def close(self) -> None:
        """End the process and the cluster with it."""
        end_all([self._driver])
