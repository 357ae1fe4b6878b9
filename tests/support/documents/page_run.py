"""One page's blocks, run as its reader would: one shell and one Python for the page, in a folder of the page's own.

The shell keeps its folder, its exported variables and what it has started in the background from block to block. Python
keeps its names; it runs in the folder where the shell is. The ports that pages name are those of a server of the test's,
or free ones if the page starts a server by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.documents.blocks import Block
from tests.support.processes.forked import Forked
from tests.support.terminals.command_shim import CommandShim

BLOCK_S = 300.0
# The ports of the defaults, for workers and for operators.
_ADDRESSES = re.compile(r"\b(?:localhost|127\.0\.0\.1):(7070|7071)\b")
STARTS_A_SERVER = re.compile(
    r"^\s*(?:nohup )?pushstep-server\b(?!.*--(?:make-token|help|version))", re.MULTILINE
)
_SHELL = """
set -eo pipefail
if [ -f "$STATE/exported" ]; then source "$STATE/exported"; cd "$(cat "$STATE/folder")"; fi
trap 'export -p > "$STATE/exported"; pwd > "$STATE/folder"' EXIT
"""
# Runs in a process of its own: takes blocks, and answers each with the traceback of what it raised, or nothing.
_PYTHON = """
import json, os, socket, sys, traceback, warnings
warnings.simplefilter("error")
warnings.filterwarnings("default", module=r"(?!pushstep)")  # what libraries say to each other
__name__ = "__main__"
names = {"__name__": "__main__"}
def blocks():
    with socket.socket(socket.AF_UNIX) as given:
        given.connect(sys.argv[1])
        with given.makefile("rw") as lines:
            for line in lines:
                yield json.loads(line), lines
for (page, number, text, folder), lines in blocks():
    os.chdir(folder)
    try:
        exec(compile("\\n" * number + text, page, "exec"), names)
        raised = ""
    except BaseException:
        raised = traceback.format_exc()
    sys.stdout.flush()
    lines.write(json.dumps(raised) + "\\n")
    lines.flush()
"""


@dataclass
class PageRun:
    """A page under way. Its blocks are given to `run` in order."""

    folder: Path
    commands: CommandShim
    programs: Path
    grpc: str
    http: str
    _python: tuple[Forked, socket.socket] | None = None
    _groups: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._home, self._state = self.folder / "home", self.folder / "state"
        for made in (self._home, self._state):
            made.mkdir(parents=True)
        # an answer that is an error fails the block, also where a page's curl has no -f
        (self._home / ".curlrc").write_text("fail\nsilent\nshow-error\n")

    def run(self, block: Block) -> str:
        """Run one block; what it has written. AssertionError, with all that it said, if it fails."""
        text = _ADDRESSES.sub(lambda found: self.grpc if found[1] == "7070" else self.http, block.text)
        return self._run_python(block, text) if block.language == "python" else self._run_shell(block, text)

    def _run_shell(self, block: Block, text: str) -> str:
        environment = {
            **os.environ,
            "STATE": str(self._state),
            "HOME": str(self._home),
            "PATH": f"{self.programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PUSHSTEP_GRPC": self.grpc,
            "PUSHSTEP_HTTP": self.http,
            "PUSHSTEP_SERVER": self.grpc,
            "no_proxy": "*",
        }
        log = self.folder / f"{block.line}.log"
        # into a file: what goes on in the background would keep a pipe open
        with log.open("wb") as output:
            shell = subprocess.Popen(
                ["bash", "-c", _SHELL + text],
                cwd=self._home,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._groups.append(shell.pid)
            status = shell.wait(BLOCK_S)
        said = log.read_text(errors="replace")
        assert status == 0, f"{block} ended with {status}:\n{text}\n{said}"
        return said

    def _run_python(self, block: Block, text: str) -> str:
        log = self.folder / "python.log"
        if self._python is None:
            self._python = self._start_python(log)
        begin = log.stat().st_size
        process, lines = self._python
        where = self._state / "folder"
        folder = where.read_text().strip() if where.exists() else str(self._home)
        order = [str(block.page), block.line, text, folder]
        lines.sendall(json.dumps(order).encode() + b"\n")
        with lines.makefile("r") as answers:
            answer = answers.readline()
        said = log.read_bytes()[begin:].decode(errors="replace")
        assert answer, f"{block}: Python ended with {process.wait(BLOCK_S)}\n{said}"
        assert json.loads(answer) == "", f"{block}:\n{said}\n{json.loads(answer)}"
        return said

    def _start_python(self, log: Path) -> tuple[Forked, socket.socket]:
        path = str(self.folder / "python.sock")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path)
            listening.listen()
            listening.settimeout(BLOCK_S)
            process = self.commands.run(_PYTHON, (path,), log)
            accepted, _ = listening.accept()
            accepted.settimeout(BLOCK_S)
            return process, accepted

    def close(self) -> None:
        """End Python in the usual way, and what the shell has left in the background."""
        if self._python is not None:
            process, lines = self._python
            lines.close()
            process.wait(BLOCK_S)
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


@contextlib.contextmanager
def page_run(folder: Path, commands: CommandShim, programs: Path, grpc: str, http: str) -> Iterator[PageRun]:
    """One for the length of a block."""
    made = PageRun(folder, commands, programs, grpc, http)
    try:
        yield made
    finally:
        made.close()


def free_address() -> str:
    """An address at which nobody listens, for a server that a page starts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"
