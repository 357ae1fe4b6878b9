"""The thread that runs a model's observers. A step never waits for it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..coordinator.hooks.hook import Hook

log = logging.getLogger("pushstep.hooks")
OBSERVER_QUEUE: Final = 1000


class Observers:
    """Hands events to observers, in order, in a thread of its own."""

    def __init__(self) -> None:
        # events that were dropped because the queue was full
        self.dropped = 0
        self._queue: deque[tuple[Hook, Mapping[str, Any]]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def tell(self, observers: Sequence[Hook], event: Mapping[str, Any]) -> None:
        """Queue an event for each observer.

        Never waits: if the queue is full, the event is dropped and counted.
        """
        with self._wake:
            for hook in observers:
                if len(self._queue) >= OBSERVER_QUEUE:
                    self.dropped += 1
                else:
                    self._queue.append((hook, event))
            self._wake.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._look_on, name="observers", daemon=True)
                self._thread.start()

    def _look_on(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._closed:
                    self._wake.wait()
                if not self._queue:
                    return
                hook, event = self._queue.popleft()
            try:
                line = hook.observe(event)
            except Exception:
                hook.failures += 1
                log.warning("observer %s failed", hook.hook_id, exc_info=True)
            else:
                if line is not None:
                    log.getChild(hook.name).info("%s", line)

    def close(self) -> None:
        """Let the observers finish what is queued, for at most 5 s, and end their thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(timeout=5)
