"""One file of a journal: a header, and records that each carry their number, their lengths and a checksum.

Records are numbered without gaps, and no record spans two files. A file grows by what is appended.
A record says which earlier records were on the disk when it was written. That tells a torn tail, which nobody was told
of, from damage: after a power cut, the records since the last fsync may be there in any part and in any order.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import torch
import xxhash
from torch import Tensor

from pushstep.proto.journal_pb2 import JournalRecord

from ..process.memory import take
from ..storage.files import opened

SUFFIX: Final = ".journal"
NEW_SUFFIX: Final = ".new"
_MAGIC: Final = b"pushstep journal"
# magic, uid of the model, boot of the machine, first and previous record, the latter's checksum, checksum
_HEADER: Final = struct.Struct("<16s16s16sQQQQ")
_RECORD_MAGIC: Final = b"\xf5PSJ"
# magic, bytes of the message, bytes of the payload, number, newest record on the disk, checksum
_RECORD: Final = struct.Struct("<4sIQQQQ")
_CHECKSUM_BYTES: Final = 8
# Parts of a payload begin at a multiple of the largest element size.
ALIGNMENT: Final = 8
# The most buffers that one system call takes.
_BUFFERS: Final = 1024
LONGEST_MESSAGE_BYTES: Final = 1 << 30


class NotARecord(Exception):
    """The bytes at a place of a file are not the record that should be there."""


class Heading(NamedTuple):
    """The header of a file."""

    uid: bytes
    # the machine's boot in which it was written
    boot: bytes
    first: int
    # the last record before: `first` - 1, or less if something that is not in the journal came between
    previous: int
    # the checksum of that record: another file of its name does not have it
    link: int


@dataclass(frozen=True, slots=True)
class Record:
    """A record that has been read and verified."""

    number: int
    # the newest record that was on the disk when this one was written
    synced: int
    message: JournalRecord
    # its gradients or values, as bytes, each part aligned
    payload: Tensor
    checksum: int
    # where the next record begins
    end: int


def padded(size_bytes: int) -> int:
    """The bytes that a part of this size takes."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


def record_bytes(message_bytes: int, payload_bytes: int) -> int:
    """The bytes that a record takes; `payload_bytes` is of parts with their padding."""
    return _RECORD.size + padded(message_bytes) + payload_bytes


def name_of(first: int) -> str:
    """The name of the file that begins with a record."""
    return f"{first:016d}{SUFFIX}"


def _seed(uid: bytes) -> int:
    """Makes the checksums of each model's records differ: those of another model do not verify."""
    return int.from_bytes(uid[:8], "little")


class JournalFile:
    """A file that records are written to. Only one thread at a time writes to it."""

    def __init__(self, folder: Path, heading: Heading) -> None:
        """Create the file, whole or not at all. OSError.

        It replaces a file that begins with the same record: that record is torn, or else this file would begin later.
        """
        self.path = folder / name_of(heading.first)
        new = self.path.with_suffix(NEW_SUFFIX)
        self.end = _HEADER.size
        # the checksum of the last record
        self.link = heading.link
        self._seed = _seed(heading.uid)
        packed = _HEADER.pack(_MAGIC, *heading, 0)[:-_CHECKSUM_BYTES]
        packed += xxhash.xxh3_64_intdigest(packed, self._seed).to_bytes(_CHECKSUM_BYTES, "little")
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(new, flags, 0o600)
        try:
            _write(self._descriptor, [packed], 0)
            os.fsync(self._descriptor)
            os.replace(new, self.path)
        except OSError:
            self.close()
            with contextlib.suppress(OSError):
                new.unlink()
            raise

    @property
    def begin(self) -> int:
        """Where the first record begins."""
        return _HEADER.size

    def write(self, number: int, synced: int, message: bytes, payload: Sequence[memoryview]) -> None:
        """Write the next record, whole. OSError; then the next one takes its place."""
        size_bytes = sum(padded(part.nbytes) for part in payload)
        head = _RECORD.pack(_RECORD_MAGIC, len(message), size_bytes, number, synced, 0)[:-_CHECKSUM_BYTES]
        parts = list(_with_padding([message, *payload]))
        digest = xxhash.xxh3_64(head, self._seed)
        for part in parts:
            digest.update(part)
        checksum = digest.intdigest()
        head += checksum.to_bytes(_CHECKSUM_BYTES, "little")
        end = self.end + record_bytes(len(message), size_bytes)
        _write(self._descriptor, [head, *parts], self.end)
        self.end, self.link = end, checksum

    def duplicate(self) -> int:
        """A descriptor of the file, which the caller closes."""
        return os.dup(self._descriptor)

    def sync(self) -> None:
        """Force what was written to the disk. OSError; after one nothing is known of what is there."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close the file. What a refused write has left behind the last record is cut off."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, self.end)
        os.close(self._descriptor)


def _with_padding(parts: Sequence[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    for part in parts:
        length = len(part) if isinstance(part, bytes) else part.nbytes
        if length:
            yield part
        if short := padded(length) - length:
            yield bytes(short)


def _write(descriptor: int, parts: Sequence[bytes | memoryview], at: int) -> None:
    """Write all parts, one behind the other, however few bytes the disk takes at a time. OSError."""
    left = [memoryview(part).cast("B") for part in parts]
    while left:
        written = os.pwritev(descriptor, left[:_BUFFERS], at)
        at += written
        while left and written >= left[0].nbytes:
            written -= left.pop(0).nbytes
        if left:
            left[0] = left[0][written:]


class JournalReader:
    """A file of a journal that is read. Use it in a `with` block."""

    def __init__(self, path: Path) -> None:
        """OSError if it cannot be opened; NotARecord if its header is none."""
        self.path = path
        self._opened = opened(path)
        self._descriptor = self._opened.__enter__()
        self.size_bytes = os.fstat(self._descriptor).st_size
        packed = os.pread(self._descriptor, _HEADER.size, 0)
        try:
            if len(packed) < _HEADER.size:
                raise NotARecord("its header is cut off")
            magic, *fields, checksum = _HEADER.unpack(packed)
            self.heading = Heading(*fields)
            self._seed = _seed(self.heading.uid)
            whole = xxhash.xxh3_64_intdigest(packed[:-_CHECKSUM_BYTES], self._seed) == checksum
            if magic != _MAGIC or not whole or path.name != name_of(self.heading.first):
                raise NotARecord("its header has other bytes")
        except NotARecord:
            self.close()
            raise

    def __enter__(self) -> JournalReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._opened.__exit__(None, None, None)

    @property
    def begin(self) -> int:
        """Where the first record begins."""
        return _HEADER.size

    def message(self, number: int, at: int) -> tuple[JournalRecord, int, int]:
        """The message of a record, where the next one begins, and its checksum, which is not checked.

        OSError; NotARecord if there is no such record.
        """
        length, payload_bytes, _, checksum = self._head(number, at)
        text = os.pread(self._descriptor, length, at + _RECORD.size)
        return _parsed(text), at + record_bytes(length, payload_bytes), checksum

    def read(self, number: int, at: int) -> Record:
        """The record with this number, whose first byte is at `at`. OSError, OutOfMemory.

        NotARecord if what is there is something else, or not all of it.
        """
        length, payload_bytes, synced, checksum = self._head(number, at)
        body = self._body(at, length, payload_bytes)
        head = _RECORD.pack(_RECORD_MAGIC, length, payload_bytes, number, synced, 0)[:-_CHECKSUM_BYTES]
        digest = xxhash.xxh3_64(head, self._seed)
        digest.update(body.numpy().data)
        if digest.intdigest() != checksum:
            raise NotARecord("its checksum is that of other bytes")
        message = _parsed(bytes(body[:length].numpy().data))
        end = at + record_bytes(length, payload_bytes)
        return Record(number, synced, message, body[padded(length) :], checksum, end)

    def is_blank(self, at: int) -> bool:
        """True if nothing was ever written at a place."""
        return not any(os.pread(self._descriptor, _RECORD.size, at))

    def _head(self, number: int, at: int) -> tuple[int, int, int, int]:
        packed = os.pread(self._descriptor, _RECORD.size, at)
        if len(packed) < _RECORD.size:
            raise NotARecord("it is cut off")
        magic, length, payload_bytes, found, synced, checksum = _RECORD.unpack(packed)
        if magic != _RECORD_MAGIC or found != number:
            raise NotARecord("no record begins there")
        if length > LONGEST_MESSAGE_BYTES or at + record_bytes(length, payload_bytes) > self.size_bytes:
            raise NotARecord("it is cut off")
        return length, payload_bytes, synced, checksum

    def _body(self, at: int, length: int, payload_bytes: int) -> Tensor:
        size_bytes = padded(length) + payload_bytes
        body = take(size_bytes, torch.uint8, f"a record of {self.path.name}")
        content, filled = body.numpy().data, 0
        while filled < size_bytes:
            count = os.preadv(self._descriptor, [content[filled:]], at + _RECORD.size + filled)
            if not count:
                raise NotARecord("it is cut off")
            filled += count
        return body

    def newest_synced(self, after: int, at: int) -> int:
        """The newest record that was on the disk, by what whole records after number `after` say; 0 by none.

        They are searched for from `at` on: a damaged record does not say where the next one begins.
        """
        newest = 0
        if at >= self.size_bytes:
            return newest
        with mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ) as content:
            while (at := content.find(_RECORD_MAGIC, at)) >= 0:
                packed = content[at : at + _RECORD.size]
                number = _RECORD.unpack(packed)[3] if len(packed) == _RECORD.size else 0
                if number > after:
                    with contextlib.suppress(NotARecord):
                        newest = max(newest, self.read(number, at).synced)
                at += 1
        return newest


def _parsed(text: bytes) -> JournalRecord:
    try:
        return JournalRecord.FromString(text)
    except Exception as error:  # protobuf's own class differs between its implementations
        raise NotARecord("its message is none") from error
