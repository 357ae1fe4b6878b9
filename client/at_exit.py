"""Sessions that are open when the process ends in the usual way leave then, as if they had been closed.

Threads that are in C++ code when the interpreter goes end the process with an abort, so whatever a session has under
way is waited for, or broken off.
"""

from __future__ import annotations

import os
import weakref
from multiprocessing.util import Finalize
from typing import Final, Protocol

# How long the end of a process may take for a server that does not answer.
EXIT_S: Final = 5.0


class Closing(Protocol):
    """What is to be ended."""

    def close_within(self, seconds: float) -> None:
        """End it."""


_open: Final[weakref.WeakSet[Closing]] = weakref.WeakSet()
_registered_in: set[int] = set()


def close_at_exit(session: Closing) -> None:
    """Have a session closed at the end of this process, unless it is by then."""
    _open.add(session)
    if os.getpid() not in _registered_in:
        _registered_in.add(os.getpid())
        # not atexit's: the children of multiprocessing do not run those
        Finalize(None, _close_all, exitpriority=0)


def _close_all() -> None:
    for session in list(_open):
        session.close_within(EXIT_S)
