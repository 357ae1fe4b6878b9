"""A learning rate that is not a number, as a function of the steps taken.

Keras tells a `LearningRateSchedule`, which it calls with the step, from any other callable, which it calls with
nothing. Neither Keras nor its schedules are imported here, so anything callable counts as a schedule unless it can be
called with nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

Schedule = Callable[[int], Any]
LearningRate = float | Schedule | Callable[[], Any]


class Constantly:
    """A zero-argument callable as a schedule; a class, so that an optimizer holding one can be pickled."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    def __call__(self, step: int) -> Any:
        """What the function says now."""
        return self.function()


def as_schedule(learning_rate: Any) -> Schedule | None:
    """A learning rate as a function of the step; None if it is not callable."""
    if not callable(learning_rate):
        return None
    if any(kind.__name__ == "LearningRateSchedule" for kind in type(learning_rate).__mro__):
        return cast(Schedule, learning_rate)
    return Constantly(learning_rate) if _takes_nothing(learning_rate) else cast(Schedule, learning_rate)


def _takes_nothing(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:  # a builtin that does not say: Keras calls every plain callable with nothing
        return True
    return True
