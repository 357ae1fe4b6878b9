"""Which process a worker is: told from every other one, and never said to be gone while it may be there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pushstep.proto import process
from pushstep.proto.process import is_gone, this_process
from pushstep.proto.training_pb2 import Process


def like(known: Process, **changes: int | bytes) -> Process:
    made = Process()
    made.CopyFrom(known)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.fixture
def own() -> Process:
    found = this_process()
    assert found is not None
    return found


@pytest.fixture
def child(own: Process) -> Iterator[tuple[subprocess.Popen[bytes], Process]]:
    """A process that waits, and who it is."""
    code = "import sys; from pushstep.proto.process import this_process\n"
    code += "sys.stdout.buffer.write(this_process().SerializeToString().hex().encode() + b'\\n')\n"
    code += "sys.stdout.flush(); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as started:
        assert started.stdout is not None
        yield started, Process.FromString(bytes.fromhex(started.stdout.readline().decode()))
        started.kill()


def test_this_one_is_there_and_always_the_same(own: Process) -> None:
    assert own.pid == os.getpid()
    assert own == this_process()
    assert not is_gone(own)


def test_another_one_is_another(own: Process, child: tuple[subprocess.Popen[bytes], Process]) -> None:
    started, theirs = child
    assert theirs.pid == started.pid
    assert theirs != own and theirs.host == own.host
    assert not is_gone(theirs)
    os.kill(started.pid, signal.SIGSTOP)
    assert not is_gone(theirs), "it stands still, and may go on"
    started.kill()
    os.waitid(os.P_PID, started.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(theirs), "ended, and not waited for yet"
    started.wait()
    assert is_gone(theirs)


def test_a_pid_that_was_used_again(own: Process) -> None:
    assert is_gone(like(own, started=own.started + 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"host": b""},
        {"host": b"another boot"},
        {"pid": 0},
        {"pid": 1 << 31},
        {"pid": (1 << 64) - 1},
    ],
    ids=str,
)
def test_what_is_not_known_is_not_gone(own: Process, changes: dict[str, int | bytes]) -> None:
    assert not is_gone(like(own, **changes, started=own.started + 1))


def test_a_process_that_proc_hides(own: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """As hidepid=2 does with another user's: it is there, and there is nothing to read."""
    monkeypatch.setattr(process, "_stat", lambda pid: None)
    assert not is_gone(like(own, started=own.started + 1))
    assert this_process() is None


@pytest.mark.parametrize("missing", ["_BOOT", "_NAMESPACES"])
def test_a_system_that_does_not_tell(own: Process, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    nowhere = str(Path(os.devnull) / "nowhere")
    monkeypatch.setattr(process, missing, nowhere if missing == "_BOOT" else (nowhere,))
    assert this_process() is None
    assert not is_gone(like(own, started=own.started + 1))
