"""Closes the sessions that are still open when the process ends in the usual way.

A thread that is in C++ code while the interpreter shuts down aborts the process. So the end of the process waits for
what a session has under way, or breaks it off.
"""

from __future__ import annotations

import os
import weakref
from multiprocessing.util import Finalize
from typing import Final, Protocol

# How long a server that does not answer may delay the end of the process.
EXIT_S: Final = 5.0


class Closing(Protocol):
    """Anything that has to end before the process does: a session or a heartbeat."""

    def close_within(self, seconds: float) -> None:
        """End it, within that time if the server does not answer."""


_open: Final[weakref.WeakSet[Closing]] = weakref.WeakSet()
_registered_in: set[int] = set()


def close_at_exit(session: Closing) -> None:
    """Close `session` at the end of this process if it still exists then. Only a weak reference is kept."""
    _open.add(session)
    if os.getpid() not in _registered_in:
        _registered_in.add(os.getpid())
        # not atexit: children of multiprocessing do not run its functions
        Finalize(None, _close_all, exitpriority=0)


def _close_all() -> None:
    for session in list(_open):
        session.close_within(EXIT_S)
