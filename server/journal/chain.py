"""A model's journal as it is read: all its files, in order, and where it ends.

A journal ends at its last whole record. A crash may leave a torn tail after it, which is dropped with a warning if nobody was
told that it was on the disk. A record that was on the disk and is not whole is damage. Then nothing is read from the journal
at all, because what follows the damage cannot be applied.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from pushstep.proto.errors import JournalDamaged
from pushstep.proto.journal_pb2 import JournalRecord

from ..storage import files
from .file import SUFFIX, Heading, JournalReader, NotARecord, Record

log = logging.getLogger("pushstep.journal")
MARKER: Final = "synced"
# number of the newest record on the disk, and a checksum
_MARKER: Final = struct.Struct("<QQ")


def marker(number: int, uid: bytes) -> bytes:
    """What the marker's file holds: the newest record that is on the disk."""
    return _MARKER.pack(number, xxhash.xxh3_64_intdigest(number.to_bytes(8, "little") + uid))


def marked(folder: Path, uid: bytes) -> int:
    """The newest record that the marker says is on the disk; 0 if there is no marker, or none that is whole."""
    try:
        text = files.read_small(folder / MARKER, _MARKER.size)
    except OSError:
        return 0
    number = int.from_bytes(text[:8], "little")
    return number if text == marker(number, uid) else 0


@dataclass(frozen=True, slots=True)
class Place:
    """A file of the chain: its header, and the header of the next file."""

    path: Path
    heading: Heading
    following: Heading | None

    @property
    def last(self) -> int | None:
        """The number of its last record, as the next file says it. None for the last file."""
        return None if self.following is None else self.following.previous


class JournalChain:
    """The files of one model's journal. All methods block: call them in a thread."""

    def __init__(
        self, folder: Path, uid: bytes, places: Sequence[Place] | None = None, last: int | None = None
    ) -> None:
        """JournalDamaged if a file's header is none, or a file in the middle is missing.

        places: only these files, whose headers were read. last: of a journal that is being written to, the last record that
        was whole before this call. What is behind it may be half written, or in a file that is not known here.
        """
        self.folder = folder
        self._last = last
        self._model = folder.parent.name
        self._uid = uid
        self.places = list(self._placed() if places is None else places)
        # the last record and its checksum, once `records` has come to it
        self.end = self.link = 0
        # True if no file is behind that record
        self.is_at_end = False

    def _placed(self) -> Iterator[Place]:
        found: list[tuple[Path, Heading]] = []
        for path in journal_files(self.folder, self._model):
            try:
                with JournalReader(path) as reader:
                    found.append((path, reader.heading))
            except NotARecord as error:
                raise JournalDamaged(
                    model=self._model, file=path.name, record=first_of(path), problem=str(error)
                ) from error
            except OSError as error:
                raise self._unreadable(path, error) from error
        for index, (path, heading) in enumerate(found):
            if heading.uid != self._uid:
                problem = "it is the journal of another model"
                raise JournalDamaged(model=self._model, file=path.name, record=heading.first, problem=problem)
            following = found[index + 1][1] if index + 1 < len(found) else None
            if following is not None and following.previous < heading.first - 1:
                problem = f"the file behind it continues record {following.previous}"
                raise JournalDamaged(model=self._model, file=path.name, record=heading.first, problem=problem)
            yield Place(path, heading, following)

    def _unreadable(self, path: Path, error: OSError) -> Exception:
        if files.is_ours(error):
            return files.unreadable(f"models/{self._model}/journal/{path.name}", error)
        problem = files.reason(error)
        return JournalDamaged(model=self._model, file=path.name, record=first_of(path), problem=problem)

    @property
    def heading(self) -> Heading | None:
        """The header of the last file; None if there is none."""
        return self.places[-1].heading if self.places else None

    def continues(self, after: int) -> bool:
        """True if record `after + 1` is in the journal, or would be the next one."""
        return any(
            place.heading.first - 1 <= after and (place.last is None or after <= place.last)
            for place in self.places
        )

    def last_number(self) -> int:
        """The number of the last whole record of the last file, whatever gaps are before it. 0 if there is none."""
        if not self.places:
            return 0
        place = self.places[-1]
        number, self.link = place.heading.first, place.heading.link
        with JournalReader(place.path) as reader, contextlib.suppress(NotARecord):
            at = reader.begin
            while True:
                record = reader.read(number, at)
                at, self.link, number = record.end, record.checksum, number + 1
        return number - 1

    def failures(self, after: int) -> set[tuple[int, int]]:
        """(timeline, version) of the steps that failed, among the records behind number `after`."""
        return {
            (message.timeline, message.version)
            for message in self._messages(after)
            if message.HasField("failure")
        }

    def _messages(self, after: int) -> Iterator[JournalRecord]:
        for place in self._from(after):
            with JournalReader(place.path) as reader:
                number, at = place.heading.first, reader.begin
                while place.last is None or number <= place.last:
                    try:
                        message, at, _ = reader.message(number, at)
                    except NotARecord:
                        break
                    if number > after:
                        yield message
                    number += 1

    def records(self, after: int) -> Iterator[Record]:
        """The records behind number `after`, in order, each verified to its last byte.

        They end at the last record, or where something that is not in the journal came between: `end` is the number of
        the last one. JournalDamaged if a record is damaged that was on the disk. OutOfMemory.
        """
        self.end = after
        reached: Place | None = None
        for place in self._from(after):
            yield from self.records_of(place, after)
            reached = place
        self.is_at_end = self._last is None and reached is not None and reached is self.places[-1]
        if reached is not None and self.is_at_end and self.end < marked(self.folder, self._uid):
            problem = f"it was on the disk, and the journal ends at record {self.end}"
            raise JournalDamaged(
                model=self._model, file=reached.path.name, record=self.end + 1, problem=problem
            )

    def _from(self, after: int) -> Iterator[Place]:
        """The files with the records behind number `after`, up to the first gap."""
        expected = after + 1
        for place in self.places:
            if place.last is not None and place.last < expected:
                continue
            if place.heading.first > expected:
                return
            yield place
            if place.last is None:
                return
            expected = place.last + 1

    def records_of(self, place: Place, after: int) -> Iterator[Record]:
        """The records behind number `after` in one file, each verified. Raises what `records` does."""
        try:
            with JournalReader(place.path) as reader:
                number, at, self.link = place.heading.first, reader.begin, place.heading.link
                while place.last is None or number <= place.last:
                    if self._last is not None and number > self._last:
                        return
                    try:
                        if number <= after:
                            _, at, self.link = reader.message(number, at)
                        else:
                            record = reader.read(number, at)
                            at, self.end, self.link = record.end, number, record.checksum
                            yield record
                    except NotARecord as error:
                        self._require_torn(place, reader, number, at, error)
                        return
                    number += 1
        except OSError as error:
            raise self._unreadable(place.path, error) from error
        if place.following is not None and place.following.link != self.link:
            problem = "the file behind it continues another journal"
            raise JournalDamaged(model=self._model, file=place.path.name, record=number, problem=problem)

    def _require_torn(
        self, place: Place, reader: JournalReader, number: int, at: int, error: NotARecord
    ) -> None:
        """JournalDamaged unless a record that is not whole may never have been on the disk."""
        synced = max(marked(self.folder, self._uid), reader.newest_synced(number, at + 1))
        if place.last is not None or synced >= number:
            raise JournalDamaged(
                model=self._model, file=place.path.name, record=number, problem=str(error)
            ) from error
        if not reader.is_blank(at):
            log.warning(
                "model %s: record %d of its journal was being written when its server ended (%s): dropped, and what "
                "follows it; nobody was told that it was on the disk",
                self._model,
                number,
                error,
                extra={"model": self._model},
            )


def first_of(path: Path) -> int:
    """The number of a file's first record, by its name; 0 if the name is of no file that a journal writes."""
    first = path.name.removesuffix(SUFFIX)
    return int(first) if first.isdigit() else 0


def journal_files(folder: Path, model: str) -> list[Path]:
    """The files of a journal, oldest first. StorageFailed if the folder cannot be read."""
    try:
        return sorted(folder / name for name in os.listdir(folder) if name.endswith(SUFFIX))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise files.unreadable(f"models/{model}/journal", error) from error
