"""The log: lines on the standard error, written by a thread of its own.

The process that started the server may never read its output. A full pipe would hold up the event loop at the next line;
here it holds up only the log's thread. Lines beyond KEPT_BYTES are dropped and counted, and the count is logged.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections import deque
from typing import Final

from .log_format import FORMATS, Format, TextFormat
from .secrets import SECRETS

log = logging.getLogger("pushstep.server")
KEPT_BYTES: Final = 4 << 20
# How long the end of the process waits for a reader to take the last lines.
LAST_S: Final = 1.0


class LogWriter(logging.Handler):
    """Takes lines from any thread without waiting, and writes them to a descriptor in order."""

    def __init__(self, descriptor: int, form: Format | None = None) -> None:
        """`form` None: of a record only the message."""
        super().__init__()
        self._form = form or TextFormat()
        self.setFormatter(form)
        self._descriptor = descriptor
        self._lines: deque[bytes] = deque()
        self._kept_bytes = 0
        self._dropped = 0
        self._changed = threading.Condition()
        self._writing = False
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record as a line."""
        try:
            self._queue(self.format(record))
        except Exception:  # noqa: BLE001 - what cannot be formatted must not end its caller; this is logging's own way
            self.handleError(record)

    def say(self, text: str) -> None:
        """Queue a line that is no record."""
        self._queue(self._form.plain(text))

    def _queue(self, text: str) -> None:
        """Queue a line, without what is secret. If too much is queued, it is dropped and counted."""
        line = f"{SECRETS.hide(text)}\n".encode(errors="backslashreplace")
        with self._changed:
            if self._kept_bytes + len(line) > KEPT_BYTES:
                self._dropped += 1
                return
            self._lines.append(line)
            self._kept_bytes += len(line)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait, for at most LAST_S, until the queued lines are written."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines and not self._writing, LAST_S)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._lines))
                lines = list(self._lines)
                if self._dropped:
                    text = f"{self._dropped} lines of the log were dropped: nobody read them"
                    lines.append(f"{self._form.plain(text)}\n".encode())
                self._lines.clear()
                self._kept_bytes = self._dropped = 0
                self._writing = True
            self._put(b"".join(lines))

    def _put(self, content: bytes) -> None:
        left = memoryview(content)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # the descriptor was non-blocking when we got it
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
            except OSError:
                return  # closed, or its disk is full: there is nowhere to say so


def start(level: str, form: str) -> LogWriter:
    """Write everything that is logged, and Python's warnings, to the standard error. `form`: a key of FORMATS."""
    writer = LogWriter(2, FORMATS[form]())
    logging.basicConfig(level=level.upper(), handlers=[writer])
    logging.captureWarnings(True)
    threading.excepthook = _thread_failed
    if form == "json":
        # gRPC's core writes to the descriptor itself, in a form of its own; what fails there is also an error here
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    return writer


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    if failed.exc_value is not None:
        name = "" if failed.thread is None else failed.thread.name
        log.error("thread %s failed", name, exc_info=failed.exc_value)


def in_short(problem: BaseException) -> str:
    """A defect in one line of at most 200 characters, for those who are told of it. The log has all of it."""
    return f"{type(problem).__name__}: {problem}"[:200]
