"""Server processes forked from one that has imported what takes long: most of a start is importing torch.

A server that was forked runs the command's own `main()` and ends as the command does. What a test changes of the
environment or of the command is started by itself, for it has to hold from the first import on.
"""

from __future__ import annotations

import array
import atexit
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

LONGEST_ORDER = 1 << 20
POLL_S = 0.005


class ServerProcess:
    """What tests use of a `subprocess.Popen`."""

    def __init__(self, origin: Origin, pid: int, stdout: IO[str]) -> None:
        self._origin = origin
        self.pid = pid
        self.stdout: IO[str] | None = stdout
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, or minus the number of the signal that ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = self._origin.order({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The same, once it has ended."""
        until_s = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if until_s is not None and time.monotonic() > until_s:
                raise subprocess.TimeoutExpired(f"server {self.pid}", timeout or 0)
            time.sleep(POLL_S)
        return self.returncode if self.returncode is not None else 0

    def send_signal(self, number: int) -> None:
        """Nothing, if it has ended: until it is asked for, its pid is nobody else's."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


class Origin:
    """Owns the process that servers are forked from. It ends with this one."""

    def __init__(self) -> None:
        self._alone = threading.Lock()
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, Path(__file__), str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        atexit.register(self.close)

    def order(self, order: dict[str, Any], *fds: int) -> Any:
        """Have it do something; what it answers."""
        with self._alone:  # or two threads of a test would take each other's answers
            socket.send_fds(self._orders, [json.dumps(order).encode()], list(fds))
            return json.loads(self._orders.recv(LONGEST_ORDER))

    def start(self, arguments: list[str], stderr: IO[str]) -> ServerProcess:
        """A server with these arguments, which writes to `stderr`."""
        ours, theirs = os.pipe()
        try:
            pid = self.order({"arguments": arguments, "folder": os.getcwd()}, theirs, stderr.fileno())
        finally:
            os.close(theirs)
        return ServerProcess(self, pid, open(ours))

    def close(self) -> None:
        """End it."""
        self._orders.close()
        self._process.wait(30)


_origins: dict[int, Origin] = {}


def start(arguments: list[str], stderr: IO[str]) -> ServerProcess:
    """A server forked from this process's own origin, which is made for the first one."""
    pid = os.getpid()
    if pid not in _origins:
        _origins[pid] = Origin()
    return _origins[pid].start(arguments, stderr)


def _serve(orders: socket.socket) -> list[str] | None:
    """Take orders until there are no more. A child returns with its arguments."""
    import pushstep.server.__main__
    import pushstep.server.operator_door.app  # noqa: F401 - for the children

    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    while True:
        message, fds, _, _ = socket.recv_fds(orders, LONGEST_ORDER, 2, socket.MSG_CMSG_CLOEXEC)
        if not message:
            return None
        order = json.loads(message)
        if "poll" in order:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                orders.close()
                _become(order, fds)
                return list(order["arguments"])
            for fd in fds:
                os.close(fd)
        orders.send(json.dumps(answer).encode())


def _become(order: dict[str, Any], fds: list[int] | array.array[int]) -> None:
    """Take on a server's place: where it runs, and what it reads and writes."""
    os.chdir(order["folder"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in zip((nothing, *fds), (0, 1, 2), strict=True):
        os.dup2(source, target)
        os.close(source)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - for as long as it lives
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


if __name__ == "__main__":
    given = _serve(socket.socket(fileno=int(sys.argv[1])))
    if given is not None:
        from pushstep.server.__main__ import main

        sys.argv = ["pushstep-server", *given]
        main()
