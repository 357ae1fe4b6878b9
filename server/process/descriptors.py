"""How many files this process may open, and how many each door may have.

Most of them are connections. The doors get fewer than there are, so that snapshots can always be written. A few
descriptors are held in reserve and closed when none is left, so that an operator can always connect.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
from dataclasses import dataclass
from typing import Final

log = logging.getLogger("pushstep.service")

# Files that are not connections: the listeners, snapshots and exports under way, kernels, the log.
OWN_FILES: Final = 128
MOST_HTTP: Final = 1000
# Of workers: who has fewer to give is told so when the server starts.
FEW_CONNECTIONS: Final = 1000
RESERVED: Final = 16


@dataclass(frozen=True, slots=True)
class Shares:
    """How many connections each door holds at once."""

    http: int
    grpc: int
    # local sockets, over which memory is shared
    local: int


def shared_out(most_grpc: int) -> Shares:
    """Raise this process's limit as far as allowed, and share it out.

    `most_grpc`: the most for gRPC in any case.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # some systems refuse their own hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    if soft == resource.RLIM_INFINITY:
        return Shares(MOST_HTTP, most_grpc, most_grpc)
    free = max(64, soft - OWN_FILES - RESERVED)
    http = min(MOST_HTTP, free // 4)
    # a worker on this host has a gRPC connection and a local socket
    grpc = min(most_grpc, (free - http) // 2)
    if grpc < most_grpc:
        log.log(
            logging.INFO if grpc < FEW_CONNECTIONS else logging.DEBUG,
            "this process may open %d files: it holds at most %d workers' connections at once, not %d; raise the limit "
            "(ulimit -n)",
            soft,
            grpc,
            most_grpc,
        )
    return Shares(http, grpc, grpc)


class Spare:
    """Descriptors in reserve: one is closed when one is needed and none is left."""

    def __init__(self) -> None:
        self._held: list[int] = []

    def refill(self) -> None:
        """Hold as many as there should be, or as many as can be opened."""
        with contextlib.suppress(OSError):
            while len(self._held) < RESERVED:
                self._held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def let_go(self) -> bool:
        """Close one of them. False if there is none."""
        if self._held:
            os.close(self._held.pop())
            return True
        return False

    def close(self) -> None:
        """Close all of them."""
        while self.let_go():
            pass
