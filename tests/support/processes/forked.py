"""Processes forked from one that has imported what takes long: most of the start of a server or a script is importing torch.

A forked server runs the command's own `main()`, or a file that changes something first; a forked script is a whole
Python program. Each ends as one that was started by itself does, with all that the interpreter does at its end. Run as a
program, this is the process that they are forked from.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[3]
LONGEST_ORDER = 1 << 20


class Forked:
    """A process, with what tests use of a `subprocess.Popen`."""

    def __init__(self, origin: Origin, pid: int, stdout: IO[str] | None = None) -> None:
        self._origin = origin
        self.pid = pid
        self.stdout = stdout
        self.stdin: IO[str] | None = None
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, or minus the number of the signal that ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = self._origin.order({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The same, once it has ended."""
        if self.returncode is None:
            watched = os.pidfd_open(self.pid)  # it is there until its status is asked for
            try:
                end = select.poll()
                end.register(watched, select.POLLIN)
                end.poll(None if timeout is None else timeout * 1000)
            finally:
                os.close(watched)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        """Nothing, if it has ended: until it is asked for, its pid is nobody else's."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def end(self) -> None:
        """The same, and let go of its pipes."""
        self.kill()
        self.wait()
        for pipe in (self.stdin, self.stdout):
            if pipe is not None:
                pipe.close()


class Origin:
    """Owns the process that others are forked from, which finds `imports` imported."""

    # what `pushstep`, and most scripts of workers, import: `torch._dynamo` is what the first optimizer does
    OF_WORKERS = (
        "torch._dynamo",
        "pushstep.client.session",
        "pushstep.client.optimizer.remote_optimizer",
        "pushstep.client.commands",
        "pushstep.client.commands.rest",
        "pydantic.main",
        "rich.live",
        "rich.progress",
        "rich.table",
    )

    def __init__(self, *imports: str, **environment: str) -> None:
        self._alone = threading.Lock()
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno()), *imports]
            self._process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **environment}, pass_fds=[theirs.fileno()]
            )
        atexit.register(self.close)

    def order(self, order: dict[str, Any], *fds: int) -> Any:
        """Have it do something; what it answers."""
        with self._alone:  # or two threads of a test would take each other's answers
            socket.send_fds(self._orders, [json.dumps(order).encode()], list(fds))
            return json.loads(self._orders.recv(LONGEST_ORDER))

    def serve(self, arguments: list[str], stderr: IO[str], **how: Any) -> Forked:
        """A server with these arguments, which writes to `stderr`.

        `file`: run this in place of the command. `environment`: in place of this process's.
        """
        ours, theirs = os.pipe()
        try:
            pid = self._fork({"arguments": arguments, **how}, theirs, stderr.fileno())
        finally:
            os.close(theirs)
        return Forked(self, pid, open(ours))

    def run(self, code: str, arguments: tuple[str, ...], log: Path) -> Forked:
        """A script with these arguments in its sys.argv, which writes to `log`."""
        with log.open("a") as output:
            return self.start(code, arguments, output.fileno(), output.fileno())

    def start(
        self,
        code: str,
        arguments: Sequence[str],
        stdout: int,
        stderr: int = 2,
        stdin: int | None = None,
        **how: Any,
    ) -> Forked:
        """The same with files of its own, which stay the caller's. `environment`, `folder`: in place of this process's."""
        order = {"code": code, "arguments": list(arguments), **how}
        return Forked(self, self._fork(order, stdout, stderr, *([] if stdin is None else [stdin])))

    def piped(self, module: str, *arguments: str) -> Forked:
        """A module, as `python -m` runs it, with pipes to its stdin and from its stdout."""
        code = f"import runpy; runpy.run_module({module!r}, run_name='__main__')"
        (theirs, stdin), (ours, stdout) = os.pipe(), os.pipe()
        try:
            process = self.start(code, arguments, stdout, stdin=theirs)
        finally:
            os.close(theirs)
            os.close(stdout)
        process.stdin, process.stdout = open(stdin, "w"), open(ours)  # noqa: SIM115 - until it is ended
        return process

    def call(
        self, code: str, *arguments: str, timeout_s: float = 60.0, **how: Any
    ) -> subprocess.CompletedProcess[str]:
        """A script, run to its end: how it ended, and what it wrote."""
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            process = self.start(code, arguments, stdout.fileno(), stderr.fileno(), **how)
            try:
                status = process.wait(timeout_s)
            finally:
                process.kill()  # nothing, if it has ended
            written = [stdout, stderr]
            for file in written:
                file.seek(0)
            return subprocess.CompletedProcess(arguments, status, *(file.read() for file in written))

    def _fork(self, order: dict[str, Any], *fds: int) -> int:
        order = {"environment": dict(os.environ), "folder": os.getcwd()} | order
        pid: int = self.order(order, *fds)
        return pid

    def close(self) -> None:
        """End it. Closing twice does nothing."""
        atexit.unregister(self.close)
        self._orders.close()
        self._process.wait(30)


_origins: dict[tuple[Any, ...], Origin] = {}


def origin_of(*imports: str, **environment: str) -> Origin:
    """This process's own origin with these imports, which is made when it is first asked for, and ends with the process.

    `environment`: what the imports find there beside this process's.
    """
    key = os.getpid(), imports, *environment.items()
    if key not in _origins:
        _origins[key] = Origin(*imports, **environment)
    return _origins[key]


def workers() -> Origin:
    """The origin of workers and of commands."""
    return origin_of(*Origin.OF_WORKERS)


def serve(arguments: list[str], stderr: IO[str], **how: Any) -> Forked:
    """A server forked from this process's own origin of servers."""
    origin = origin_of("pushstep.server.__main__", "pushstep.server.operator_door.app")
    return origin.serve(arguments, stderr, **how)


def _take_orders(orders: socket.socket) -> dict[str, Any] | None:
    """Take orders until there are no more. A child returns with its own."""
    gc.collect()
    gc.freeze()  # a collection in a child, as there is one at a script's end, would copy every page
    while True:
        message, fds, _, _ = socket.recv_fds(orders, LONGEST_ORDER, 3, socket.MSG_CMSG_CLOEXEC)
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
                return dict(order)
            for fd in fds:
                os.close(fd)
        orders.send(json.dumps(answer).encode())


def _become(order: dict[str, Any], fds: Any) -> None:
    """Take on another program's place: its folder, its files and its arguments, and the usual ways with signals."""
    os.chdir(order["folder"])
    stdout, stderr, *given = fds
    (stdin,) = given or [os.open(os.devnull, os.O_RDONLY)]
    for source, target in zip((stdin, stdout, stderr), (0, 1, 2), strict=True):
        os.dup2(source, target)
        os.close(source)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for as long as it lives, as the next two
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(order["environment"])
    name = "script" if "code" in order else order.get("file", "pushstep-server")
    sys.argv = [name, *order["arguments"]]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup


def _load_kernels() -> None:
    """Load the kernels that every server warms up: that is half of its start.

    None runs in this process, which would start threads that a forked one lacks. A child runs them, and tells which they are.
    """
    import torch

    from pushstep.optim.kernels import cache
    from pushstep.server.devices.warmup import warm_kernels

    asked: list[tuple[Any, ...]] = []
    compile_one = cache._compile

    def note(*kernel: Any) -> Any:
        asked.append(kernel)
        return compile_one(*kernel)

    with tempfile.TemporaryFile() as told:
        child = os.fork()
        if child == 0:
            cache._compile = note
            warm_kernels(torch.device("cpu"), Path(os.devnull))
            pickle.dump(asked, told)
            told.flush()
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            raise RuntimeError("the kernels of a server's start cannot be warmed up")
        told.seek(0)
        for kernel in pickle.load(told):
            cache.compiled(*kernel)
    cache.folder.cache_clear()  # a server may be told another


def _look_at_packages() -> None:
    """Enter the hooks of installed packages in the catalogue: of what is left of a server's start, that is a quarter."""
    from pushstep.server.observers.catalogue import register

    register()


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    # What numba imports before it loads its first kernel would take two thirds of a server's start.
    from numba.core.registry import cpu_target

    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()
    if "pushstep.server.__main__" in sys.argv:
        _load_kernels()
        _look_at_packages()
    given = _take_orders(socket.socket(fileno=int(sys.argv[1])))
    if given is not None and "code" in given:
        import torch

        torch.set_num_threads(1)
        exec(compile(given["code"], "script", "exec"))
    elif given is not None and "file" in given:
        runpy.run_path(given["file"], run_name="__main__")
    elif given is not None:
        from pushstep.server.__main__ import main

        main()
