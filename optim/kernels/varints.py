"""The kernel behind `ops/varints.py`: one field's numbers from a protobuf message, without objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

# message, ids, rest, found
SIGNATURE: Final = "void(Array(uint8, 1, 'C', True, aligned=True), uint64[::1], uint8[::1], int64[::1])"
NUMBERS, REST_BYTES, IS_MESSAGE = 0, 1, 2
_NUMBER, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def _varint(message: Any, at: int, end: int) -> tuple[int, int]:
    """The number at `at` and the position behind it; 0 and -1 if it does not end before `end`."""
    value, shift = 0, 0
    while at < end and shift <= 63:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
    return 0, -1


def read(field: int) -> Callable[..., None]:
    """Make `kernel(message, numbers, rest, found)`, which reads the varints of a repeated field.

    The field may be packed or not. found: how many varints there are, how many bytes the other fields take, and
    whether the message is valid. The kernel writes the varints to `numbers`, and the other fields unchanged to `rest`,
    as far as there is room. So a call with empty arrays only counts.
    """
    from numba.extending import register_jitable

    varint: Any = register_jitable(_varint)

    def kernel(message: Any, numbers: Any, rest: Any, found: Any) -> None:
        size = message.size
        at, count, kept = 0, 0, 0
        found[IS_MESSAGE] = 0
        while at < size:
            begin = at
            # what follows the tag, if anything: a varint's value, or a length
            number = 0
            tag, at = varint(message, at, size)
            if at < 0:
                return
            kind = tag & 7
            if kind in (_NUMBER, _BYTES):
                number, at = varint(message, at, size)
                if at < 0:
                    return
            if kind == _FIXED64:
                at += 8
            elif kind == _FIXED32:
                at += 4
            elif kind == _BYTES:
                if number < 0 or number > size - at:
                    return
            elif kind != _NUMBER:
                return
            if tag >> 3 == field and kind == _NUMBER:
                if count < numbers.size:
                    numbers[count] = number
                count += 1
            elif tag >> 3 == field and kind == _BYTES:
                end = at + number
                while at < end:
                    number, at = varint(message, at, end)
                    if at < 0:
                        return
                    if count < numbers.size:
                        numbers[count] = number
                    count += 1
            else:
                if kind == _BYTES:
                    at += number
                if at > size:
                    return
                if kept < rest.size:
                    rest[kept : kept + at - begin] = message[begin:at]
                kept += at - begin
        found[NUMBERS], found[REST_BYTES], found[IS_MESSAGE] = count, kept, 1

    return kernel
