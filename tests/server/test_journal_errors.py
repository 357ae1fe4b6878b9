"""What each error of the operating system does to a journal: only an fsync that failed ends the process."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest

from pushstep.proto.errors import DiskFull, JournalFull, PushstepError, StorageFailed
from pushstep.proto.journal_pb2 import JournalRecord
from pushstep.server.journal import recorder as recorder_module
from pushstep.server.journal import reserve as reserve_module
from pushstep.server.journal.chain import JournalChain
from pushstep.server.journal.journal import Journal, Level
from pushstep.server.journal.recorder import Recorder
from pushstep.server.journal.reserve import FLOOR_BYTES, RESERVE_BYTES
from pushstep.server.journal.sync import JournalSync

UID = bytes(range(16))
NUMBERS = ("EMFILE", "ENFILE", "ENOMEM", "EINTR", "ENOSPC", "EDQUOT", "EROFS", "EIO")
FULL = ("ENOSPC", "EDQUOT")
PAGE = 4096


class Ended(BaseException):
    """The process would have ended."""


def _ends(model: str, error: Exception) -> NoReturn:
    raise Ended(model) from error


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "m" / "journal", UID, Level.DURABLE, 0, 0, _ends, after_gap=False)


def append(journal: Journal, version: int, size_bytes: int = 10) -> None:
    journal.append(JournalRecord(timeline=1, version=version), [memoryview(bytes(size_bytes))])


def read(journal: Journal) -> list[int]:
    return [int(record.message.version) for record in JournalChain(journal.folder, UID).records(0)]


def refused(journal: Journal, work: Callable[[], object], number: str) -> None:
    with pytest.raises(PushstepError) as raised:
        work()
    assert isinstance(raised.value, DiskFull) == (number in FULL)


def roll(journal: Journal) -> int:
    return journal.roll()


def sync(journal: Journal) -> int:
    return journal.sync()


def third(journal: Journal) -> None:
    append(journal, 3)


# the call that fails, what is done then, and what becomes of it
CASES: dict[str, tuple[str, Callable[[Journal], object], str]] = {
    "a descriptor while records are forced to the disk": ("open", sync, "nothing"),
    "a second descriptor of the file": ("dup", sync, "nothing"),
    "the look at the disk's room": ("statvfs", sync, "nothing"),
    "the note of what is on the disk": ("pwrite", sync, "nothing"),
    "a descriptor of the next file": ("open", roll, "refused"),
    "the name of the next file": ("replace", roll, "refused"),
    "a record": ("pwritev", third, "refused"),
    "the records, forced to the disk": ("fdatasync", sync, "raised"),
    "the file that ends, forced to the disk": ("fdatasync", roll, "ended"),
    "the end of the file that ends": ("ftruncate", roll, "nothing"),
}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("case", CASES)
def test_an_error_of_the_system(
    journal: Journal, case: str, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, work, outcome = CASES[case]
    append(journal, 1)
    append(journal, 2)

    def fails(*_: Any, **__: Any) -> NoReturn:
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(os, call, fails)
    match outcome:
        case "nothing":
            work(journal)
            assert journal.synced == 2
        case "refused":
            refused(journal, lambda: work(journal), number)
        case "raised":
            with pytest.raises(OSError, match=os.strerror(getattr(errno, number))):
                work(journal)
        case "ended":
            with pytest.raises(Ended):
                work(journal)
    monkeypatch.undo()
    if outcome in ("nothing", "refused"):
        # and the journal goes on, without a gap and with all of it
        append(journal, 3)
        journal.roll()
        append(journal, 4)
        journal.sync()
        journal.close()
        assert read(journal) == [1, 2, 3, 4]


@pytest.mark.parametrize("number", NUMBERS)
def test_the_folder_of_the_next_file_is_forced_to_the_disk_or_the_process_ends(
    journal: Journal, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or records behind would go into a file that another one follows, which does not know of them."""
    append(journal, 1)
    fsync, folder = os.fsync, os.fspath(journal.folder)

    def fails(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}") == folder:
            raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(Ended):
        journal.roll()


def test_without_a_descriptor_everything_that_was_appended_is_forced_to_the_disk(journal: Journal) -> None:
    """By the thread that does it, with the process at its real limit; a roll is refused, and possible later."""
    append(journal, 1)
    synced, done = JournalSync(), threading.Event()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        try:
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            assert error.errno == errno.EMFILE
        synced.request(journal, done.set)
        assert done.wait(60)
        assert journal.synced == 1
        with pytest.raises(StorageFailed):
            journal.roll()
        append(journal, 2)
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    journal.roll()
    append(journal, 3)
    synced.close()
    journal.close()
    assert read(journal) == [1, 2, 3]


def test_room_is_set_aside_for_edits_and_more_for_what_cannot_be_refused(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert journal.has_room_for_an_edit()
    allocated = os.stat(journal._file.path).st_blocks * 512
    assert os.stat(journal._file.path).st_size < PAGE < RESERVE_BYTES <= allocated
    monkeypatch.setattr(reserve_module.Reserve, "extend", fails)
    version = 0
    while journal.has_room_for_an_edit():
        version += 1
        append(journal, version, 100_000)
    with pytest.raises(JournalFull) as raised:
        journal.take_room_for_an_edit()
    assert raised.value.retry_after_s
    left = journal._file.reserved_bytes
    assert left is not None
    assert FLOOR_BYTES - 200_000 < left < FLOOR_BYTES
    monkeypatch.undo()
    journal.take_room_for_an_edit()
    assert journal.has_room_for_an_edit()
    journal.close()
    assert read(journal) == list(range(1, version + 1))
    assert os.stat(journal._file.path).st_blocks * 512 < version * 100_000 + 2 * PAGE + (1 << 16)


def test_a_disk_that_can_set_nothing_aside_takes_edits_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reserve_module._C, "fallocate", lambda *_: -1)
    monkeypatch.setattr(reserve_module.ctypes, "get_errno", lambda: errno.EOPNOTSUPP)
    journal = Journal(tmp_path / "m" / "journal", UID, Level.DURABLE, 0, 0, _ends, after_gap=False)
    assert journal.has_room_for_an_edit()
    append(journal, 1)
    journal.close()


def test_the_note_of_a_restore_waits_for_what_it_needs(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start would not know of the restore without it. No write was lost, so the process need not end."""
    append(journal, 1)
    recorder = Recorder(cast(Any, SimpleNamespace()), JournalSync())
    recorder.journal = journal
    missing = [errno.EMFILE, errno.ENOSPC, errno.EROFS]
    opened = os.open

    def fails(path: Any, *arguments: Any, **options: Any) -> int:
        if missing and str(path).endswith(".new"):
            number = missing.pop()
            raise OSError(number, os.strerror(number))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", fails)
    monkeypatch.setattr(recorder_module, "AGAIN_S", 0.0)
    recorder.skip(0)
    assert missing == []
    assert not journal.is_based
    append(journal, 2)
    journal.close()
    assert read(journal) == [1]  # and then a gap, which a snapshot bridges
