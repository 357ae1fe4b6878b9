"""Where the snapshots of one model lie: as folders of files in the data folder, or in a store of objects elsewhere.

A snapshot is always written into the data folder first, whole and durable. `FolderStore` leaves it there.
`server/remote/object_store.py` is the other implementation: it sends each snapshot on, and reads from there what the data
folder does not have. `Catalog.folder` decides which of the two a server has.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from . import files


class Source(Protocol):
    """A file that is being read, from its beginning."""

    size_bytes: int

    def readinto(self, block: memoryview) -> int:
        """Read what comes next; the number of bytes, 0 at the end. OSError, SnapshotsAway."""


class Store(Protocol):
    """The snapshots of one model, by id. Every method blocks.

    Each raises OSError for what the disk or the store says of one file, and SnapshotsAway while the store does not answer.
    """

    # where snapshots are written
    folder: Path
    # True if whoever reads asks this machine's disk alone
    is_local: bool

    def names(self) -> list[str]:
        """The names of what is there, of snapshots and of other things."""

    def holds(self, snapshot: str) -> bool:
        """True if there is something of this name."""

    def size_of(self, snapshot: str, file: str) -> int:
        """The length of a snapshot's file."""

    def opened(self, snapshot: str, file: str) -> AbstractContextManager[Source]:
        """A snapshot's file, for the length of a block."""

    def was_verified(self, snapshot: str) -> bool:
        """True if every byte of it was verified so lately that its files' lengths are enough."""

    def remove(self, snapshot: str) -> None:
        """Remove a snapshot. A half-removed one never looks like a whole one."""

    def removing(self) -> Iterable[str]:
        """Snapshots that are being removed: until they are gone, no other has their name."""

    def unsent(self) -> Sequence[str]:
        """The snapshots that are not yet where they are kept."""


class FileSource:
    """A file on a disk."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size_bytes = os.fstat(descriptor).st_size

    def readinto(self, block: memoryview) -> int:
        """OSError."""
        return os.readv(self._descriptor, [block])


@contextmanager
def opened_file(path: Path) -> Iterator[FileSource]:
    """A regular file as a source. OSError, at once, for anything else."""
    with files.opened(path) as descriptor:
        yield FileSource(descriptor)


def read_whole(source: Source, limit_bytes: int) -> bytes:
    """All of a file that is not long. OSError if it is longer than `limit_bytes`."""
    if source.size_bytes > limit_bytes:
        raise OSError(errno.EFBIG, f"longer than {limit_bytes} bytes")
    content = memoryview(bytearray(source.size_bytes + 1))  # one more, which a file that grows would fill
    filled = 0
    while filled < len(content) and (count := source.readinto(content[filled:])):
        filled += count
    if filled > source.size_bytes:
        raise OSError(errno.EFBIG, "longer than it was when it was opened")
    return bytes(content[:filled])


class FolderStore:
    """Snapshots that stay in the data folder."""

    is_local = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """OSError."""
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            return []

    def holds(self, snapshot: str) -> bool:
        """Also if it is no folder."""
        return os.path.lexists(self.folder / snapshot)

    def size_of(self, snapshot: str, file: str) -> int:
        """OSError, also for what is no regular file."""
        return files.size_of(self.folder / snapshot / file)

    def opened(self, snapshot: str, file: str) -> AbstractContextManager[Source]:
        """OSError, also for what is no regular file."""
        return opened_file(self.folder / snapshot / file)

    def was_verified(self, snapshot: str) -> bool:
        """Never: a disk may lose any byte at any time."""
        return False

    def remove(self, snapshot: str) -> None:
        """OSError."""
        trash = self.folder / f"tmp-{uuid.uuid4().hex}"
        # renamed first, so that a half-deleted snapshot never looks like a whole one
        os.replace(self.folder / snapshot, trash)
        files.remove(trash)
        files.fsync(self.folder)

    def removing(self) -> Iterable[str]:
        """None: a rename removes them at once."""
        return ()

    def unsent(self) -> Sequence[str]:
        """None: each is where it is kept once it is written."""
        return ()
