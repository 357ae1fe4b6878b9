"""TakeSteps: the small pushes of one session go over one call, which stays open between them.

To begin and to end a call of gRPC takes longer than to move 40 KB each way. Whatever goes wrong ends the call; the push is
then sent again over another one, as after any broken call. A process that is about to fork ends the calls that nobody uses:
gRPC has a thread for each open call, and a child that is forked beside such a thread cannot use gRPC.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, Final, cast

import grpc

from pushstep.proto.wire.frames import IDLE_S

from .progress import Progress, Watchdog
from .retry import TransportFailure
from .shield import shield
from .streams import SMALL_BYTES, Body

# Reads one answer.
Read = Callable[[Iterator[bytes], Progress], Any]
# Makes a call of these requests, which a thread of gRPC's iterates.
Start = Callable[[Iterator[bytes]], Any]


class _StepCall:
    """One open call."""

    def __init__(self, start: Start) -> None:
        self._requests: SimpleQueue[bytes | None] = SimpleQueue()
        self._call = start(iter(self._requests.get, None))
        self._used_s = time.monotonic()

    @property
    def is_fresh(self) -> bool:
        """False once the server may be about to end it, as one that nobody uses."""
        return time.monotonic() - self._used_s < IDLE_S / 2

    def send(self, push: Sequence[bytes]) -> None:
        """Send a push, once the answer to the last one was read whole."""
        for message in push:
            self._requests.put(message)

    def answers(self) -> Iterator[bytes]:
        """The messages of its answer, to be read whole. TransportFailure if the server ends the call."""
        for answer in self._call:
            self._used_s = time.monotonic()
            yield answer
        raise TransportFailure("the server ended the call before it answered")

    def cancel(self) -> None:
        """End the call; any thread may do this."""
        self._call.cancel()
        self._requests.put(None)  # the thread that waits for the next request


class Step:
    """A push under way over an open call, as `Exchange` is one over a call of its own."""

    def __init__(self, calls: StepCalls, call: _StepCall, progress: Progress, read: Read) -> None:
        self._calls = calls
        self._call = call
        self._progress = progress
        self._read = read
        # held once it is over: whoever waits for the answer and whoever cancels are different threads
        self._over = threading.Lock()

    def result(self) -> Any:
        """Wait for the answer and return it."""
        try:
            with self._calls.watchdog.over(self._progress) as progress:
                shield.breaks(self._call.cancel)
                return self._read(self._call.answers(), progress)
        except BaseException as error:
            self._calls.drop(self._call)
            if isinstance(error, grpc.RpcError):
                self._calls.require_known(error)
            raise
        finally:
            shield.breaks(None)
            if self._end():
                self._calls.let_go()

    def when_over(self, _: Callable[[], None]) -> None:
        """Nothing: all that is sent was made before."""

    def cancel(self) -> None:
        """End the call; does nothing if the answer was read."""
        if self._end():
            self._calls.watchdog.end(self._progress)
            self._calls.drop(self._call)
            self._calls.let_go()

    def _end(self) -> bool:
        """Whether it was not over yet."""
        return self._over.acquire(blocking=False)


class StepCalls:
    """Owns a session's open call, and opens another one when that has ended."""

    def __init__(self, start: Start, watchdog: Watchdog) -> None:
        self._start = start
        self.watchdog = watchdog
        self._call: _StepCall | None = None
        # False: the server is older than TakeSteps
        self._is_known = True
        # held while a push is under way: one at a time
        self._turn = threading.Lock()
        _ALL.add(self)

    def takes(self, body: Body) -> bool:
        """Whether a push goes over the open call, which is then taken until that is over: others go over calls of their own."""
        return self._is_known and self.in_one(body) and self._turn.acquire(blocking=False)

    def in_one(self, body: Body) -> bool:
        """Whether a push is small enough for one message, also for this link."""
        return body.nbytes <= min(SMALL_BYTES, self.watchdog.pace.chunk_bytes)

    def let_go(self) -> None:
        """Leave the open call to the next push."""
        self._turn.release()

    def end_if_idle(self) -> None:
        """End the open call unless a push is under way."""
        if self._turn.acquire(blocking=False):
            self.close()
            self._turn.release()

    def start_afresh(self) -> None:
        """In a child of fork: the parent's call is not ours."""
        self._call = None
        self._turn = threading.Lock()

    def begin(self, push: Callable[[], Sequence[bytes]], read: Read) -> Step:
        """Send a push that the open call was taken for, and have `read` read its answer and no more."""
        try:
            messages = push()
            if self._call is None or not self._call.is_fresh:
                self.close()
                self._call = _StepCall(self._start)
            call, progress = self._call, self.watchdog.begin()
            progress.of(call)
            call.send(messages)
            return Step(self, call, progress, read)
        except BaseException:
            self.let_go()
            raise

    def require_known(self, error: grpc.RpcError) -> None:
        """TransportFailure if the server is older than TakeSteps."""
        status = cast(grpc.Call, error)  # grpc raises an object that is both
        if status.code() is grpc.StatusCode.UNIMPLEMENTED:
            self._is_known = False
            raise TransportFailure("the server does not know TakeSteps") from error

    def drop(self, call: _StepCall) -> None:
        """End a call: what comes over it now is of nobody."""
        if self._call is call:
            self._call = None
        call.cancel()

    def close(self) -> None:
        """End the open call."""
        call, self._call = self._call, None
        if call is not None:
            call.cancel()


_ALL: Final[weakref.WeakSet[StepCalls]] = weakref.WeakSet()


def _before_fork() -> None:
    for calls in list(_ALL):
        calls.end_if_idle()


def _after_fork_in_child() -> None:
    for calls in list(_ALL):
        calls.start_afresh()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
