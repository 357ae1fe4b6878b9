"""What is counted of the whole server: bytes on each way in and out, refusals of both doors, the event loop's lag."""

from __future__ import annotations

from typing import Final

from .histogram import SECONDS, Histogram

WORKERS_DOOR: Final = "workers"
OPERATORS_DOOR: Final = "operators"


class Way:
    """One way in and out, and the bytes that went along it."""

    __slots__ = ("received_bytes", "sent_bytes")

    def __init__(self) -> None:
        self.received_bytes = 0
        self.sent_bytes = 0


class ServerCounts:
    """Owned by the catalogue of models. Only the event loop writes."""

    def __init__(self) -> None:
        # what gRPC carried over TCP and over the Unix socket, what was read and written in shared memory, and REST's
        self.tcp, self.unix, self.shared_memory, self.http = Way(), Way(), Way(), Way()
        # answers that were errors, by (door, code)
        self.refusals: dict[tuple[str, str], int] = {}
        self.loop_lag = Histogram(SECONDS)

    def refused(self, door: str, code: str) -> None:
        """Count an answer that was an error."""
        self.refusals[door, code] = self.refusals.get((door, code), 0) + 1

    def way_of(self, peer: str) -> Way:
        """The way of a gRPC call, by gRPC's text for its peer."""
        return self.unix if peer.startswith("unix:") else self.tcp
