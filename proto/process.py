"""The identity of a worker's process on its host, and whether that process still runs.

A pid alone identifies nothing: the kernel uses pids again, and each pid namespace has its own. So an identity holds
the pid, the process's start in kernel ticks since boot, and the host: its boot id and its namespaces of pids and of
clocks. A process of another host or namespace cannot be looked up: the answer is then "not known to be gone".
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from .training_pb2 import Process

_BOOT: Final = "/proc/sys/kernel/random/boot_id"
_NAMESPACES: Final = ("/proc/self/ns/pid", "/proc/self/ns/time")
# Indices into /proc/PID/stat behind the process's name, which may hold any character. Index 0 is the third field.
_STATE, _STARTED = 0, 19
_LARGEST_PID: Final = (1 << 31) - 1


def this_process() -> Process | None:
    """The identity of the calling process; None where /proc does not give it."""
    host, found = _host(), _stat(os.getpid())
    return None if not host or found is None else Process(host=host, pid=os.getpid(), started=found[1])


def is_gone(process: Process) -> bool:
    """True if the process, of this host, is known to have ended: its pid is free, a zombie's or another's."""
    if not process.host or process.host != _host() or not 0 < process.pid <= _LARGEST_PID:
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # the pid is in use by another user's process
    found = _stat(process.pid)
    # /proc may hide the live processes of other users: no stat does not mean that the process has ended
    return found is not None and (found[0] in "ZX" or found[1] != process.started)


def _host() -> bytes:
    """Boot id and namespaces, which two processes must share for a look-up; empty where /proc lacks them."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return b""  # /proc is of another pid namespace, where other pids hold
        words = [Path(_BOOT).read_text().strip(), *(os.readlink(path) for path in _NAMESPACES)]
    except OSError:
        return b""
    return "\n".join(words).encode()


def _stat(pid: int) -> tuple[str, int] | None:
    """A process's state (one letter) and start (kernel ticks since boot); None where /proc lacks them."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[_STATE], int(fields[_STARTED])
    except (OSError, IndexError, ValueError):
        return None
