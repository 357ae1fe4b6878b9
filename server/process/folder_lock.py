"""The lock on a data folder: one process at a time uses it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path


class DataFolderLocked(RuntimeError):
    """Another server uses the data folder."""


def lock_folder(folder: Path) -> int:
    """Lock the data folder for as long as the returned descriptor is open.

    DataFolderLocked if another server has it. OSError if the folder's `lock` is not a regular file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    # O_NONBLOCK: a FIFO in its place must not block the open
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    lock = os.open(path, flags, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(lock).st_mode):
            raise OSError(errno.EINVAL, f"{path} is not a regular file")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise DataFolderLocked(f"another server uses {folder}; stop it, or choose another folder") from error
    except BaseException:
        os.close(lock)
        raise
    return lock
