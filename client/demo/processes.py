"""Starts the demo's processes and ends all of them with the demo.

`Processes` starts each child in its own process session, so that a Ctrl-C reaches only the demo, which then ends the
children in order: SIGTERM, GRACE_S, SIGKILL. The lines that children print arrive in one queue. A child's stderr goes
to a log file, whose end is shown if the child fails.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, NoReturn, Self, TypeAlias

from .errors import ProcessFailed

GRACE_S: Final = 15.0
_LOG_LINES_SHOWN: Final = 30
# Tokens and certificates in the environment are for another server than the demo's own.
_OF_OTHERS: Final = ("PUSHSTEP_TOKEN", "PUSHSTEP_TLS_")


def _own_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_OF_OTHERS)}


class Child:
    """One started process: its name, its log, and the lines it prints."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        lines: queue.Queue[Line],
        environment: Mapping[str, str],
    ) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(  # noqa: S603 (our own programs, no shell)
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                # one thread each: several processes share the cores, and waiting OpenMP threads spin, which made an
                # epoch four times as long on a busy machine
                env={"OMP_NUM_THREADS": "1", **_own_environment(), "PYTHONUNBUFFERED": "1", **environment},
            )
        self._reader = threading.Thread(target=self._read, args=(lines,), name=f"{name}-lines", daemon=True)
        self._reader.start()

    def _read(self, lines: queue.Queue[Line]) -> None:
        if self.process.stdout is not None:
            with self.process.stdout as stdout:
                for text in stdout:
                    lines.put((self, text.rstrip("\n")))
        lines.put((self, None))

    def failure(self, what: str) -> ProcessFailed:
        """An error that shows the end of this child's log."""
        said = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES_SHOWN:]
        shown = "\n".join(f"  | {line}" for line in said) or "  | (its log is empty)"
        return ProcessFailed(f"{self.name} {what}\n{shown}")

    def expect_end(self) -> None:
        """Wait for an exit with status 0. ProcessFailed for another status, or after GRACE_S."""
        try:
            status = self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            raise self.failure(f"did not end within {GRACE_S:.0f} s") from None
        if status != 0:
            raise self.failure(f"ended with status {status}")

    def stop(self) -> None:
        """Send SIGTERM and wait for an exit with status 0, as `expect_end` does."""
        self.process.terminate()
        self.expect_end()


Line: TypeAlias = tuple[Child, str | None]
"""A process and a line that it printed; None at the end of its output."""


class Processes:
    """Owns the children and the queue of their lines. No child runs any more after its `with` block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.children: list[Child] = []
        self._lines: queue.Queue[Line] = queue.Queue()

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Child:
        """Start a child. Its log is `{name}.log` in the folder. `environment`: beside this process's."""
        child = Child(name, command, self.folder / f"{name}.log", self._lines, environment or {})
        self.children.append(child)
        return child

    def next_line(self, timeout_s: float) -> Line | None:
        """The next line that any child prints, or None after the time-out."""
        try:
            return self._lines.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        running = [child.process for child in self.children if child.process.poll() is None]
        try:
            for process in running:
                process.terminate()
            until = time.monotonic() + GRACE_S
            for process in running:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))
        finally:  # also if a second Ctrl-C cuts the wait short
            for process in running:
                if process.poll() is None:
                    process.kill()
                    process.wait()


@contextmanager
def terminable() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise SystemExit, so that `with` blocks stop the children as after Ctrl-C."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and signals interrupt only it
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
