"""Pushes that can be counted: how often each was applied can be read off Adagrad's `sum`.

Push number k has the gradient 2**k, so `sum` is the number whose base-4 digits say how often each push was applied;
all of it is exact in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pushstep.client import Session

GROUPS = [{"rule": "adagrad", "params": ["w"], "lr": 0.5}]


def grads(number: int, size: int = 3) -> dict[str, np.ndarray[Any, Any]]:
    """The gradient of push `number`."""
    return {"w": np.full(size, 2.0**number, dtype=np.float32)}


def counts(session: Session, pushes: int) -> list[int]:
    """How often each push was applied, by the base-4 digits of `sum`."""
    sums = next(values for _, state, values in session.pull_state().dense() if state == "sum")
    assert bool((sums == sums.flatten()[0]).all())
    number = int(sums.flatten()[0])
    digits = [number >> 2 * place & 3 for place in range(pushes)]
    assert number >> 2 * pushes == 0
    return digits


def create(session: Session, size: int = 3) -> None:
    """A model of one parameter at zero."""
    session.create({"w": np.zeros(size, dtype=np.float32)}, GROUPS)
