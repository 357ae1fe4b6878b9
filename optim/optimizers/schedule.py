"""Learning rates that are not numbers, as functions of the steps taken.

Keras calls a `LearningRateSchedule` with the step, and any other callable without arguments. Keras is not imported
here: a `LearningRateSchedule` is recognised by its class's name. Any other callable is a schedule unless it can be
called without arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

Schedule = Callable[[int], Any]
LearningRate = float | Schedule | Callable[[], Any]


class Constantly:
    """A callable without arguments as a schedule. It is a class, so an optimizer with one can be pickled."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    def __call__(self, step: int) -> Any:
        """The function's value now; the step is ignored."""
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
    except ValueError:  # a builtin without a signature: Keras calls every plain callable without arguments
        return True
    return True
