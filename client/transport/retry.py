"""Retries: the same request, unchanged, until it is answered or the time for it is up.

A retry is harmless because a push carries its identity: the server answers a copy with the first receipt. The time
counts silence only. A server that answers "wait for others" has answered, and is asked again for as long as it says so.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final, TypeVar, cast

import grpc

from pushstep.proto.errors import NoAnswer, NotHeld, PushPending, PushstepError, Unavailable
from pushstep.proto.errors.status import from_rpc_error

from .shield import shield
from .waiting import Wait

T = TypeVar("T")
FIRST_WAIT_S: Final = 0.05
# A server that restarts is back within seconds, and an attempt at a closed port costs microseconds.
LONGEST_WAIT_S: Final = 1.0
# Statuses that carry no catalogue error: a failure of the network, or a server that has just died.
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
    """A call broke off without an answer: it is unknown whether the server did anything."""


def answered(call: Callable[[], T]) -> T:
    """Run one call. The catalogue's error if the server sent one, TransportFailure if nothing answered."""
    try:
        return call()
    except grpc.RpcError as error:
        failure = failure_of(error)
        if failure is error:
            raise
        raise failure from error


def failure_of(error: grpc.RpcError) -> Exception:
    """What a broken call means: the catalogue's error, TransportFailure, or the error itself if it is neither."""
    known = from_rpc_error(error)
    if known is not None:
        return known
    status = cast(grpc.Call, error)  # grpc raises an object that is both; its stubs do not say so
    if status.code() in _TRANSIENT:
        return TransportFailure(f"{status.code().name}: {status.details()}")
    return error


class Retry:
    """Retries a session's requests for `for_s` seconds, without the time in which transfers move."""

    def __init__(self, wait: Wait, for_s: float) -> None:
        self.wait = wait
        self.for_s = for_s
        self._given_up = False

    def give_up(self) -> None:
        """Make no further retry, neither at a server that is away nor at one that answers "wait"."""
        self.for_s, self._given_up = 0.0, True

    def run(self, attempt: Callable[[], T]) -> T:
        """Repeat `attempt` until it is answered. NoAnswer when the time is up.

        Unavailable is retried too, and raised itself when the time is up. Other catalogue errors are raised at once.
        """
        with self.wait:
            return self._run(attempt)

    def _run(self, attempt: Callable[[], T]) -> T:
        silent_since_s = attempt_s = time.monotonic()
        wait_s = FIRST_WAIT_S
        while True:
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
                # jitter, so that workers that were cut off together do not retry together
                pause_s = max(asked_s or 0.0, wait_s * random.uniform(0.5, 1.0))
                # computed anew each time: closing the session sets for_s to 0
                left_s = silent_since_s + self.for_s - time.monotonic()
                # make the last attempt when the time is up, and not when the next pause would outlast it: a channel
                # takes up to half a second to see that its server is back
                if left_s <= 0 or (asked_s or 0.0) > left_s:
                    if isinstance(error, PushstepError):
                        raise
                    raise self._no_answer(error) from error
                shield.pause(min(pause_s, left_s))
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            attempt_s = time.monotonic()

    def _go_on(self, error: Exception) -> None:
        """Note the reason of the wait, and let a signal's handler end it: here nothing is half written."""
        self.wait.told(error)
        shield.check()

    def _no_answer(self, error: Exception) -> NoAnswer:
        return NoAnswer(address=self.wait.address, seconds=self.for_s, problem=error)
