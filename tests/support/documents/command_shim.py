"""The `pushstep` command for shells of tests, forked from a process that has imported it: a start takes 1.5 s otherwise.

The shell finds a program of this name that hands over its arguments, folder, environment and files, and ends with the
status that comes back. What runs is the command's own `main()`, in a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
from pathlib import Path

from tests.support.processes.forked import Forked, Origin

_PROGRAM = f"""#!{sys.executable} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as caller:
    caller.connect({{path!r}})
    order = {{{{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}}}
    said = json.dumps(order).encode()
    socket.send_fds(caller, [len(said).to_bytes(4, "big")], [1, 2])
    caller.sendall(said)
    status = int(caller.recv(16) or b"1")
sys.exit(status if status >= 0 else 128 - status)
"""
# Most of what commands import when they run, and what the first optimizer of a page's Python does.
_IMPORTS = (
    "torch._dynamo",
    "pushstep.client.session",
    "pushstep.client.commands",
    "pushstep.client.commands.rest",
    "pydantic.main",
    "rich.live",
    "rich.progress",
    "rich.table",
)
_CODE = "import sys\nfrom pushstep.client.commands import main\nsys.argv[0] = 'pushstep'\nmain()\n"


class CommandShim:
    """Owns the process that commands are forked from, the program in `folder`, and the thread that listens to it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._origin = Origin(*_IMPORTS)
        self._listening = socket.socket(socket.AF_UNIX)
        path = str(folder / "pushstep.sock")
        self._listening.bind(path)
        self._listening.listen()
        program = folder / "pushstep"
        program.write_text(_PROGRAM.format(path=path))
        program.chmod(0o755)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def run(self, code: str, arguments: tuple[str, ...], log: Path) -> Forked:
        """Another Python program, forked from the same process."""
        return self._origin.run(code, arguments, log)

    def _listen(self) -> None:
        while True:
            try:
                caller, _ = self._listening.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(caller,), daemon=True).start()

    def _serve(self, caller: socket.socket) -> None:
        with caller:
            length, files, _, _ = socket.recv_fds(caller, 4, 2)
            said = b""
            while len(said) < int.from_bytes(length, "big"):
                said += caller.recv(1 << 16)
            try:
                pid = self._origin._fork({**json.loads(said), "code": _CODE}, *files)
            finally:
                for file in files:
                    os.close(file)
            status = self._wait(Forked(self._origin, pid), caller)
            with contextlib.suppress(OSError):  # it does not wait for the answer
                caller.sendall(str(status).encode())

    def _wait(self, process: Forked, caller: socket.socket) -> int:
        """Its exit status; a caller that is gone has it end."""
        watched = os.pidfd_open(process.pid)
        try:
            both = select.poll()
            both.register(watched, select.POLLIN)
            both.register(caller, select.POLLHUP)
            while watched not in dict(both.poll()):
                process.send_signal(signal.SIGTERM)
                both.unregister(caller)
        finally:
            os.close(watched)
        return process.wait()

    def close(self) -> None:
        """Take no more commands."""
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()
        self._origin.close()
