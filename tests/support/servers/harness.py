"""Real servers for tests: started as processes on free ports, talked to over real sockets, always ended."""

from __future__ import annotations

import contextlib
import itertools
import re
import select
import shlex
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from pushstep.client import Session, connect
from tests.support.processes.forked import Forked, serve

SUPPORT = Path(__file__).parents[1]
SERVER = Path(sys.executable).with_name("pushstep-server")
# What a server is started with on each device that tests run on; conftest.py sets which.
COMMANDS: dict[str, tuple[str | Path, ...]] = {
    "cpu": (SERVER,),
    "cuda": (SERVER, "--device", "cuda"),
    "modelled": (sys.executable, SUPPORT / "cuda" / "modelled_server.py", "--device", "cuda"),
}
# On a loop that is watched, whatever the device.
WATCHED = (sys.executable, SUPPORT / "servers" / "watched_server.py")
DEVICE = "cpu"
# less than a test may take, so that one whose server does not come up can tell what the server says
START_S = 90.0
# the server that all tests share snapshots some hundred models, beside whatever else the machine does
STOP_S = 90.0
_numbers = itertools.count()
# what the log says of a port that somebody has
IN_USE = "is in use"
# Of every call's own, httpx would make it for http, too, and read all certificates: 17 ms, thirty times the call.
_TLS = ssl.create_default_context()


@dataclass
class RunningServer:
    """A server process and how to reach it."""

    process: subprocess.Popen[str] | Forked
    grpc: str
    http: str
    unix: str
    data: Path
    log: Path
    sessions: list[Session] = field(default_factory=list)
    # of each session, unless it is told another
    token: str | None = None
    # of each REST call that has none of its own
    headers: dict[str, str] = field(default_factory=dict)
    # of each call of gRPC that is made by hand
    metadata: tuple[tuple[str, str], ...] = ()

    def connect(self, model: str, worker: str = "w0", **options: Any) -> Session:
        """A session that is closed with the server; retries end soon, so that a failing test does not hang.

        It sends frames unless told `shared_memory=True`: most tests are about them, and all run on one host.
        """
        session = connect(
            options.pop("address", self.grpc),
            model=model,
            worker=worker,
            **{
                "timeout_s": 20.0,
                "retry_for_s": 20.0,
                "shared_memory": False,
                "token": self.token,
                **options,
            },
        )
        self.sessions.append(session)
        return session

    def rest(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One REST call; `path` below the root. `local_address`: of this host, from which it comes."""
        transport = httpx.HTTPTransport(verify=_TLS, local_address=options.pop("local_address", None))
        options.setdefault("headers", self.headers)
        with httpx.Client(transport=transport, timeout=20.0, trust_env=False, verify=_TLS) as client:
            return client.request(method, f"http://{self.http}{path}", **options)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Close the sessions, end the process, and return its exit status."""
        if number == signal.SIGTERM:
            for session in self.sessions:
                session.close()
        self.process.send_signal(number)
        status = self.process.wait(STOP_S)
        self.close_pipe()
        return status

    def kill(self) -> None:
        """End the process by SIGKILL, if it has not ended. Its sessions stay as they are."""
        self.process.kill()
        self.process.wait()
        self.close_pipe()

    def close_pipe(self) -> None:
        """Let go of the process's output: for a test that ended it itself."""
        if self.process.stdout is not None:
            self.process.stdout.close()

    def outlived_by(self, session: Session) -> None:
        """Wait for the end of a process that was killed, and close a session of its, which cannot leave any more."""
        try:
            self.process.wait(60)
            with pytest.warns(RuntimeWarning, match="could not leave"):
                session.close()
        finally:
            self.kill()


def start_server(
    data: Path,
    *options: str,
    environment: dict[str, str] | None = None,
    command: Sequence[str | Path] = (),
) -> RunningServer:
    """Start a server on free ports with `data` as its folder, and wait until it is ready. On the test's device.

    `command`: what is started in place of the server's own command. A file that Python runs is forked, too.
    At the address of a server before it, it is started again while a connection of somebody's happens to have that port.
    """
    data.mkdir(parents=True, exist_ok=True)
    until_s = time.monotonic() + START_S
    while True:
        log = data / f"server-{next(_numbers)}.log"
        process, line = _started(data, options, log, environment, command)
        if line.startswith("ready "):
            where = dict(entry.split("=", 1) for entry in shlex.split(line)[1:])
            http, unix = where.get("http", ""), where.get("unix", "")
            return RunningServer(process, where["grpc"], http, unix, data, log)
        process.wait(STOP_S)
        if process.stdout is not None:
            process.stdout.close()
        text = log.read_text()
        if IN_USE not in text or "--grpc" not in options or time.monotonic() > until_s:
            raise RuntimeError(f"the server did not start: {line!r}\n{text}")
        time.sleep(0.1)


def _started(
    data: Path,
    options: Sequence[str],
    log: Path,
    environment: dict[str, str] | None,
    command: Sequence[str | Path],
) -> tuple[subprocess.Popen[str] | Forked, str]:
    """A server's process, and the first line that it prints; "" if it ends before, or prints none in time."""
    arguments = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", str(data), *options]
    process: subprocess.Popen[str] | Forked
    started = tuple(str(word) for word in command or COMMANDS[DEVICE])
    how: dict[str, Any] = {} if environment is None else {"environment": environment}
    with log.open("w") as stderr:
        if started == (str(SERVER),):
            process = serve(arguments, stderr, **how)
        elif started[0] == sys.executable:
            process = serve([*started[2:], *arguments], stderr, file=started[1], **how)
        else:
            process = subprocess.Popen(
                [*started, *arguments], stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
            )
    if process.stdout is None:
        raise RuntimeError("no pipe")
    output = select.poll()  # select() knows no descriptors above 1023
    output.register(process.stdout, select.POLLIN)
    if not output.poll(START_S * 1000):
        process.kill()
    return process, process.stdout.readline()


def refused_start(data: Path, *options: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """A server that does not come up: how it ends, and what it says. `environment`, `file`: as `Origin.serve` has them."""
    arguments = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", str(data), *options]
    with tempfile.TemporaryFile("w+") as stderr:
        process = serve(arguments, stderr, **how)
        with process.stdout:
            stdout = process.stdout.read()
        status = process.wait(START_S)
        stderr.seek(0)
        return subprocess.CompletedProcess(arguments, status, stdout, stderr.read())


def kill_and_restart(server: RunningServer, *options: str) -> RunningServer:
    """SIGKILL, and another server in the same folder, at the same address for workers."""
    server.kill()
    return start_server(server.data, "--grpc", server.grpc, *options)


@contextlib.contextmanager
def running_server(data: Path, *options: str, **how: Any) -> Iterator[RunningServer]:
    """A server for the length of a block. Its end must be orderly unless the test ended it itself."""
    server = start_server(data, *options, **how)
    try:
        yield server
    finally:
        if server.process.poll() is not None:
            server.close_pipe()
        else:
            status = server.stop()
            if status != 0:
                raise RuntimeError(f"the server ended with {status}\n{server.log.read_text()}")


def wait_until(condition: Any, timeout_s: float = 30.0) -> None:
    """Return once `condition()` is true; AssertionError when it stays false.

    What takes long is looked at less often: most conditions are a REST call, and other tests use the same cores.
    """
    begun_s = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - begun_s
        if waited_s > timeout_s:
            raise AssertionError(f"not within {timeout_s} s")
        time.sleep(min(max(0.01, waited_s / 10), 0.05))


def memory_bytes(pid: int, line: str = "VmRSS") -> int:
    """What the kernel says of a process's memory; `VmHWM`: the most of it, until `forget_peak`."""
    found = re.search(rf"{line}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget_peak(pid: int) -> None:
    """Have VmHWM count from here."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
