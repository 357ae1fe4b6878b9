"""Bulk calls end when nothing of them moves any more, however long they take while it does.

gRPC's own deadline is for a whole call: a transfer that took longer was cut, sent again from its start, and never ended. So
bulk calls have none. One thread looks at those of a transport some times in a time-out; a call that moves says so by the
clock, which costs it nothing else.
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
from pushstep.proto.frames import CHUNK_BYTES
from pushstep.proto.status import from_rpc_error

from .retry import TransportFailure

LOOKS: Final = 8
LONGEST_PAUSE_S: Final = 1.0
# A message counts as moved when it is away. One that takes longer is too large for the link: a server drops a stream that
# brings nothing in its `stall_s`, of 10 s by default.
SLOW_S: Final = 2.0
# What such a stream has to bring in that time.
LEAST_CHUNK_BYTES: Final = 64 << 10


class Progress:
    """One call: when something of it moved last, and whether it was given up since."""

    __slots__ = ("_asked_s", "_call", "_pace", "_tell", "moved_s", "stalled")

    def __init__(self, pace: Pace, tell: Callable[[], None]) -> None:
        """`tell` is called when something has moved."""
        self._tell = tell
        self.moved_s = time.monotonic()
        self.stalled = False
        self._pace = pace
        self._asked_s = math.inf
        self._call: Any = None

    @property
    def chunk_bytes(self) -> int:
        """How large the next message may be."""
        return self._pace.chunk_bytes

    def of(self, call: Any) -> Any:
        """Watch over this call."""
        self._call = call
        return call

    def moved(self) -> None:
        """Something has arrived, or is away."""
        self.moved_s = time.monotonic()
        self._tell()

    def asked(self) -> None:
        """gRPC asks for the next message, so the last one is away. Until it is handed over, nobody waits for the network."""
        self._pace.took(time.monotonic() - self._asked_s)
        self._tell()
        self.moved_s = math.inf

    def handed(self) -> None:
        """The next message is made."""
        self.moved_s = self._asked_s = time.monotonic()

    def give_up(self) -> None:
        """End the call."""
        self.stalled = True
        if self._call is not None:
            self._call.cancel()


class Pace:
    """How large a message may be: 2 MiB, and on a link that is too slow for that, what it carries in time."""

    def __init__(self) -> None:
        self.chunk_bytes = CHUNK_BYTES

    def took(self, seconds: float) -> None:
        """A message was away after so long."""
        if seconds > SLOW_S:
            self.slower()
        elif 0 < seconds < SLOW_S / 16 and self.chunk_bytes < CHUNK_BYTES:
            self.chunk_bytes = min(2 * self.chunk_bytes, CHUNK_BYTES)

    def slower(self) -> None:
        """Nothing was away in time, or not soon enough."""
        self.chunk_bytes = max(self.chunk_bytes // 8, LEAST_CHUNK_BYTES)


class Watchdog:
    """Looks after the bulk calls of one transport; its thread starts with the first of them."""

    def __init__(self, timeout_s: float, tell: Callable[[], None] = lambda: None) -> None:
        """`tell` is called when something of a call has moved."""
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
        """A block that waits for all of a call that `begin` began. TransportFailure if it stands still for too long."""
        try:
            yield progress
        except grpc.RpcError as error:
            if progress.stalled:
                self.pace.slower()
                raise TransportFailure(f"nothing moved for {self._timeout_s:g} s") from error
            if isinstance(from_rpc_error(error), StreamStalled):
                self.pace.slower()
            raise
        finally:
            self.end(progress)

    def begin(self) -> Progress:
        """Look after a call that is about to be made, until `end`."""
        progress = Progress(self.pace, self._tell)
        self._calls[id(progress)] = progress
        self._begun += 1
        if not self._awake:
            self._rouse()
        return progress

    def end(self, progress: Progress) -> None:
        """Look after it no more."""
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
        """Until a call begins: a session that does nothing costs nothing."""
        self._awake = False
        if not self._calls:  # whoever comes from here on sees that nobody is awake
            self._wake.wait()
        self._wake.clear()
        self._awake = True
