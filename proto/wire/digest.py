"""The digest of a body: the segments' payloads one after the other, as `frames.py` sends them.

It is xxh3-64 over the segment table and then the body, as it is sent. The table says what the bytes mean; without it
other gradients of the same bytes would have the same digest. Per segment, little-endian: arena u32, form u8, dtype u8 (the enum's number),
length of the state's name u16, start u64, stop u64, count u64, and the state's name in UTF-8. The form is 0 for a
dense segment, 1 for a row-sparse one (count: its rows), 2 for an element-sparse one (count: its elements) and 3 for
an empty one (count: its parameter's index).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import xxhash

from ..types_pb2 import Segment

_TABLE_ROW: Final = struct.Struct("<IBBHQQQ")


class BodyDigest:
    """xxh3-64 over a segment table and then the body, which is given piece by piece."""

    def __init__(self, segments: Sequence[Segment] | bytes) -> None:
        """`segments`: or their table, if it is known."""
        self._hash = xxhash.xxh3_64(segments if isinstance(segments, bytes) else segment_table(segments))

    def update(self, payload: memoryview | bytes) -> None:
        """Add the next bytes of the body."""
        self._hash.update(payload)

    @property
    def value(self) -> int:
        """The digest so far; never 0, which stands for "not given"."""
        return self._hash.intdigest() or 1


def segment_table(segments: Sequence[Segment]) -> bytes:
    """What goes into a body's digest before its bytes; the module's docstring has the format."""
    table = []
    for s in segments:
        counts = (s.HasField("rows"), s.HasField("elements"), s.HasField("parameter"))
        form = counts.index(True) + 1 if True in counts else 0
        state = s.state.encode()
        row = (s.arena, form, s.dtype, len(state), s.start, s.stop, s.rows or s.elements or s.parameter)
        table.append(_TABLE_ROW.pack(*row) + state)
    return b"".join(table)
