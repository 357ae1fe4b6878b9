"""Forces journals to the disk: one thread for all models of a server.

At `durable` it works whenever something waits, and one fsync serves every record that was appended before it. At
`everysec` it works once a second. If an fsync fails, nothing is known of what is on the disk: the kernel may have dropped
the pages, and a second fsync would report success. So the process ends at once, and acknowledges nothing more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from .journal import Journal, Level

INTERVAL_S: Final = 1.0


class JournalSync:
    """The syncing thread. It starts with the first journal."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # by journal: whom to call once it was forced to the disk, and since when it waits
        self._waiting: dict[Journal, tuple[Callable[[], None], float]] = {}
        self._thread: threading.Thread | None = None
        self._ended = False

    def request(self, journal: Journal, synced: Callable[[], None]) -> None:
        """Have what was appended to a journal forced to the disk, and `synced` called afterwards, in the thread."""
        with self._changed:
            if journal in self._waiting:
                return
            self._waiting[journal] = synced, time.monotonic()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """End the thread. Journals that wait are closed by their models, which forces them to the disk."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._ended and not self._due():
                    self._changed.wait(self._rest_s())
                if self._ended:
                    return
                batch = {journal: self._waiting.pop(journal)[0] for journal in self._due()}
            for journal, synced in batch.items():
                try:
                    journal.sync()
                except OSError as error:
                    journal.fail(journal.model, error)
                synced()

    def _due(self) -> list[Journal]:
        now_s = time.monotonic()
        return [
            journal
            for journal, (_, since_s) in self._waiting.items()
            if journal.level is Level.DURABLE or now_s - since_s >= INTERVAL_S
        ]

    def _rest_s(self) -> float | None:
        """How long nothing is due; None if nothing waits."""
        if not self._waiting:
            return None
        first_s = min(since_s for _, since_s in self._waiting.values())
        return max(0.0, first_s + INTERVAL_S - time.monotonic())
