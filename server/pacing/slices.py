"""A new file that is written in slices, each past the page cache, at a pace; its digest is taken on the way.

The cache would be filled with what nobody reads soon, and its flushing stalls whoever writes or forces another file. Where a
disk does not take such writes, and for the rest behind the last whole page, the cache is used.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path
from typing import Final, Self

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..process.memory import take
from .pace import Pace

SLICE_BYTES: Final = 4 << 20
PAGE_BYTES: Final = 4096


class SlicedFile:
    """A file that is being written, from its beginning. Use it in a `with` block; `finish` makes it whole."""

    def __init__(self, path: Path, size_bytes: int, pace: Pace) -> None:
        """OSError."""
        self._path = path
        self._size_bytes = size_bytes
        self._pace = pace
        self._digest = xxhash.xxh3_128()
        self._at = self._filled = 0
        self._slice = take(min(size_bytes, SLICE_BYTES) or 1, torch.uint8, f"a slice of {path.name}").numpy()
        self._begun_s = time.monotonic()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o600)
        self._direct = self._opened_direct() if size_bytes >= SLICE_BYTES else -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (self._file, self._direct):
            if descriptor >= 0:
                os.close(descriptor)

    def append(self, part: Tensor | bytes) -> None:
        """Write what comes next. OSError."""
        if isinstance(part, bytes):
            content = np.frombuffer(part, np.uint8)
        else:
            content = part.reshape(-1).view(torch.uint8).numpy() if part.numel() else np.empty(0, np.uint8)
        while content.size:
            count = min(content.size, self._slice.size - self._filled)
            np.copyto(self._slice[self._filled : self._filled + count], content[:count])
            self._filled += count
            content = content[count:]
            if self._filled == self._slice.size:
                self._write()

    def finish(self) -> str:
        """Force the file, which has its whole length, to the disk. The xxh3_128 of its bytes. OSError."""
        self._write()
        if self._at != self._size_bytes:
            raise OSError(errno.EIO, f"{self._at} bytes in place of {self._size_bytes}", str(self._path))
        os.fsync(self._file)
        return str(self._digest.hexdigest())

    def _write(self) -> None:
        content = self._slice.data[: self._filled]
        self._digest.update(content)
        whole = self._filled // PAGE_BYTES * PAGE_BYTES if self._direct >= 0 else 0
        if whole and not self._written_direct(content[:whole]):
            whole = 0
        _write(self._file, content[whole:], self._at + whole)
        written, self._filled = self._filled, 0
        self._at += written
        self._pace.rest(time.monotonic() - self._begun_s, written)
        self._begun_s = time.monotonic()

    def _written_direct(self, content: memoryview) -> bool:
        try:
            _write(self._direct, content, self._at)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            os.close(self._direct)  # the disk asks for another alignment
            self._direct = -1
            return False
        return True

    def _opened_direct(self) -> int:
        with contextlib.suppress(OSError):
            return os.open(self._path, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)
        return -1


def _write(descriptor: int, content: memoryview, at: int) -> None:
    """Write all of it, however few bytes the disk takes at a time. OSError."""
    while content:
        written = os.pwrite(descriptor, content, at)
        at += written
        content = content[written:]
