"""One server process after the other, on the same data, ports and models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.servers.harness import start_server


class Host:
    """The server that runs now, with short leases."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self.server = start_server(data, "--lease-s", "2")
        self.restarts = 0

    def restart(self) -> None:
        """SIGTERM, and another."""
        where = ("--grpc", self.server.grpc, "--http", self.server.http)
        assert self.server.stop() == 0
        self.server = start_server(self._data, "--lease-s", "2", *where)
        self.restarts += 1


@contextmanager
def hosted(data: Path) -> Iterator[Host]:
    host = Host(data)
    try:
        yield host
    finally:
        if host.server.process.poll() is None:
            assert host.server.stop() == 0
