"""One repeated field of a protobuf message as an array: millions of numbers without an object for each, and without the GIL.

They are counted first, so that a caller can refuse them, or set memory aside, before any is made.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .kernel_cache import compiled
from .varint_kernels import IS_MESSAGE, NUMBERS, REST_BYTES, SIGNATURE, read

_NO_NUMBERS: Final[NDArray[np.uint64]] = np.empty(0, np.uint64)
_NO_BYTES: Final[NDArray[np.uint8]] = np.empty(0, np.uint8)


class Varints:
    """The numbers of one field of a message, and the message without them."""

    def __init__(self, message: bytes, field: int) -> None:
        """ValueError if the bytes are no message."""
        self._message = np.frombuffer(message, np.uint8)
        self._kernel = compiled(read, SIGNATURE, field)
        found = self._read(_NO_NUMBERS, _NO_BYTES)
        if not found[IS_MESSAGE]:
            raise ValueError("not a protobuf message")
        self.count = int(found[NUMBERS])
        rest = np.empty(int(found[REST_BYTES]), np.uint8)
        if rest.size:
            self._read(_NO_NUMBERS, rest)
        # the other fields, in their order
        self.rest = rest.tobytes()

    def numbers(self) -> NDArray[np.uint64]:
        """The numbers, in their order: eight bytes for each."""
        made = np.empty(self.count, np.uint64)
        if made.size:
            self._read(made, _NO_BYTES)
        return made

    def _read(self, numbers: NDArray[np.uint64], rest: NDArray[np.uint8]) -> NDArray[Any]:
        found = np.zeros(3, np.int64)
        self._kernel(self._message, numbers, rest, found)
        return found
