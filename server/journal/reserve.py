"""Room on the disk that is set aside behind the end of a journal's file, for records that come whatever the disk has left.

Blocks are allocated beyond the end of the file and do not change its length, so a reader never sees them. They keep other
programs, and other models, from taking the last room. A disk that cannot allocate so reserves nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

RESERVE_BYTES: Final = 2 << 20
# Edits and joins, which can be refused, leave so much to what cannot: leaves, ends of leases, outcomes of pushes.
FLOOR_BYTES: Final = 512 << 10
# Below this more is set aside, so a small record costs no call of its own.
LOW_BYTES: Final = 1 << 20
_KEEP_SIZE: Final = 1
_UNKNOWN: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_C: Final = ctypes.CDLL(None, use_errno=True)
_C.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Reserve:
    """What is set aside in one file. The end of the file is told by its writer."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._stop = 0
        # False once the disk has said that it cannot
        self.is_possible = True

    def left_bytes(self, end: int) -> int:
        """Bytes set aside behind `end`."""
        return max(0, self._stop - end)

    def extend(self, end: int) -> None:
        """Have RESERVE_BYTES behind `end`, or at least LOW_BYTES.

        OSError if the disk has no room for them; what was set aside stays.
        """
        try:
            self._extend(end, end + RESERVE_BYTES)
        except OSError:
            self._extend(end, end + LOW_BYTES)

    def _extend(self, end: int, stop: int) -> None:
        begin = max(end, self._stop)
        if stop <= begin or not self.is_possible:
            return
        if _C.fallocate(self._descriptor, _KEEP_SIZE, begin, stop - begin) != 0:
            number = ctypes.get_errno()
            if number in _UNKNOWN:
                self.is_possible = False
                return
            raise OSError(number, os.strerror(number))
        self._stop = stop
