"""Signals that arrive while a session is at work wait until it is whole again.

A handler of Python's runs between any two bytecodes of the main thread, and what it raises (KeyboardInterrupt) would leave
parameters half written, or one of gRPC's locks taken for ever. So within the shield handlers are held back, and run
when the outermost block ends. A block that lasts longer than GRACE_S after that, or a signal that comes twice, breaks
the call to the server that is under way; handlers then run at the next `check`, which stands where an exception leaves
everything whole. One that raises nothing changes nothing: the call is made again.

Only the main thread runs handlers, so in any other the shield does nothing.
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
# What handlers are known to raise from: Ctrl-C, ends, time-outs, a data loader's lost worker.
SIGNALS: Final = tuple(
    int(number) for number in (SIGINT, SIGTERM, SIGHUP, SIGALRM, SIGUSR1, SIGUSR2, SIGCHLD)
)
# How long a call may go on after a signal before it is broken: nearly every step ends sooner.
GRACE_S: Final = 1.0
_LOOK_S: Final = 0.02
_PIECE_S: Final = 0.1


class Shield:
    """`with shield:`, or `@shield`, around what a signal must not break; blocks may lie within blocks."""

    def __init__(self) -> None:
        self._depth = 0
        # the same object each time: whether a handler is ours is asked by identity
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
            # signal's own functions make enum members of what they return, 1.6 us each; these take 1 us for all
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
        """The function, within the shield. Not contextlib's decorator, whose frame warnings would point at."""

        @wraps(function)
        def shielded(*args: Any, **options: Any) -> Any:
            with self:
                return function(*args, **options)

        return cast(F, shielded)

    def _record(self, number: int, frame: FrameType | None) -> None:
        """In the place of the user's handler."""
        if not self._depth:
            # another signal's handler raised while a block began or ended, and left this one in its place
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
            # not threading's: its locks may be what this thread was just about to release
            _thread.start_new_thread(self._break, (self._blocks,))

    def _run(self) -> None:
        """Have the user's handlers run for what has arrived: all of them, also when one raises."""
        while self._arrived:
            number, frame = self._arrived.popitem()
            try:
                self._handlers[number](number, frame)
            except BaseException:
                self._run()
                raise

    # A block that takes long.

    def breaks(self, cancel: Callable[[], object] | None) -> None:
        """What breaks the call that is made next; None when it has ended."""
        if _thread.get_ident() == self._main:
            self._cancel = cancel

    def check(self, *, patient: bool = False) -> None:
        """Let handlers run, here where they may raise. `patient`: if they have been held back for long."""
        if self._arrived and _thread.get_ident() == self._main and (not patient or self._is_due()):
            self._run()

    def pause(self, seconds: float) -> None:
        """Sleep; a signal ends it."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left_s, _PIECE_S))
        self.check()

    def _is_due(self) -> bool:
        return self._hurried or time.monotonic() - self._arrived_s > GRACE_S

    def _break(self, block: int) -> None:
        """In a thread of its own: break what is under way until the handlers have run."""
        while self._depth and self._blocks == block and self._arrived:
            cancel = self._cancel
            if cancel is not None and self._is_due():
                cancel()
            time.sleep(_LOOK_S)


shield: Final = Shield()
os.register_at_fork(after_in_child=shield._note_main)
