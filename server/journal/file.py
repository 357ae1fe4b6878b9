"""One file of a journal: a header, and records that each carry their number, their lengths and a checksum.

Records are numbered without gaps, and no record spans two files. A file grows by what is appended. Large gradients lie on
whole pages of it and are written past the page cache.
A record says which earlier records were on the disk when it was written. That tells a torn tail, which nobody was told
of, from damage: after a power cut, the records since the last fsync may be there in any part and in any order.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import torch
import xxhash
from torch import Tensor

from pushstep.proto.journal_pb2 import JournalRecord

from ..process.memory import take
from ..storage.files import opened
from .part_writer import DIRECT_BYTES, PAGE_BYTES, Bytes, PartWriter, Run, nbytes_of
from .reserve import LOW_BYTES, Reserve

SUFFIX: Final = ".journal"
NEW_SUFFIX: Final = ".new"
_MAGIC: Final = b"pushstep journal"
# magic, uid of the model, boot of the machine, first and previous record, the latter's checksum, checksum
_HEADER: Final = struct.Struct("<16s16s16sQQQQ")
_RECORD_MAGIC: Final = b"\xf5PSJ"
# magic, bytes of the message, bytes of the payload, number, newest record on the disk, checksum
_RECORD: Final = struct.Struct("<4sIQQQQ")
_CHECKSUM_BYTES: Final = 8
# Parts of a payload begin at a multiple of the largest element size, large ones at a page.
ALIGNMENT: Final = 8
# From here on the checksum is computed while the disk writes: of 64 MB it takes 4 ms, and a thread takes 0.1 ms to begin.
ASIDE_BYTES: Final = 8 << 20
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


def _rounded(number: int, to: int) -> int:
    return -(-number // to) * to


def begin_of(after: int, size_bytes: int) -> int:
    """Where a part of this size begins, behind what ends at `after`."""
    return _rounded(after, PAGE_BYTES if size_bytes >= DIRECT_BYTES else ALIGNMENT)


def payload_bytes_of(sizes: Iterable[int]) -> int:
    """The bytes that a payload of parts of these sizes takes."""
    end = 0
    for size_bytes in sizes:
        end = begin_of(end, size_bytes) + size_bytes
    return _rounded(end, ALIGNMENT)


def _payload_at(at: int, message_bytes: int, payload_bytes: int) -> int:
    """Where the payload begins of a record that begins at `at`."""
    return begin_of(at + _RECORD.size + message_bytes, payload_bytes)


def record_bytes(message_bytes: int, payload_bytes: int) -> int:
    """The most bytes that a record takes."""
    return _RECORD.size + message_bytes + PAGE_BYTES + payload_bytes


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
        # held by the syncing thread while it uses the descriptor, so that it needs none of its own
        self._in_use = threading.Lock()
        self._is_open = True
        self._descriptor = os.open(new, flags, 0o600)
        self._writer = PartWriter(new, self._descriptor)
        self._reserve = Reserve(self._descriptor)
        try:
            self._writer.write([(0, [packed])])
            with contextlib.suppress(OSError):  # edits are refused then
                self._reserve.extend(self.end)
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
        size_bytes = payload_bytes_of(part.nbytes for part in payload)
        begin = _payload_at(self.end, len(message), size_bytes)
        head = _RECORD.pack(_RECORD_MAGIC, len(message), size_bytes, number, synced, 0)[:-_CHECKSUM_BYTES]
        parts = [message, bytes(begin - self.end - _RECORD.size - len(message)), *_with_padding(payload)]
        direct, buffered = self._writer.divided(self.end + _RECORD.size, parts)
        checksum = self._write_and_sum(direct, [head, *parts])
        head += checksum.to_bytes(_CHECKSUM_BYTES, "little")
        self._writer.write([(self.end, [head]), *buffered])
        self.end, self.link = begin + size_bytes, checksum
        if self._reserve.left_bytes(self.end) < LOW_BYTES:
            with contextlib.suppress(OSError):
                self._reserve.extend(self.end)

    @property
    def reserved_bytes(self) -> int | None:
        """Bytes set aside behind the last record; None if the disk can set nothing aside."""
        return self._reserve.left_bytes(self.end) if self._reserve.is_possible else None

    def extend_reserve(self) -> None:
        """Set more aside. OSError if there is no room. Any thread may call it."""
        with self._in_use:
            if self._is_open:
                self._reserve.extend(self.end)

    def _write_and_sum(self, direct: Sequence[Run], parts: Sequence[Bytes]) -> int:
        """Write what goes past the page cache, and return the checksum of all parts, which is computed meanwhile."""
        if sum(nbytes_of(part) for _, run in direct for part in run) < ASIDE_BYTES:
            self._writer.write_direct(direct)
            return self._sum(parts)
        with ThreadPoolExecutor(1, "journal-checksum") as aside:
            checksum = aside.submit(self._sum, parts)
            self._writer.write_direct(direct)
            return checksum.result()

    def _sum(self, parts: Sequence[Bytes]) -> int:
        digest = xxhash.xxh3_64(seed=self._seed)
        for part in parts:
            digest.update(part)
        return digest.intdigest()

    def sync(self) -> None:
        """Force what was written to the disk. OSError; after one nothing is known of what is there.

        It opens nothing. Any thread may call it. A file that is closed was forced to the disk before.
        """
        with self._in_use:
            if self._is_open:
                os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close the file. What a refused write has left behind the last record is cut off, and what was set aside."""
        with self._in_use:
            self._is_open = False
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.end)
            os.close(self._descriptor)
            self._writer.close()


def _with_padding(payload: Sequence[memoryview]) -> Iterator[Bytes]:
    end = 0
    for part in payload:
        begin = begin_of(end, part.nbytes)
        yield bytes(begin - end)
        yield part
        end = begin + part.nbytes
    yield bytes(_rounded(end, ALIGNMENT) - end)


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
        return _parsed(text), _payload_at(at, length, payload_bytes) + payload_bytes, checksum

    def read(self, number: int, at: int) -> Record:
        """The record with this number, whose first byte is at `at`. OSError, OutOfMemory.

        NotARecord if what is there is something else, or not all of it.
        """
        length, payload_bytes, synced, checksum = self._head(number, at)
        begin = _payload_at(at, length, payload_bytes)
        end = begin + payload_bytes
        body = self._body(at + _RECORD.size, end)
        head = _RECORD.pack(_RECORD_MAGIC, length, payload_bytes, number, synced, 0)[:-_CHECKSUM_BYTES]
        digest = xxhash.xxh3_64(head, self._seed)
        digest.update(body.numpy().data)
        if digest.intdigest() != checksum:
            raise NotARecord("its checksum is that of other bytes")
        message = _parsed(bytes(body[:length].numpy().data))
        return Record(number, synced, message, body[begin - at - _RECORD.size :], checksum, end)

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
        end = _payload_at(at, length, payload_bytes) + payload_bytes
        if length > LONGEST_MESSAGE_BYTES or end > self.size_bytes:
            raise NotARecord("it is cut off")
        return length, payload_bytes, synced, checksum

    def _body(self, at: int, end: int) -> Tensor:
        size_bytes = end - at
        body = take(size_bytes, torch.uint8, f"a record of {self.path.name}")
        content, filled = body.numpy().data, 0
        while filled < size_bytes:
            count = os.preadv(self._descriptor, [content[filled:]], at + filled)
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
