"""Files of the data folder: read only if regular and not longer than expected, replaced durably, removed.

Anyone with access to the folder can put anything there: a FIFO, whose opening waits for ever, a device, a link to
somewhere else, a file without end. `opened` checks the kind of file before anything is read.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import logging
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pushstep.proto.errors import DiskFull, OutOfMemory, PushstepError, StorageFailed

log = logging.getLogger("pushstep.files")
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_OURS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a regular file, for the length of a block. OSError, at once, for anything else."""
    # checked before it is opened too, because opening a device may have effects
    _require_regular(path, os.lstat(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(path, os.fstat(descriptor))
        yield descriptor
    finally:
        os.close(descriptor)


def _require_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def size_of(path: Path) -> int:
    """A regular file's length. OSError for anything else."""
    found = os.lstat(path)
    _require_regular(path, found)
    return found.st_size


def read_small(path: Path, limit_bytes: int) -> bytes:
    """The content of a regular file. OSError, also if it is longer than `limit_bytes`."""
    with opened(path) as descriptor:
        parts, left = [], limit_bytes + 1
        while left > 0 and (part := os.read(descriptor, min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
    if left <= 0:
        raise OSError(errno.EFBIG, f"longer than {limit_bytes} bytes", str(path))
    return b"".join(parts)


def is_ours(error: OSError) -> bool:
    """True if this process lacks something (descriptors, memory), so that the file is not at fault."""
    return error.errno in _OURS


def unreadable(name: str, error: OSError) -> PushstepError:
    """The error for a file that cannot be read: StorageFailed. `name`: its path below the data folder."""
    problem = reason(error)
    return StorageFailed(f"cannot read {name}: {problem}", path=name, problem=problem)


def refusal(name: str, error: Exception, folder: Path, need_bytes: int = 0) -> PushstepError:
    """The error for a write that the disk of `folder` has refused.

    `name`: the file's path below the data folder. OutOfMemory, DiskFull, or StorageFailed for any other reason.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOMEM:
        return OutOfMemory(what=name, need=need_bytes)
    if number not in _FULL:
        return StorageFailed(path=name, problem=reason(error))
    free: int | str = "an unknown number of bytes"
    with contextlib.suppress(OSError):
        disk = os.statvfs(folder)
        free = disk.f_bavail * disk.f_frsize
    return DiskFull(path=name, need=need_bytes, free=free, problem=reason(error))


def asked(path: Path, need_bytes: int, error: Exception) -> OSError:
    """Why torch could not write so many bytes: the disk's own error when it is asked for the room.

    torch has no error class for a full disk, and the text of an error may change.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, max(need_bytes, 1))
        finally:
            os.close(descriptor)
    except OSError as found:
        if found.errno in _FULL | _OURS:
            return found
    return OSError(errno.EIO, reason(error), str(path))


def reason(error: Exception) -> str:
    """Why the disk refused, in words and without a path. torch raises a RuntimeError for it."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def fsync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str, name: str) -> None:
    """Replace a small file so that after a crash it holds the old text or the new one.

    StorageFailed, with `name`.
    """
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(text)
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise refusal(name, error, path.parent, len(text)) from error


def remove(path: Path) -> None:
    """Remove a file, or a folder with everything in it. A link is removed, not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sweep(folder: Path, pattern: str) -> None:
    """Remove what an interrupted process left behind, by `pattern`.

    What cannot be removed is logged and stays.
    """
    try:
        found = [folder / name for name in os.listdir(folder) if fnmatch.fnmatchcase(name, pattern)]
    except OSError:
        return  # there is no such folder, or it cannot be read: whoever needs it gets that error
    for path in found:
        try:
            remove(path)
        except OSError as error:
            log.warning(
                "%s/%s was left behind and cannot be removed: %s", folder.name, path.name, reason(error)
            )
