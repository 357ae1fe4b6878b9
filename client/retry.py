"""Trying again: the same request, unchanged, until it is answered or the time for it is up.

That is harmless because a push carries its identity: the server answers a second one with the first one's receipt.
The time counts silence. A server that says "wait for others" has answered, and is asked for as long as it says so.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final, TypeVar, cast

import grpc

from pushstep.proto.errors import NoAnswer, NotHeld, PushPending, PushstepError, Unavailable
from pushstep.proto.status import from_rpc_error

from .shield import shield
from .waiting import Wait

T = TypeVar("T")
FIRST_WAIT_S: Final = 0.05
# A server that restarts is back within seconds, and an attempt at a closed port costs microseconds.
LONGEST_WAIT_S: Final = 1.0
# Statuses without a catalogue error behind them: the network's, or a server that has just died.
_TRANSIENT: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.ABORTED,
    }
)


class TransportFailure(Exception):
    """A call broke off without an answer: whether the server did anything is not known."""


def answered(call: Callable[[], T]) -> T:
    """Run one call. The catalogue's error if the server sent one, TransportFailure if nobody answered."""
    try:
        return call()
    except grpc.RpcError as error:
        known = from_rpc_error(error)
        if known is not None:
            raise known from error
        status = cast(grpc.Call, error)  # what grpc raises is both; its stubs do not say so
        if status.code() in _TRANSIENT:
            raise TransportFailure(f"{status.code().name}: {status.details()}") from error
        raise


class Retry:
    """How long one session goes on asking. Time in which its transfers move does not count."""

    def __init__(self, wait: Wait, for_s: float) -> None:
        self.wait = wait
        self.for_s = for_s
        self._given_up = False

    def give_up(self) -> None:
        """Make no further attempt, neither of a server that is away nor of one that says "wait"."""
        self.for_s, self._given_up = 0.0, True

    def run(self, attempt: Callable[[], T]) -> T:
        """The first answer. NoAnswer when the time is up; other errors of the catalogue go through at once."""
        with self.wait:
            return self._run(attempt)

    def _run(self, attempt: Callable[[], T]) -> T:
        silent_since_s = time.monotonic()
        wait_s = FIRST_WAIT_S
        while True:
            attempt_s = time.monotonic()
            try:
                return answered(attempt)
            except (PushPending, NotHeld) as error:
                if self._given_up:
                    raise self._no_answer(error) from error
                self._go_on(error)
                silent_since_s, wait_s = time.monotonic(), FIRST_WAIT_S
            except (Unavailable, TransportFailure) as error:
                silent_since_s += max(0.0, min(self.wait.moved_s, time.monotonic()) - attempt_s)
                self._go_on(error)
                asked_s = error.retry_after_s if isinstance(error, PushstepError) else None
                # jitter, so that workers cut off together do not come back together
                pause_s = max(asked_s or 0.0, wait_s * random.uniform(0.5, 1.0))
                # asked for anew each time: closing the session shortens it
                left_s = silent_since_s + self.for_s - time.monotonic()
                # the last attempt is made when the time is up, not when the next pause would outlast it: a channel
                # whose server is back may take half a second to look again
                if left_s <= 0 or (asked_s or 0.0) > left_s:
                    if isinstance(error, PushstepError):
                        raise
                    raise self._no_answer(error) from error
                shield.pause(min(pause_s, left_s))
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _go_on(self, error: Exception) -> None:
        """Nothing is written here yet, and the request can be made again: a signal may end it."""
        self.wait.told(error)
        shield.check()

    def _no_answer(self, error: Exception) -> NoAnswer:
        return NoAnswer(address=self.wait.address, seconds=self.for_s, problem=error)
