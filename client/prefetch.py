"""A push on its way while the worker computes: `step()` hands it over, the next `step()` takes what came back.

One push is in flight at a time, in a thread of its own, and it is the session's for that long: whatever else is asked
of the session waits until it has landed. What it sends is a copy, since the gradients are the user's to change as
soon as `step()` has returned.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final, Generic, TypeVar

import torch
from torch import Tensor

from pushstep.optim.copies import copy
from pushstep.proto.layout import Slot

from . import caller
from .gradients import Rows
from .shield import shield

# how often a wait looks whether the user has interrupted it
_LOOK_S: Final = 0.1
T = TypeVar("T")


class Flight(Generic[T]):
    """One call in a thread of its own. Its result, its error and its warnings are for whoever lands it."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._warnings: list[str] = []
        # a daemon: a server that is away must not hold up the end of the program
        self._thread = threading.Thread(target=self._fly, name="pushstep-prefetch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def _fly(self) -> None:
        try:
            self._result.append(self._call())
        except BaseException as error:  # noqa: BLE001 - raised again by `land`
            self._error = error

    def is_mine(self) -> bool:
        """Whether the caller is in it."""
        return threading.current_thread() is self._thread

    def warn(self, message: str) -> None:
        """Have a warning given when it lands."""
        self._warnings.append(message)

    def wait(self, timeout_s: float = math.inf) -> bool:
        """Wait until it is over, or for that long; whether it is. A signal may end the wait, and not the flight."""
        until_s = time.monotonic() + timeout_s
        while self._thread.is_alive() and time.monotonic() < until_s:
            self._thread.join(_LOOK_S)
            shield.check(patient=True)
        return not self._thread.is_alive()

    def land(self) -> T:
        """Wait for it; give its warnings, and its result or its error."""
        self.wait()
        for message in self._warnings:
            caller.warn(message)
        if self._error is not None:
            raise self._error
        return self._result[0]


class Copies:
    """Copies of gradients, dense ones in memory that is used again: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self._dense: dict[str, Tensor] = {}

    def of(
        self, gradients: Mapping[Slot, Tensor | Rows], wire: torch.dtype | None
    ) -> dict[Slot, Tensor | Rows]:
        """Equal gradients, dense ones as they will travel. Those of the last call are overwritten."""
        return {
            slot: self._copy(slot, gradient, wire or slot.dtype)
            if isinstance(gradient, Tensor)
            else (gradient[0].clone(), gradient[1].clone())
            for slot, gradient in gradients.items()
        }

    def _copy(self, slot: Slot, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        kept = self._dense.get(slot.name)
        if kept is None or kept.shape != gradient.shape or kept.dtype != dtype:
            with torch.inference_mode(False):  # or only inference mode may write to it
                kept = torch.empty(gradient.shape, dtype=dtype, device="cpu")
            self._dense[slot.name] = kept
        copy(kept, gradient)
        return kept
