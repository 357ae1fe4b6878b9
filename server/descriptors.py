"""How many files this process may open, and who may have how many of them.

Connections are most of them. Each door is given fewer than there are, so that snapshots can always be written; a few are
held in reserve and let go when there are none left, so that an operator can always ask what is the matter.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
from dataclasses import dataclass
from typing import Final

log = logging.getLogger("pushstep.service")

# Of files that are no connections: the listeners, snapshots and exports under way, kernels, the log.
OWN_FILES: Final = 128
MOST_HTTP: Final = 1000
RESERVED: Final = 16


@dataclass(frozen=True, slots=True)
class Shares:
    """How many connections each door holds at once."""

    http: int
    grpc: int
    # those over which memory is shared
    local: int


def shared_out(most_grpc: int) -> Shares:
    """Raise this process's limit as far as it may, and share it out. `most_grpc`: however many there are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # some systems' hard limit is more than they take
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    if soft == resource.RLIM_INFINITY:
        return Shares(MOST_HTTP, most_grpc, most_grpc)
    free = max(64, soft - OWN_FILES - RESERVED)
    http = min(MOST_HTTP, free // 4)
    # a worker on this host has one of each
    grpc = min(most_grpc, (free - http) // 2)
    if grpc < most_grpc:
        log.info(
            "this process may open %d files: it holds at most %d workers' connections at once, not %d; raise the limit "
            "(ulimit -n)",
            soft,
            grpc,
            most_grpc,
        )
    return Shares(http, grpc, grpc)


class Spare:
    """Descriptors that nobody uses, to be let go when one is needed and there are none."""

    def __init__(self, count: int = RESERVED) -> None:
        self._count = count
        self._held: list[int] = []

    def refill(self) -> None:
        """Hold as many as there should be, or as there are."""
        with contextlib.suppress(OSError):
            while len(self._held) < self._count:
                self._held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def let_go(self) -> bool:
        """Make room for one; whether there was one to let go."""
        if self._held:
            os.close(self._held.pop())
            return True
        return False

    def close(self) -> None:
        """Hold none any more."""
        while self.let_go():
            pass
