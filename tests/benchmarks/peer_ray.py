"""A Ray actor that holds torch's optimizer: gradients in, parameters out, through Ray's shared-memory store.

Needs the `bench` extra. The actor reads the gradient where the store has it, without a copy; the worker copies what
it gets back into its parameter, as it must to go on training.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .driver import Driver, End, end_all
from .peer_local import Rule, optimizer_of, parameter_of
from .side import Side, side_of

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
        num_cpus=CPUS,
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
        """Step by a gradient; the parameters."""
        self._parameter.grad = torch.from_numpy(gradient)
        self._optimizer.step()
        return self._parameter.detach().numpy()


class RayWorker:
    """Calls the actor."""

    def __init__(self, rule: Rule, elements: int) -> None:
        import ray

        self._ray = ray
        self._actor = ray.remote(Holder).remote(rule, elements)
        self._gradient = np.random.default_rng(0).standard_normal(elements, dtype=np.float32)
        self._parameter = np.zeros(elements, dtype=np.float32)
        self.exchange()

    def exchange(self) -> None:
        """Push, step, pull."""
        np.copyto(self._parameter, self._ray.get(self._actor.exchange.remote(self._gradient)))

    def close(self) -> None:
        """End the actor."""
        self._ray.kill(self._actor)


def _workers(rule: Rule, elements: int) -> Sequence[RayWorker]:
    return [RayWorker(rule, elements)]


class Ray:
    """Owns a process that starts a Ray cluster of its own."""

    def __init__(self) -> None:
        self._driver = Driver(_start)
        self._driver.answer()

    def side(self, rule: Rule, elements: int) -> Side:
        """One worker and the actor."""
        return side_of("ray actor", _workers, [self._driver], [(rule, elements)])

    def close(self) -> None:
        """End the process and the cluster with it."""
        end_all([self._driver])
