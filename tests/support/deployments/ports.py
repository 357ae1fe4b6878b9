"""Ports for processes that must be told theirs before they start.

They lie below those that the kernel gives to whoever asks for any port or connects: with thousands of connections in
other tests, a port from there is somebody else's a moment later.
"""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

LOWEST = 10_000
_GIVEN_BY_KERNEL = Path("/proc/sys/net/ipv4/ip_local_port_range")
# the same seed in every process of the tests would give each the same ports
_chance = random.SystemRandom()


def free_port(neighbours: int = 0) -> int:
    """A port that nobody has, nor any of so many above it."""
    end = int(_GIVEN_BY_KERNEL.read_text().split()[0])
    while True:
        first = _chance.randrange(LOWEST, end - neighbours)
        try:
            with contextlib.ExitStack() as held:
                for port in range(first, first + neighbours + 1):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
        except OSError:
            continue
        return first
