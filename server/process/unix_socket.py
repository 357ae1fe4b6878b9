"""A path at which this process listens: taken only if nothing is lost by that, removed only while it is ours.

Binding a Unix socket needs a path that does not exist, so a server must remove the socket that a dead one left. It
removes nothing else: no other kind of file, no other user's socket, no socket at which a process listens. gRPC itself
unlinks whatever lies at the path, before it binds and when it stops. So the socket is bound under a name of its own, and
moved to the path afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from typing import Final

log = logging.getLogger("pushstep.unix")
# How long to wait for the folder's lock. Other servers hold it while they bind a socket.
LOCK_S: Final = 5.0


class UnixSocket:
    """One path. Use it on the event loop or before that runs: its file operations are short."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._own: tuple[int, ...] | None = None

    @contextlib.contextmanager
    def taken(self) -> Iterator[str]:
        """A block in which to bind and listen at the name that it yields. OSError if the path cannot be had.

        After the block the socket lies at the path, for this user alone.
        """
        folder = os.open(os.path.dirname(self.path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        old_mask = os.umask(0o177)
        try:
            _lock(folder, self.path)
            _require_free(self.path)
            # through the descriptor, so that the name is short however long the folder's path is
            bound = f"/proc/self/fd/{folder}/.{secrets.token_hex(4)}"
            yield bound
            os.link(bound, self.path)
            os.unlink(bound)
            self._own = _identity(self.path)
        finally:
            os.umask(old_mask)
            os.close(folder)

    def release(self) -> None:
        """Remove the socket, unless something else lies at the path by now."""
        own, self._own = self._own, None
        with contextlib.suppress(OSError):
            if own is not None and _identity(self.path) == own:
                os.unlink(self.path)


def _identity(path: str) -> tuple[int, ...]:
    """What identifies the socket at a path.

    A removed socket's inode number is used again, but with another mtime.
    """
    status = os.lstat(path)
    return status.st_mode, status.st_dev, status.st_ino, status.st_mtime_ns


def _lock(folder: int, path: str) -> None:
    """Lock the folder; waits at most LOCK_S. No path that another server has found free may be taken."""
    until_s = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR):
                return  # a file system without locks
            if time.monotonic() > until_s:
                log.warning("the folder of %s is locked by another process: going on without", path)
                return
        time.sleep(0.01)


def _require_free(path: str) -> None:
    """OSError unless nothing lies at the path; the socket of a dead server of this user is removed."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise OSError(
            errno.EEXIST, f"{path} is no socket: choose another path with --unix, or remove it yourself"
        )
    if status.st_uid != os.geteuid():
        raise OSError(errno.EPERM, f"{path} is another user's socket: choose another path with --unix")
    if _somebody_listens(path):
        raise OSError(errno.EADDRINUSE, f"another process listens at {path}: choose another path with --unix")
    os.unlink(path)


def _somebody_listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return True  # its queue of connections is full
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True
