"""Hands events to a model's observers, to each in a thread of its own.

A step never waits for one, and a slow one keeps no other from its events.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..coordinator.hooks.hook import Hook, Place

log = logging.getLogger("pushstep.hooks")
# Events that one observer may be behind with.
OBSERVER_QUEUE: Final = 1000
# How long the end of a model waits for its observers.
CLOSE_S: Final = 5.0


class Observers:
    """The observers of one model at work. Call it on the event loop only."""

    def __init__(self) -> None:
        # what observers may use here; None: nothing
        self.place: Place | None = None
        # events that any of them has missed; each hook counts its own, too
        self.dropped = 0
        self._at_work: dict[Hook, _Observer] = {}

    def tell(self, observers: Sequence[Hook], event: Mapping[str, Any]) -> None:
        """Queue an event for each observer. Never waits: one with a full queue misses it, which is counted."""
        for hook in observers:
            observer = self._at_work.get(hook)
            if observer is None:
                observer = self._at_work[hook] = _Observer(hook, self.place)
            if not observer.tell(event):
                hook.dropped += 1
                self.dropped += 1

    def keep(self, hooks: Sequence[Hook]) -> None:
        """Let those that are not among these hooks any more end, once they have seen what is queued."""
        for hook in self._at_work.keys() - set(hooks):
            self._at_work.pop(hook).end()

    def close(self) -> None:
        """Let all observers finish what is queued, for at most 5 s together, and end their threads. It blocks."""
        until_s = time.monotonic() + CLOSE_S
        at_work, self._at_work = self._at_work, {}
        for observer in at_work.values():
            observer.end()
        for observer in at_work.values():
            observer.join(max(0.0, until_s - time.monotonic()))


class _Observer:
    """One observer with its queue and its thread."""

    def __init__(self, hook: Hook, place: Place | None) -> None:
        self._hook = hook
        self._place = place
        self._is_open = False
        self._queue: deque[Mapping[str, Any]] = deque()
        self._wake = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._look_on, name=f"observer-{hook.hook_id}", daemon=True)
        self._thread.start()

    def tell(self, event: Mapping[str, Any]) -> bool:
        """Queue an event. False if the queue is full."""
        with self._wake:
            if len(self._queue) >= OBSERVER_QUEUE:
                return False
            self._queue.append(event)
            self._wake.notify()
            return True

    def end(self) -> None:
        with self._wake:
            self._ended = True
            self._wake.notify()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout=timeout_s)

    def _look_on(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._ended:
                    self._wake.wait()
                if not self._queue:
                    break
                event = self._queue.popleft()
            self._show(event)
        try:
            self._hook.close()
        except Exception:
            log.warning("observer %s could not be closed", self._hook.hook_id, exc_info=True)

    def _show(self, event: Mapping[str, Any]) -> None:
        hook = self._hook
        try:
            if not self._is_open and self._place is not None:
                hook.open(self._place)
                self._is_open = True
            line = hook.observe(event)
        except Exception as error:
            hook.failures += 1
            # each with its traceback would be a flood: what is wrong now is wrong at the next step, too
            log.warning("observer %s failed (%d times so far): %s", hook.hook_id, hook.failures, error)
            log.debug("observer %s", hook.hook_id, exc_info=True)
        else:
            if line is not None:
                log.getChild(hook.name).info("%s", line)
