"""Scripts in processes of their own that are there at once; see forked.py."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes.forked import Forked, Origin, origin_of


@dataclass
class Script:
    """One that was started."""

    process: Forked
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self) -> int:
        """Its exit status, or minus the number of the signal that ended it."""
        return self.process.wait()

    def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send it a signal and wait for its end."""
        os.kill(self.pid, number)
        return self.wait()

    def said(self) -> str:
        """What it has written so far, to stdout and to stderr."""
        return self.log.read_text(errors="replace")

    def wait_for(self, word: str, timeout_s: float = 30.0) -> None:
        """Return once it has written that."""
        until_s = time.monotonic() + timeout_s
        while word not in self.said():
            if time.monotonic() > until_s:
                raise AssertionError(f"no {word!r} in {self.said()!r}")
            time.sleep(0.005)


class Nursery:
    """Starts scripts, and ends them."""

    def __init__(self, folder: Path, *imports: str) -> None:
        self._folder = folder
        self._origin = origin_of(*Origin.OF_WORKERS, *imports)
        self._scripts: list[Script] = []

    def start(self, code: str, *arguments: str) -> Script:
        """Run a script with these arguments in its sys.argv."""
        log = self._folder / f"script-{len(self._scripts) + 1}.log"
        script = Script(self._origin.run(code, arguments, log), log)
        self._scripts.append(script)
        return script

    def close(self) -> None:
        """End whatever a failed test has left of its scripts."""
        for script in self._scripts:
            script.process.kill()
            script.wait()


@contextmanager
def nursery(folder: Path, *imports: str) -> Iterator[Nursery]:
    """One for the length of a block, whose scripts find these modules imported, too."""
    made = Nursery(folder, *imports)
    try:
        yield made
    finally:
        made.close()
