"""`pushstep`, Python and torchrun for tests that start programs: forked from a process that has imported what takes long.

Each is a program that hands over its arguments, folder, environment and files, and ends with the status that comes back.
What runs is the command's own `main()`, or the script that Python is given, in a process of its own.
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
from tests.support.terminals.command import COMMAND

_PROGRAM = f"""#!{sys.executable} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as caller:
    caller.connect({{path!r}})
    order = {{{{"code": {{code!r}}, "arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}}}
    said = json.dumps(order).encode()
    socket.send_fds(caller, [len(said).to_bytes(4, "big")], [1, 2, 0])
    caller.sendall(said)
    status = int(caller.recv(16) or b"1")
sys.exit(status if status >= 0 else 128 - status)
"""
# A script, what is given by -c or comes from stdin; perhaps behind -u
PYTHON = """
import os, runpy, sys
sys.argv = sys.argv[2:] if sys.argv[1] == "-u" else sys.argv[1:]
if sys.argv[0] in ("-c", "-"):
    code = sys.argv.pop(1) if sys.argv[0] == "-c" else sys.stdin.read()
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
else:
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Its ranks are forked, too, unless the environment names a Python for them.
TORCHRUN = """
import os, sys
from torch.distributed.run import main
os.environ.setdefault("PYTHON_EXEC", {python!r})
sys.exit(main())
"""


class CommandShim:
    """Owns the programs in `folder`, and the thread that listens to them. What they run is forked from `origin`."""

    def __init__(self, folder: Path, origin: Origin) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._origin = origin
        self._listening = socket.socket(socket.AF_UNIX)
        self._path = str(folder / "shim.sock")
        self._listening.bind(self._path)
        self._listening.listen()
        self.pushstep = self._program(folder / "pushstep", COMMAND)
        self.python = self._program(folder / "python", PYTHON)
        self.torchrun = self._program(folder / "torchrun", TORCHRUN.format(python=str(self.python)))
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _program(self, program: Path, code: str) -> Path:
        program.write_text(_PROGRAM.format(path=self._path, code=code))
        program.chmod(0o755)
        return program

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
            length, files, _, _ = socket.recv_fds(caller, 4, 3)
            said = b""
            while len(said) < int.from_bytes(length, "big"):
                said += caller.recv(1 << 16)
            order = json.loads(said)
            try:
                process = self._origin.start(order.pop("code"), order.pop("arguments"), *files, **order)
            finally:
                for file in files:
                    os.close(file)
            status = self._wait(process, caller)
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
        """Take no more orders."""
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()
