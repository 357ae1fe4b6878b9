"""Refused tokens, counted by the address that they came from.

A right token is let in however many wrong ones came from its address: whoever shares an address with a flood is not
shut out with it. Only the refusals change: beyond FREE_ATTEMPTS, and PER_S more each second, an address is told to stop, and
its connection ends.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Callable
from typing import Final

from .sinking_counts import SinkingCounts

log = logging.getLogger("pushstep.access")
# Enough for a thousand workers at one address whose token was taken back; a flood brings as many in a second.
FREE_ATTEMPTS: Final = 1000
PER_S: Final = 20.0
# Addresses remembered; the one that was refused the longest ago is forgotten first.
MOST_ADDRESSES: Final = 10_000
LOGGED_EVERY_S: Final = 60.0


class Attempts:
    """The refused attempts of each address, as a number that sinks by PER_S each second."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts = SinkingCounts(PER_S, MOST_ADDRESSES, clock)
        self._unlogged = 0
        self._logged_s = -LOGGED_EVERY_S

    def wait_s(self, address: str) -> float:
        """Count a refused attempt. How long the address has to wait for its next one; 0.0 if it need not."""
        place = _place(address)
        count = self._counts.of(place) + 1.0
        # what comes beyond the limit is not counted, or a flood would shut its address out for long after its end
        self._counts.note(place, min(count, FREE_ATTEMPTS + 1.0))
        self._log(address)
        return max(0.0, count - FREE_ATTEMPTS) / PER_S

    def _log(self, address: str) -> None:
        self._unlogged += 1
        now_s = self._clock()
        if now_s - self._logged_s >= LOGGED_EVERY_S:
            log.warning("refused for want of a token: %d requests, the last from %s", self._unlogged, address)
            self._unlogged, self._logged_s = 0, now_s


def _place(address: str) -> str:
    """An address; of IPv6 the network, since a host has 2^64 addresses of its own."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address[:100]
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is None:
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)
