"""Reads a repeated field of a protobuf message into an array, without the GIL or an object per number.

There may be millions of numbers. They are counted first, so that a caller can refuse them or reserve memory before the
array is made.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..kernels.cache import compiled
from ..kernels.varints import IS_MESSAGE, NUMBERS, REST_BYTES, SIGNATURE, read

_NO_NUMBERS: Final[NDArray[np.uint64]] = np.empty(0, np.uint64)
_NO_BYTES: Final[NDArray[np.uint8]] = np.empty(0, np.uint8)


class Varints:
    """The numbers of one field of a message, their count, and the rest of the message."""

    def __init__(self, message: bytes, field: int) -> None:
        """Count the field's numbers. ValueError if the bytes are not a protobuf message."""
        self._message = np.frombuffer(message, np.uint8)
        self._kernel = compiled(read, SIGNATURE, field)
        found = self._read(_NO_NUMBERS, _NO_BYTES)
        if not found[IS_MESSAGE]:
            raise ValueError("not a protobuf message")
        self.count = int(found[NUMBERS])
        rest = np.empty(int(found[REST_BYTES]), np.uint8)
        if rest.size:
            self._read(_NO_NUMBERS, rest)
        # the message's other fields, in their order
        self.rest = rest.tobytes()

    def numbers(self) -> NDArray[np.uint64]:
        """The numbers, in their order, as a new uint64 array."""
        made = np.empty(self.count, np.uint64)
        if made.size:
            self._read(made, _NO_BYTES)
        return made

    def _read(self, numbers: NDArray[np.uint64], rest: NDArray[np.uint8]) -> NDArray[Any]:
        found = np.zeros(3, np.int64)
        self._kernel(self._message, numbers, rest, found)
        return found
