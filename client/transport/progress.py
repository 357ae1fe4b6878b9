"""The stall time-out of bulk calls: a call ends when nothing of it moves any more, however long it takes.

gRPC's own deadline covers a whole call: a transfer that took longer would be cut, sent again from its start, and never
end. So bulk calls have no deadline. One thread checks a transport's bulk calls several times per time-out; a call that
moves only notes the time, which costs nothing else.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import grpc

from pushstep.proto.errors import StreamStalled
from pushstep.proto.errors.status import from_rpc_error
from pushstep.proto.wire.frames import CHUNK_BYTES

from .retry import TransportFailure

LOOKS: Final = 8
LONGEST_PAUSE_S: Final = 1.0
# A message counts as moved when it has left. One that takes longer than this is too large for the link: the server drops
# a stream that brings nothing within its `stall_s` (10 s by default).
SLOW_S: Final = 2.0
# The least that a stream has to bring within `stall_s`.
LEAST_CHUNK_BYTES: Final = 64 << 10


class Progress:
    """The progress of one call: `moved_s`, when something of it moved last (monotonic), and `stalled`."""

    __slots__ = ("_asked_s", "_call", "_pace", "_tell", "moved_s", "stalled")

    def __init__(self, pace: Pace, tell: Callable[[], None]) -> None:
        """`tell` is called whenever something has moved."""
        self._tell = tell
        self.moved_s = time.monotonic()
        self.stalled = False
        self._pace = pace
        self._asked_s = math.inf
        self._call: Any = None

    @property
    def chunk_bytes(self) -> int:
        """The largest size of the next message."""
        return self._pace.chunk_bytes

    def of(self, call: Any) -> Any:
        """Watch this call; returns it."""
        self._call = call
        return call

    def moved(self) -> None:
        """Note that something has arrived or left."""
        self.moved_s = time.monotonic()
        self._tell()

    def asked(self) -> None:
        """Note that gRPC asks for the next message, so the last one has left.

        Until `handed` the call cannot stall: it waits for the message and not for the network.
        """
        self._pace.took(time.monotonic() - self._asked_s)
        self._tell()
        self.moved_s = math.inf

    def handed(self) -> None:
        """Note that the next message is made, and gRPC has it."""
        self.moved_s = self._asked_s = time.monotonic()

    def give_up(self) -> None:
        """Cancel the call as stalled."""
        self.stalled = True
        if self._call is not None:
            self._call.cancel()


class Pace:
    """The largest message: 2 MiB, or on a slow link what it carries in time, down to 64 KiB."""

    def __init__(self) -> None:
        self.chunk_bytes = CHUNK_BYTES

    def took(self, seconds: float) -> None:
        """Note how long a message took to leave."""
        if seconds > SLOW_S:
            self.slower()
        elif 0 < seconds < SLOW_S / 16 and self.chunk_bytes < CHUNK_BYTES:
            self.chunk_bytes = min(2 * self.chunk_bytes, CHUNK_BYTES)

    def slower(self) -> None:
        """Make messages smaller: one took too long, or nothing left in time."""
        self.chunk_bytes = max(self.chunk_bytes // 8, LEAST_CHUNK_BYTES)


class Watchdog:
    """Ends the stalled bulk calls of one transport. Its thread starts with the first call."""

    def __init__(self, timeout_s: float, tell: Callable[[], None] = lambda: None) -> None:
        """`tell` is called whenever something of a call has moved."""
        self.pace = Pace()
        self._tell = tell
        self._timeout_s = timeout_s
        self._calls: dict[int, Progress] = {}
        self._begun = 0
        self._awake = False
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextmanager
    def over(self, progress: Progress) -> Iterator[Progress]:
        """A context in which the caller waits for a call of `begin`. TransportFailure if it stalls."""
        try:
            yield progress
        except grpc.RpcError as error:
            if progress.stalled:
                self.pace.slower()
                raise TransportFailure(f"nothing moved for {self._timeout_s:g} s") from error
            if isinstance(from_rpc_error(error), StreamStalled):
                self.pace.slower()
            raise
        except TransportFailure:
            self.pace.slower()  # the server ended the call unanswered: a message may have taken too long to come
            raise
        finally:
            self.end(progress)

    def begin(self) -> Progress:
        """Watch a call that is about to be made, until `end`."""
        progress = Progress(self.pace, self._tell)
        self._calls[id(progress)] = progress
        self._begun += 1
        if not self._awake:
            self._rouse()
        return progress

    def end(self, progress: Progress) -> None:
        """Stop watching a call."""
        progress.of(None)
        self._calls.pop(id(progress), None)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._wake.set()

    def _rouse(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="pushstep-watchdog", daemon=True)
                self._thread.start()
        self._wake.set()

    def _look(self) -> None:
        pause_s = min(self._timeout_s / LOOKS, LONGEST_PAUSE_S)
        begun = -1
        while not self._closed.wait(pause_s):
            if not self._calls and begun == self._begun:
                self._sleep()
            begun = self._begun
            late_s = time.monotonic() - self._timeout_s
            for progress in list(self._calls.values()):
                if progress.moved_s < late_s:
                    progress.give_up()

    def _sleep(self) -> None:
        """Sleep until a call begins, so that an idle session costs nothing."""
        self._awake = False
        if not self._calls:  # a `begin` from here on sees `_awake` False, and wakes this thread
            self._wake.wait()
        self._wake.clear()
        self._awake = True
