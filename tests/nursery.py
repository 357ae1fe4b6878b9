"""Scripts in processes of their own that are there at once: forked from one that has imported what takes long.

Each is a whole Python program: it ends as one that was started by itself does, with all that the interpreter does at
its end. Run as a script this is the process that they are forked from: it reads orders from stdin, one a line.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Script:
    """One that was started."""

    nursery: Nursery
    pid: int
    log: Path

    def wait(self) -> int:
        """Its exit status, or minus the number of the signal that ended it."""
        status: int = self.nursery.order(wait=self.pid)
        self.nursery.running.discard(self.pid)
        return status

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
    """Owns the process that scripts are forked from."""

    def __init__(self, folder: Path, *imports: str) -> None:
        self._folder = folder
        self._count = 0
        self.running: set[int] = set()
        self._process = subprocess.Popen(
            [sys.executable, __file__, *imports], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def order(self, **order: Any) -> Any:
        """Have it do something; what it answers."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("no pipes")
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, code: str, *arguments: str) -> Script:
        """Run a script with these arguments in its sys.argv."""
        self._count += 1
        log = self._folder / f"script-{self._count}.log"
        log.touch()
        script = Script(self, self.order(code=code, arguments=arguments, log=str(log)), log)
        self.running.add(script.pid)
        return script

    def close(self) -> None:
        """End the process, and whatever a failed test has left of its scripts."""
        for pid in self.running:
            os.kill(pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait(30)


@contextmanager
def nursery(folder: Path, *imports: str) -> Iterator[Nursery]:
    """One for the length of a block, whose scripts find these modules imported, too."""
    made = Nursery(folder, *imports)
    try:
        yield made
    finally:
        made.close()


def _serve() -> dict[str, Any] | None:
    """Take orders until there are no more; a child returns with its own."""
    import torch
    import torch._dynamo  # what the first optimizer imports

    import pushstep.client  # noqa: F401 - for the children

    for name in sys.argv[1:]:
        importlib.import_module(name)
    torch.set_num_threads(1)
    gc.freeze()  # a collection in a child, as there is one at its end, would copy every page
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                return dict(order)
        print(answer, flush=True)
    return None


def _become(order: dict[str, Any]) -> None:
    """Take on a script's place: its output, its arguments, Python's own way with Ctrl-C."""
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    sys.stdin = open(0)  # noqa: SIM115 - the script's for as long as it lives
    sys.stdout = open(1, "w", buffering=1)  # noqa: SIM115
    sys.argv = ["script", *order["arguments"]]
    signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    ordered = _serve()
    if ordered is not None:
        _become(ordered)
        exec(compile(ordered["code"], "script", "exec"))
