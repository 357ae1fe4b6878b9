"""Logs long waits: what a session waits for, and for how long.

A session notes when it begins to wait, when bytes move, and the reason that it was given. A thread that all sessions
share checks twice a second and logs for them: a session that waits for a silent server is blocked, and cannot log.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from types import TracebackType
from typing import Final

log = logging.getLogger("pushstep.client")

SAY_AFTER_S: Final = 2.0
# A wait is logged again when it has lasted this many times as long as at its last line.
_LONGER: Final = 4.0
# One session logs the same reason again after this time. Otherwise many short waits would be a line each.
_SAME_AGAIN_S: Final = 60.0
_LOOK_S: Final = 0.5


class Wait:
    """A context manager around what one session waits for. Nested contexts are one wait."""

    def __init__(self, address: str) -> None:
        self.address = address
        # the words that begin a log line
        self.who = "a session"
        self._depth = 0
        self._since_s = 0.0
        # monotonic; when bytes moved last
        self.moved_s = 0.0
        # a reason was noted since the transport last looked
        self.in_trouble = False
        self._reason = ""
        self._say_at_s = SAY_AFTER_S
        self._said = False
        # when each reason was logged last
        self._said_at_s: dict[str, float] = {}
        _watch.add(self)

    def __enter__(self) -> None:
        if self._depth == 0:
            self._since_s = self.moved_s = time.monotonic()
            self._reason, self._say_at_s, self._said = "", SAY_AFTER_S, False
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0 and self._said and error is None:
            log.warning("%s goes on after %.0f s", self.who, time.monotonic() - self._since_s)

    def moved(self) -> None:
        """Note that bytes come or go, so the server is not silent."""
        self.moved_s = time.monotonic()

    def told(self, reason: object) -> None:
        """Note why the session must wait longer, as the server or the network gave the reason."""
        self._reason = str(reason)
        self.in_trouble = True

    def look(self, now_s: float) -> None:
        """Log the wait if it is due. The watch calls this."""
        waited_s = now_s - self._since_s
        if self._depth == 0 or waited_s < self._say_at_s:
            return
        if not self._reason and now_s - self.moved_s < SAY_AFTER_S:
            return
        self._say_at_s = _LONGER * waited_s
        reason = self._reason or "it does not answer"
        self._said_at_s = {why: at_s for why, at_s in self._said_at_s.items() if now_s < at_s + _SAME_AGAIN_S}
        if not self._said and reason in self._said_at_s:
            return
        self._said, self._said_at_s[reason] = True, now_s
        log.warning("%s has waited for %s for %.0f s: %s", self.who, self.address, waited_s, reason)


class _Watch:
    """Owns the thread that checks every session's wait. The thread runs while there are sessions."""

    def __init__(self) -> None:
        self.start_afresh()

    def start_afresh(self) -> None:
        """Reset; a child of fork has neither the thread nor the sessions."""
        self._lock = threading.Lock()
        self._waits: weakref.WeakSet[Wait] = weakref.WeakSet()
        self._running = False

    def add(self, wait: Wait) -> None:
        with self._lock:
            self._waits.add(wait)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="pushstep-waits", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(_LOOK_S)
            with self._lock:
                waits = list(self._waits)
                if not waits:
                    self._running = False
                    return
            now_s = time.monotonic()
            for wait in waits:
                wait.look(now_s)
            del waits, wait  # or else these names would keep the last session's wait alive


_watch: Final = _Watch()
os.register_at_fork(after_in_child=_watch.start_afresh)
