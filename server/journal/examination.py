"""Examines a journal file by file: each is verified to its last byte, also those behind damage, which no start reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pushstep.proto.errors import JournalDamaged

from ..storage import files
from .chain import JournalChain, Place, first_of, journal_files, marked
from .file import Heading, JournalReader, NotARecord, Record

READ_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class FileFinding:
    """What one file of a journal holds."""

    path: Path
    size_bytes: int
    # the first record by the file's name, and the last one that is whole: `first` - 1 if there is none
    first: int
    last: int
    # (timeline, version) behind the first and behind the last whole record; None if there is none
    begins_at: tuple[int, int] | None = None
    ends_at: tuple[int, int] | None = None
    # where the last whole record ends; 0 if there is no header
    end: int = 0
    # bytes behind it that were being written when a server ended
    torn_bytes: int = 0
    # the record that is damaged, and why; "" if none is
    record: int = 0
    problem: str = ""


def examine(
    folder: Path,
    uid: bytes | None,
    unfit: JournalDamaged | None = None,
    begun: Callable[[str], None] = lambda _: None,
) -> list[FileFinding]:
    """What each file of a journal holds, in order. `uid` None: each file's own. StorageFailed, OutOfMemory.

    unfit: names a record that is whole, and that a replay could not apply. `begun` hears of each file.
    """
    model = folder.parent.name
    paths = journal_files(folder, model)
    headings = [_heading(path, model) for path in paths]
    findings: list[FileFinding] = []
    for index, (path, heading) in enumerate(zip(paths, headings, strict=True)):
        begun(f"{model}: {path.name}")
        following = headings[index + 1] if index + 1 < len(paths) else None
        if isinstance(heading, str):
            first = first_of(path) or (findings[-1].last + 1 if findings else 1)
            findings.append(
                FileFinding(path, path.lstat().st_size, first, first - 1, record=first, problem=heading)
            )
            continue
        place = Place(path, heading, following if isinstance(following, Heading) else None)
        next_first = first_of(paths[index + 1]) if following is not None else None
        findings.append(_examined(folder, uid or heading.uid, place, next_first, unfit))
    return findings


def _heading(path: Path, model: str) -> Heading | str:
    """The header of a file, or why it has none."""
    try:
        with JournalReader(path) as reader:
            return reader.heading
    except NotARecord as error:
        return str(error)
    except OSError as error:
        if files.is_ours(error):
            raise files.unreadable(f"models/{model}/journal/{path.name}", error) from error
        return files.reason(error)


def _examined(
    folder: Path, uid: bytes, place: Place, next_first: int | None, unfit: JournalDamaged | None
) -> FileFinding:
    """`next_first`: the first record of the next file by its name; None if this is the last one."""
    heading, size_bytes = place.heading, files.size_of(place.path)
    record = _misplaced(uid, place)
    problem = "it is not of this journal" if record else ""
    first_seen: Record | None = None
    seen: Record | None = None
    try:
        for read in () if record else _records(folder, uid, place):
            if unfit is not None and read.number == int(unfit.fields["record"]):
                raise unfit
            first_seen, seen = first_seen or read, read
    except JournalDamaged as error:
        record, problem = int(error.fields["record"]), error.fields["problem"]
    last = heading.first - 1 if seen is None else seen.number
    if record and next_first is not None and place.last is None and record >= next_first:
        # the next file has no header, so this one does not say where it ends: that one is damaged
        record, problem = 0, ""
    synced = marked(folder, uid)
    if not record and next_first is None and last < synced:
        record, problem = last + 1, f"it was on the disk, and the journal ends at record {last}"
    with JournalReader(place.path) as reader:
        end = reader.begin if seen is None else seen.end
    return FileFinding(
        place.path,
        size_bytes,
        heading.first,
        last,
        _at(first_seen),
        _at(seen),
        end,
        0 if record else _written_behind(place.path, end),
        record,
        problem,
    )


def _misplaced(uid: bytes, place: Place) -> int:
    """The first record of a file that is of another model, or that the next file does not continue; 0 if it is neither."""
    heading, last = place.heading, place.last
    is_other = heading.uid != uid or (last is not None and last < heading.first - 1)
    return heading.first if is_other else 0


def _records(folder: Path, uid: bytes, place: Place) -> Iterator[Record]:
    return JournalChain(folder, uid, [place]).records_of(place, place.heading.first - 1)


def _at(record: Record | None) -> tuple[int, int] | None:
    return None if record is None else (int(record.message.timeline), int(record.message.version))


def _written_behind(path: Path, end: int) -> int:
    """How many bytes were written behind the last whole record: room that nobody wrote to is zeros."""
    written, at = 0, 0
    with path.open("rb") as file:
        file.seek(end)
        while block := file.read(READ_BYTES):
            if used := len(block.rstrip(b"\0")):
                written = at + used
            at += len(block)
    return written
