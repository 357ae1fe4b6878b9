"""Tells a service manager what state this process is in, by systemd's protocol (sd_notify).

The manager names a datagram socket in NOTIFY_SOCKET; without that, nobody is told. A unit of Type=notify counts as started
only once READY=1 is said, so what is ordered after it finds a server that takes work.
"""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger("pushstep.service")


def tell_manager(state: str) -> None:
    """Send a state, such as READY=1. A manager that cannot be reached is logged, and hinders nothing."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # an abstract address begins with a zero byte
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as manager:
            manager.sendto(state.encode(), address)
    except OSError as error:
        log.warning("the service manager is not told %s: %s", state, error)
