"""Who used the CPUs: processes of ours, or strangers who make a measurement worth less. Linux only."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path


class Others:
    """What everybody but this process and its children uses of the CPUs from now on."""

    def __init__(self) -> None:
        self._begin_s = time.perf_counter()
        self._used_s = self._now_s()

    def _now_s(self) -> float:
        times = os.times()
        # of children that have ended meanwhile, and of theirs
        ended_s = times.children_user + times.children_system
        return machine_busy_s() - ended_s - sum(map(cpu_s, descendants([os.getpid()])))

    def share(self) -> float:
        """So far: 0 is a quiet machine, 1 one that they had to themselves."""
        elapsed_s = time.perf_counter() - self._begin_s
        return max(0.0, (self._now_s() - self._used_s) / elapsed_s / (os.cpu_count() or 1))


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, in nanoseconds' resolution; 0 once it is gone."""
    with contextlib.suppress(OSError):
        return time.clock_gettime((~pid << 3) | 2)  # what clock_getcpuclockid(3) returns on Linux
    return 0.0


def machine_busy_s() -> float:
    """CPU seconds that all processes of this machine have used."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def descendants(pids: Sequence[int]) -> set[int]:
    """These processes and all their children's children."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    found = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found
