"""Which process of which host a worker is, and whether such a process is still there.

A pid says nothing by itself: it is used again, and means another process in each namespace. So it goes with the
process's start, in the kernel's ticks since boot, and with the host's boot and the namespaces of pids and of clocks.
Who is elsewhere knows nothing of it, and says so: "not known to be gone".
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from .training_pb2 import Process

_BOOT: Final = "/proc/sys/kernel/random/boot_id"
_NAMESPACES: Final = ("/proc/self/ns/pid", "/proc/self/ns/time")
# Fields of /proc/PID/stat behind the name, which may hold anything; the first of them is the third.
_STATE, _STARTED = 0, 19
_LARGEST_PID: Final = (1 << 31) - 1


def this_process() -> Process | None:
    """The calling process; None where the system does not tell."""
    host, found = _host(), _stat(os.getpid())
    return None if not host or found is None else Process(host=host, pid=os.getpid(), started=found[1])


def is_gone(process: Process) -> bool:
    """Whether it is known that the process has ended: a process of this host whose pid is free, or another's."""
    if not process.host or process.host != _host() or not 0 < process.pid <= _LARGEST_PID:
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # another user's: it is there
    found = _stat(process.pid)
    # where /proc hides other users' processes there is nothing to be read of one that lives
    return found is not None and (found[0] in "ZX" or found[1] != process.started)


def _host() -> bytes:
    """What processes have to agree in for one to look the other up; empty where the system does not tell."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return b""  # another namespace's /proc: its numbers are not ours
        words = [Path(_BOOT).read_text().strip(), *(os.readlink(path) for path in _NAMESPACES)]
    except OSError:
        return b""
    return "\n".join(words).encode()


def _stat(pid: int) -> tuple[str, int] | None:
    """A process's state, as one letter, and its start."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[_STATE], int(fields[_STARTED])
    except (OSError, IndexError, ValueError):
        return None
