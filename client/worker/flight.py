"""A push in flight while the worker computes: one `step()` starts it, the next `step()` takes its result.

One push is in flight at a time, in its own thread. It owns the session meanwhile: every other call on the session
waits until the push has landed. It sends copies, since the user may change the gradients as soon as `step()` returns.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, TypeVar

import torch
from torch import Tensor

from pushstep.optim.ops.copies import copy
from pushstep.proto.wire.layout import Slot

from ..gradients.body import Rows
from ..transport.shield import shield
from ..warn import warn

# how often a wait checks whether the user has interrupted it
_LOOK_S: Final = 0.1
T = TypeVar("T")


class Flight(Generic[T]):
    """Runs one call in its own thread. The caller of `land` gets its result, its error and its warnings."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._warnings: list[str] = []
        # a daemon: an unreachable server must not delay the end of the program
        self._thread = threading.Thread(target=self._fly, name="pushstep-prefetch", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def _fly(self) -> None:
        try:
            self._result.append(self._call())
        except BaseException as error:  # noqa: BLE001 - raised again by `land`
            self._error = error

    def is_mine(self) -> bool:
        """Whether the caller runs in this flight's thread."""
        return threading.current_thread() is self._thread

    def warn(self, message: str) -> None:
        """Keep a warning for `land`, which gives it."""
        self._warnings.append(message)

    def wait(self, timeout_s: float = math.inf) -> bool:
        """Wait at most `timeout_s`. Returns whether the call has ended. A signal may end the wait, not the call."""
        until_s = time.monotonic() + timeout_s
        while self._thread.is_alive() and time.monotonic() < until_s:
            self._thread.join(_LOOK_S)
            shield.check(patient=True)
        return not self._thread.is_alive()

    def land(self) -> T:
        """Wait for the call, give its warnings, and return its result or raise its error."""
        self.wait()
        for message in self._warnings:
            warn(message)
        if self._error is not None:
            raise self._error
        return self._result[0]


class Flights:
    """Knows the push in flight, if there is one, for which every other call on the session waits."""

    def __init__(self) -> None:
        self._flight: Flight[Any] | None = None

    def start(self, call: Callable[[], T]) -> Flight[T]:
        """Run `call` in a thread of its own."""
        flight = Flight(call)
        self._flight = flight
        flight.start()
        return flight

    def wait(self) -> None:
        """Wait until no push is in flight, or return at once in the flight's own thread."""
        if self._flight is not None and not self._flight.is_mine():
            self._flight.wait()

    def land_within(self, seconds: float) -> bool:
        """Wait up to `seconds` for the push in flight. Returns whether none is in flight afterwards."""
        return self._flight is None or self._flight.wait(seconds)

    def warn(self, message: str) -> None:
        """Warn the caller of a step; if the step is in flight, keep the warning for `land`."""
        if self._flight is not None and self._flight.is_mine():
            self._flight.warn(message)
        else:
            warn(message)


class Copies:
    """Copies gradients. Memory of dense copies is reused: fresh pages cost more than the copy itself."""

    def __init__(self) -> None:
        self._dense: dict[str, Tensor] = {}

    def of(
        self, gradients: Mapping[Slot, Tensor | Rows], wire: torch.dtype | None
    ) -> dict[Slot, Tensor | Rows]:
        """Copies, dense ones in the `wire` dtype. They overwrite the dense copies of the last call."""
        return {
            slot: self._copy(slot, gradient, wire or slot.dtype)
            if isinstance(gradient, Tensor)
            else (gradient[0].clone(), gradient[1].clone())
            for slot, gradient in gradients.items()
        }

    def _copy(self, slot: Slot, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        kept = self._dense.get(slot.name)
        if kept is None or kept.shape != gradient.shape or kept.dtype != dtype:
            with torch.inference_mode(False):  # or else only inference mode may write to it
                kept = torch.empty(gradient.shape, dtype=dtype, device="cpu")
            self._dense[slot.name] = kept
        copy(kept, gradient)
        return kept
