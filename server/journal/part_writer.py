"""Writes the parts of a record at their places in a file: large ones past the page cache, the others through it."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

PAGE_BYTES: Final = 4096
# Parts of this size are written past the page cache. 64 MB took 24 ms so, and were on the disk then; through fresh pages of
# the cache they took 170 ms, and 20 ms more for the fsync (benchmark `durability`).
DIRECT_BYTES: Final = 1 << 20
# A disk takes memory that is aligned to its blocks.
BLOCK_BYTES: Final = 512
# The most buffers that one system call takes.
_BUFFERS: Final = 1024
Bytes = bytes | memoryview
# Parts that lie one behind the other, and where the first one begins.
Run = tuple[int, list[Bytes]]


class PartWriter:
    """Writes to one file, by two descriptors. Only one thread at a time writes."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """`descriptor`: of the file, which its owner closes."""
        self._descriptor = descriptor
        self._direct = _opened_direct(path)

    def divided(self, at: int, parts: Sequence[Bytes]) -> tuple[list[Run], list[Run]]:
        """Runs of parts that follow one another from `at` on: those for past the page cache, and the others.

        The first of the others begins at `at`. Large parts go past the page cache where the disk takes them so.
        """
        direct: list[Run] = []
        buffered: list[Run] = [(at, [])]
        for part in parts:
            if self._direct >= 0 and _may_be_direct(part, at):
                whole = nbytes_of(part) // PAGE_BYTES * PAGE_BYTES
                direct.append((at, [memoryview(part)[:whole]]))
                buffered.append((at + whole, [memoryview(part)[whole:]]))
            else:
                buffered[-1][1].append(part)
            at += nbytes_of(part)
        return direct, buffered

    def write_direct(self, runs: Sequence[Run]) -> None:
        """Write past the page cache, if the disk takes that. OSError."""
        for at, run in runs:
            try:
                _write(self._direct if self._direct >= 0 else self._descriptor, run, at)
            except OSError as error:
                if error.errno != errno.EINVAL or self._direct < 0:
                    raise
                os.close(self._direct)  # the disk asks for another alignment
                self._direct = -1
                _write(self._descriptor, run, at)

    def write(self, runs: Sequence[Run]) -> None:
        """Write through the page cache. OSError."""
        for at, run in runs:
            _write(self._descriptor, run, at)

    def close(self) -> None:
        """Close the descriptor that is its own."""
        if self._direct >= 0:
            os.close(self._direct)


def nbytes_of(part: Bytes) -> int:
    """The bytes of a part."""
    return len(part) if isinstance(part, bytes) else part.nbytes


def _opened_direct(path: Path) -> int:
    """A descriptor that writes past the page cache; -1 if the file's disk has none."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return -1


def _may_be_direct(part: Bytes, at: int) -> bool:
    if nbytes_of(part) < DIRECT_BYTES or at % PAGE_BYTES or isinstance(part, bytes):
        return False
    return int(np.frombuffer(part, np.uint8).ctypes.data) % BLOCK_BYTES == 0


def _write(descriptor: int, parts: Sequence[Bytes], at: int) -> None:
    """Write all parts, one behind the other, however few bytes the disk takes at a time. OSError."""
    left = [memoryview(part).cast("B") for part in parts if nbytes_of(part)]
    while left:
        written = os.pwritev(descriptor, left[:_BUFFERS], at)
        at += written
        while left and written >= left[0].nbytes:
            written -= left.pop(0).nbytes
        if left:
            left[0] = left[0][written:]
