"""The frame codec: bulk bytes in and out of messages that every protobuf library can read.

A chunk is a message whose fields are `segment`, `offset` and, last, `payload`. This codec writes it by hand: a
constant 24 bytes, then the payload. So sending costs one cast-and-copy into the message, and receiving costs no copy:
the payload is a view of the message that gRPC handed over. Lengths are five-byte varints (legal, if not the
shortest), which keep the prefix constant and the payload at a multiple of 8 bytes. protobuf's own form of a chunk is
read without a copy, too. protobuf parses a message in any other legal form.

A body is the segments' payloads one after the other, as types.proto lays them out. `digest.py` has its digest.

Precision of a float32 by wire dtype, rounded to nearest, halves to even: float32 and float64 keep everything; bfloat16
keeps 8 bits and the whole range; float16 keeps 11 bits between 6e-8 and 65504 and is infinite above. int8 keeps each
element within half a scale; a scale is 1/127 of the largest magnitude in a block of 256 elements (exact arithmetic:
`optim/kernels/quantise.py`). The sender of int8 adds what was lost to the next gradient.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, Self, TypeVar

import numpy as np
import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from ..errors import MalformedFrame, MessageTooLarge, WrongLength
from .buffers import TakeMessage, copy_elements, fresh_message
from .digest import BodyDigest as BodyDigest
from .digest import segment_table as segment_table

# 64 MiB each way take 37 and 33 ms; with 256 KiB or 4 MiB per chunk they take longer.
CHUNK_BYTES: Final = 2 << 20
# The largest chunk that a receiver accepts. Other clients may choose their own size up to this.
MAX_CHUNK_BYTES: Final = 4 << 20
# The limit of every message, also of one with a header: a chunk plus slack.
MAX_MESSAGE_BYTES: Final = MAX_CHUNK_BYTES + (64 << 10)
# A segment of up to this size is joined from where its pieces lie, where they need no cast.
JOINED_BYTES: Final = 64 << 10
# A call of TakeSteps that waits for its next push for so long is ended by the server. The client opens another one well before.
IDLE_S: Final = 60.0
# gRPC's own limit is higher, so that a message somewhat above ours still gets a named error.
TRANSPORT_LIMIT_BYTES: Final = 2 * MAX_MESSAGE_BYTES

_PREFIX: Final = struct.Struct("<BQBQB5B")
_SEGMENT_TAG: Final = 2 << 3 | 1
_OFFSET_TAG: Final = 3 << 3 | 1
_PAYLOAD_TAG: Final = 15 << 3 | 2
_CHUNK_BEGINS: Final = frozenset(bytes([tag]) for tag in (_SEGMENT_TAG, _OFFSET_TAG, _PAYLOAD_TAG))


class BulkMessage(Protocol):
    """The fields and methods that PushRequest, PullResponse and UploadRequest have in common."""

    segment: int
    offset: int
    payload: bytes

    @classmethod
    def FromString(cls, s: bytes, /) -> Self: ...  # noqa: D102

    def HasField(self, field_name: str, /) -> bool: ...  # noqa: D102


M = TypeVar("M", bound=BulkMessage)
Writer = Callable[[Tensor, int], None]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a segment: `offset` in bytes from the segment's start."""

    segment: int
    offset: int
    payload: memoryview


class Source(Protocol):
    """A stretch of a segment that is to be sent. A chunk may end only between its units of `unit_bytes`."""

    @property
    def nbytes(self) -> int: ...  # noqa: D102

    @property
    def unit_bytes(self) -> int: ...  # noqa: D102

    def writer(self) -> Writer:
        """A function that fills a uint8 tensor with the bytes from a start on. It is called in order."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements to be sent: any tensor, read in row-major order, cast to `dtype` on the way."""

    source: Tensor
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return self.source.numel() * self.dtype.itemsize

    @property
    def unit_bytes(self) -> int:
        """Bytes of one element: a chunk never splits one."""
        return self.dtype.itemsize

    def writer(self) -> Writer:
        """A writer that casts straight into its target."""
        flat, dtype = self.source.detach().reshape(-1), self.dtype

        def write(target: Tensor, start: int) -> None:
            first, count = start // dtype.itemsize, target.numel() // dtype.itemsize
            copy_elements(target.view(dtype), flat[first : first + count])

        return write

    def whole(self) -> memoryview | None:
        """The bytes where they lie, if nothing has to be cast or gathered."""
        source = self.source
        is_there = source.dtype is self.dtype and source.is_cpu and source.is_contiguous()
        if not is_there or not source.numel():  # without elements its stride may be 0
            return None
        return source.detach().reshape(-1).view(torch.uint8).numpy().data


def pack(
    bodies: Iterable[Sequence[Source]],
    digest: BodyDigest | None = None,
    first: int = 0,
    take: TakeMessage = fresh_message,
    chunk_bytes: Callable[[], int] = lambda: CHUNK_BYTES,
    *,
    joined: bool = False,
) -> Iterator[bytes]:
    """The frames of a body: one list of pieces per segment, with the segments numbered from `first`.

    Each piece is read once and cast straight into the frame. `take` gives the memory of a frame. `chunk_bytes` is
    called before each chunk, and gives its largest size. `joined`: a chunk goes on into the segments behind its own.
    """
    if joined:
        for segment, offset, parts in _chunks(enumerate(bodies, first), chunk_bytes):
            yield _frame(segment, offset, parts, digest, take)
        return
    for segment, pieces in enumerate(bodies, first):
        yield from _pack_segment(segment, pieces, digest, take, chunk_bytes)


def _pack_segment(
    segment: int,
    pieces: Sequence[Source],
    digest: BodyDigest | None,
    take: TakeMessage,
    chunk_bytes: Callable[[], int],
) -> Iterator[bytes]:
    size = sum([piece.nbytes for piece in pieces])
    wholes = [p.whole() if isinstance(p, Piece) else None for p in pieces if 0 < size <= JOINED_BYTES]
    if wholes and None not in wholes:  # the way of most small bodies, in a third of the time
        joined = b"".join([_prefix(segment, 0, size), *filter(None, wholes)])
        if digest is not None:
            digest.update(memoryview(joined)[_PREFIX.size :])
        yield joined
        return
    for _, offset, parts in _chunks([(segment, pieces)], chunk_bytes):
        yield _frame(segment, offset, parts, digest, take)


def _frame(
    segment: int,
    offset: int,
    parts: Sequence[tuple[Writer, int, int]],
    digest: BodyDigest | None,
    take: TakeMessage,
) -> bytes:
    size = sum([count for _, _, count in parts])
    frame = take(_PREFIX.size + size)
    with frame.getbuffer() as view:
        view[: _PREFIX.size] = _prefix(segment, offset, size)
        at = _PREFIX.size
        for write, start, count in parts:
            target = torch.frombuffer(view, dtype=torch.uint8, count=count, offset=at)
            write(target, start)
            del target
            at += count
        if digest is not None:
            with view[_PREFIX.size :] as payload:
                digest.update(payload)
    return frame.getvalue()


def _chunks(
    bodies: Iterable[tuple[int, Sequence[Source]]], chunk_bytes: Callable[[], int]
) -> Iterator[tuple[int, int, list[tuple[Writer, int, int]]]]:
    """Where each chunk begins, as (segment, offset), and its parts: (writer, first byte, number of bytes)."""
    parts: list[tuple[Writer, int, int]] = []
    room = chunk_bytes()
    begins = 0, 0
    for segment, pieces in bodies:
        offset = 0
        for piece in pieces:
            write, done = piece.writer(), 0
            while done < piece.nbytes:
                units = max(room // piece.unit_bytes, 0 if parts else 1)
                count = min(piece.nbytes - done, units * piece.unit_bytes)
                if count:
                    begins = begins if parts else (segment, offset)
                    parts.append((write, done, count))
                    done += count
                    offset += count
                    room -= count
                if done < piece.nbytes:
                    yield *begins, parts
                    parts, room = [], chunk_bytes()
    if parts:
        yield *begins, parts


def _prefix(segment: int, offset: int, size: int) -> bytes:
    more = (size >> 7 & 0x7F | 0x80, size >> 14 & 0x7F | 0x80, size >> 21 & 0x7F | 0x80, size >> 28 & 0x7F)
    return _PREFIX.pack(_SEGMENT_TAG, segment, _OFFSET_TAG, offset, _PAYLOAD_TAG, size & 0x7F | 0x80, *more)


def unpack(message: bytes, kind: type[M]) -> tuple[M | None, Chunk | None]:
    """A received message as (fields, chunk), of which one may be None. MalformedFrame, MessageTooLarge."""
    chunk = chunk_of(message)
    if chunk is not None:
        return None, chunk
    rest, payload = split(message)
    try:
        fields = kind.FromString(rest)
    except DecodeError as error:
        raise MalformedFrame(problem=f"not a {kind.__name__}") from error
    return fields, chunk_of_fields(fields, payload)


def chunk_of(message: bytes) -> Chunk | None:
    """The chunk of a message that is nothing else, in this codec's form or protobuf's. MessageTooLarge."""
    if len(message) > MAX_MESSAGE_BYTES:
        raise MessageTooLarge(got=len(message), limit=MAX_MESSAGE_BYTES)
    chunk = _in_constant_form(message) or _in_shortest_form(message)
    return None if chunk is None else _checked(chunk)


def split(message: bytes) -> tuple[bytes, memoryview | None]:
    """The bytes of a bulk message that need parsing, and the payload behind them; None if it does not fill the rest."""
    at = 0
    while at < len(message):
        tag, kind = message[at], message[at] & 7
        start = at + 1
        if kind == 1 and tag < 0x80:  # fixed64
            at = start + 8
            continue
        if kind != 2 or tag >= 0x80:
            break
        length, start = _length(message, start, 5)
        if tag == _PAYLOAD_TAG and start + length == len(message):
            return message[:at], memoryview(message)[start:]
        if tag == _PAYLOAD_TAG:
            break
        at = start + length
    return message, None


def _length(message: bytes, at: int, most_bytes: int) -> tuple[int, int]:
    """A varint of at most `most_bytes` bytes and the index behind it: beyond the message if it is none."""
    value = 0
    for index, byte in enumerate(message[at : at + most_bytes]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    return value, len(message) + 1


def chunk_of_fields(fields: BulkMessage, payload: memoryview | None) -> Chunk | None:
    """The chunk of a message in the parts that `split` gives; None if its payload is empty. MessageTooLarge."""
    found = memoryview(fields.payload) if payload is None else payload
    return _checked(Chunk(fields.segment, fields.offset, found)) if found else None


def _checked(chunk: Chunk) -> Chunk:
    if len(chunk.payload) > MAX_CHUNK_BYTES:
        raise MessageTooLarge(got=len(chunk.payload), limit=MAX_CHUNK_BYTES)
    return chunk


def _in_constant_form(message: bytes) -> Chunk | None:
    if len(message) < _PREFIX.size or message[0] != _SEGMENT_TAG:
        return None
    _, segment, offset_tag, offset, payload_tag, a, b, c, d, e = _PREFIX.unpack_from(message)
    size = a & 0x7F | (b & 0x7F) << 7 | (c & 0x7F) << 14 | (d & 0x7F) << 21 | e << 28
    constant_form = d & 0x80 and e < 0x10 and offset_tag == _OFFSET_TAG
    if not constant_form or payload_tag != _PAYLOAD_TAG or size != len(message) - _PREFIX.size:
        return None
    return Chunk(segment, offset, memoryview(message)[_PREFIX.size :])


def _in_shortest_form(message: bytes) -> Chunk | None:
    """The chunk as protobuf libraries write it: fields that are zero are left out, the length is short."""
    if message[:1] not in _CHUNK_BEGINS:
        return None
    at, places = 0, [0, 0]
    for index, tag in enumerate((_SEGMENT_TAG, _OFFSET_TAG)):
        if at < len(message) and message[at] == tag:
            places[index] = int.from_bytes(message[at + 1 : at + 9], "little")
            at += 9
    if at >= len(message) or message[at] != _PAYLOAD_TAG:
        return None
    size, start = _length(message, at + 1, 4)
    return Chunk(places[0], places[1], memoryview(message)[start:]) if size == len(message) - start else None


class Assembly:
    """A body that is being received: one buffer, filled strictly in order. An incomplete body is never used.

    `lengths` are the segments' byte lengths. Each segment starts at a multiple of 64 bytes in the buffer, so that it
    can be viewed in its dtype.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        digest: BodyDigest | None = None,
        take: Callable[[int], Tensor] | None = None,
    ) -> None:
        """`take` gives the buffer by its size in bytes; without it the memory is fresh."""
        self._lengths = list(lengths)
        self._starts = []
        end = 0
        for length in self._lengths:
            self._starts.append(end)
            end += -(-length // 64) * 64
        self.buffer = torch.empty(end, dtype=torch.uint8, device="cpu") if take is None else take(end)
        self._bytes = self.buffer.numpy()
        self._digest = digest
        self._segment = 0
        self._filled = 0
        self._skip_complete()

    def parts_of(self, chunk: Chunk) -> Sequence[Chunk]:
        """A chunk, cut where it goes on into the segments behind its own."""
        segment, offset, payload = chunk.segment, chunk.offset, chunk.payload
        parts = []
        while segment < len(self._lengths) - 1 and 0 < self._lengths[segment] - offset < len(payload):
            room = self._lengths[segment] - offset
            parts.append(Chunk(segment, offset, payload[:room]))
            segment, offset, payload = segment + 1, 0, payload[room:]
            while segment < len(self._lengths) - 1 and not self._lengths[segment]:
                segment += 1
        return [*parts, Chunk(segment, offset, payload)]

    def place(self, chunk: Chunk) -> None:
        """Copy a part of a chunk to its place. WrongLength or MalformedFrame, before any write, if it is not next."""
        if self.is_complete:
            raise WrongLength(what="the body", got="longer", expected=sum(self._lengths))
        if chunk.segment != self._segment or chunk.offset != self._filled:
            raise MalformedFrame(
                problem=f"chunk at segment {chunk.segment} byte {chunk.offset} where segment {self._segment} "
                f"byte {self._filled} is next"
            )
        end = self._filled + len(chunk.payload)
        if end > self._lengths[self._segment]:
            raise WrongLength(
                what=f"segment {self._segment}", got=f"at least {end}", expected=self._lengths[self._segment]
            )
        base = self._starts[self._segment]
        # numpy releases the GIL for a copy of this size; assigning to a memoryview would not
        self._bytes[base + self._filled : base + end] = np.frombuffer(chunk.payload, dtype=np.uint8)
        if self._digest is not None:
            self._digest.update(chunk.payload)
        self._filled = end
        self._skip_complete()

    def _skip_complete(self) -> None:
        while self._segment < len(self._lengths) and self._filled == self._lengths[self._segment]:
            self._segment += 1
            self._filled = 0

    @property
    def is_complete(self) -> bool:  # noqa: D102
        return self._segment >= len(self._lengths)

    def finish(self) -> None:
        """WrongLength if the body is not complete: the stream has ended early."""
        if not self.is_complete:
            got = sum(self._lengths[: self._segment]) + self._filled
            raise WrongLength(what="the body", got=got, expected=sum(self._lengths))

    def part(self, segment: int, dtype: torch.dtype, start: int = 0, count: int | None = None) -> Tensor:
        """Elements of a segment as a flat tensor: `count` of `dtype` from byte `start` on.

        It lies over the buffer, or is a copy where the elements are not aligned for their dtype.
        """
        base = self._starts[segment] + start
        size = self._lengths[segment] - start if count is None else count * dtype.itemsize
        found = self.buffer[base : base + size]
        return (found if base % dtype.itemsize == 0 else found.clone()).view(dtype)
