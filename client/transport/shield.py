"""Delays signal handlers while a session is at work, until nothing is half written.

Python runs a signal handler between any two bytecodes of the main thread. An exception that it raises
(KeyboardInterrupt) could leave parameters half written, or one of gRPC's locks taken for ever. So within the shield
handlers are held back, and run when the outermost block ends. If the block lasts longer than GRACE_S after the signal,
or the signal comes twice, the current call to the server is cancelled. Handlers then run at the next `check`, which
stands where an exception leaves everything consistent. If a handler raises nothing, the call is made again.

Only the main thread runs handlers, so in other threads the shield does nothing.
"""

from __future__ import annotations

import _signal
import _thread
import os
import threading
import time
from collections.abc import Callable
from functools import wraps
from signal import SIGALRM, SIGCHLD, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2
from types import FrameType, TracebackType
from typing import Any, Final, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])
# Signals whose handlers are known to raise: Ctrl-C, termination, time-outs, a lost worker of a data loader.
SIGNALS: Final = tuple(
    int(number) for number in (SIGINT, SIGTERM, SIGHUP, SIGALRM, SIGUSR1, SIGUSR2, SIGCHLD)
)
# How long a call may continue after a signal before it is cancelled: nearly every step ends sooner.
GRACE_S: Final = 1.0
_LOOK_S: Final = 0.02
_PIECE_S: Final = 0.1


class Shield:
    """`with shield:` or `@shield` around code that a signal must not interrupt. Blocks may be nested."""

    def __init__(self) -> None:
        self._depth = 0
        # one bound method, kept: handlers are compared by identity
        self._recorder = self._record
        self._handlers: dict[int, Any] = {}
        self._arrived: dict[int, FrameType | None] = {}
        self._arrived_s = 0.0
        self._hurried = False
        self._blocks = 0
        self._cancel: Callable[[], object] | None = None
        self._note_main()

    def _note_main(self) -> None:
        self._main = threading.main_thread().ident

    def __enter__(self) -> None:
        if _thread.get_ident() != self._main:
            return
        if self._depth:
            self._depth += 1
            return
        for number in SIGNALS:
            # the signal module makes an enum member per call, 1.6 us each; _signal takes 1 us for all
            handler = _signal.getsignal(number)
            if callable(handler) and handler is not self._recorder:
                self._handlers[number] = handler
                _signal.signal(number, self._recorder)
        self._blocks += 1
        self._depth = 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _thread.get_ident() != self._main:
            return
        if self._depth > 1:
            self._depth -= 1
            return
        self._depth = 0
        for number, handler in self._handlers.items():
            if _signal.getsignal(number) is self._recorder:
                _signal.signal(number, handler)
        if self._arrived:
            self._run()

    def __call__(self, function: F) -> F:
        """The function within the shield. contextlib's decorator adds a frame, at which warnings point."""

        @wraps(function)
        def shielded(*args: Any, **options: Any) -> Any:
            with self:
                return function(*args, **options)

        return cast(F, shielded)

    def _record(self, number: int, frame: FrameType | None) -> None:
        """Stands in for the user's handler: notes the signal and starts the thread that cancels a call."""
        if not self._depth:
            # another signal's handler raised while a block began or ended, so this handler was not removed
            _signal.signal(number, self._handlers[number])
            self._handlers[number](number, frame)
            return
        if number in self._arrived:
            self._hurried = True
            return
        first = not self._arrived
        self._arrived[number] = frame
        if first:
            self._arrived_s, self._hurried = time.monotonic(), False
            # not threading.Thread, whose locks this thread may hold
            _thread.start_new_thread(self._break, (self._blocks,))

    def _run(self) -> None:
        """Run the user's handlers for the signals that arrived: all of them, even if one raises."""
        while self._arrived:
            number, frame = self._arrived.popitem()
            try:
                self._handlers[number](number, frame)
            except BaseException:
                self._run()
                raise

    # A block that takes long.

    def breaks(self, cancel: Callable[[], object] | None) -> None:
        """Set the function that cancels the next call; None when the call has ended."""
        if _thread.get_ident() == self._main:
            self._cancel = cancel

    def check(self, *, patient: bool = False) -> None:
        """Run held-back handlers here, where they may raise. `patient`: only if they are due (`_is_due`)."""
        if self._arrived and _thread.get_ident() == self._main and (not patient or self._is_due()):
            self._run()

    def pause(self, seconds: float) -> None:
        """Sleep that long, with a `check` every 0.1 s: a handler that raises ends it."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left_s, _PIECE_S))
        self.check()

    def _is_due(self) -> bool:
        return self._hurried or time.monotonic() - self._arrived_s > GRACE_S

    def _break(self, block: int) -> None:
        """In its own thread: cancel the current call, again and again until the handlers have run."""
        while self._depth and self._blocks == block and self._arrived:
            cancel = self._cancel
            if cancel is not None and self._is_due():
                cancel()
            time.sleep(_LOOK_S)


shield: Final = Shield()
os.register_at_fork(after_in_child=shield._note_main)
