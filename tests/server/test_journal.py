"""A journal's files: every flipped byte and every cut is seen, and a power cut leaves a prefix with all that was synced."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from pushstep.proto.errors import DiskFull, JournalDamaged, JournalFull
from pushstep.proto.journal_pb2 import JournalRecord
from pushstep.proto.wire.buffers import fresh_memory
from pushstep.server.journal.chain import MARKER, JournalChain
from pushstep.server.journal.file import DIRECT_BYTES, JournalReader
from pushstep.server.journal.journal import Journal, Level
from pushstep.server.journal.records import PayloadReader

UID = bytes(range(16))
SECTOR_BYTES = 512


def _failed(model: str, error: Exception) -> NoReturn:
    raise AssertionError(model) from error


def _journal(
    folder: Path, last: int = 0, link: int = 0, *, after_gap: bool = False, level: Level = Level.DURABLE
) -> Journal:
    return Journal(folder / "m" / "journal", UID, level, last, link, _failed, after_gap=after_gap)


def _write(journal: Journal, versions: range) -> None:
    for version in versions:
        content = bytes((version * 7 + i) % 256 for i in range(50 + version))
        journal.append(JournalRecord(timeline=1, version=version), [memoryview(content), memoryview(b"abc")])


def _read(folder: Path, after: int = 0) -> list[int]:
    """The versions that a journal holds behind a record, each checked against what `_write` wrote."""
    found = []
    for record in JournalChain(folder / "m" / "journal", UID).records(after):
        version = int(record.message.version)
        content = bytes((version * 7 + i) % 256 for i in range(50 + version))
        assert bytes(record.payload[: len(content)].numpy()) == content
        found.append(version)
    return found


def _files(folder: Path) -> list[Path]:
    return sorted((folder / "m" / "journal").iterdir())


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Path]:
    """A journal of two files with six records, all of them on the disk."""
    journal = _journal(tmp_path)
    _write(journal, range(1, 4))
    journal.roll()
    _write(journal, range(4, 7))
    journal.close()
    yield tmp_path


def test_what_was_written_is_read(written: Path) -> None:
    assert _read(written) == [1, 2, 3, 4, 5, 6]
    assert _read(written, after=4) == [5, 6]
    assert _read(written, after=6) == []


def test_every_flipped_byte_is_damage(written: Path) -> None:
    """Padding has a checksum, too. The marker only helps, so damage to it changes nothing."""
    for path in _files(written):
        content = path.read_bytes()
        for place in range(len(content)):
            for bit in (1, 128):
                path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
                if path.name == MARKER:
                    assert _read(written) == [1, 2, 3, 4, 5, 6]
                    continue
                with pytest.raises(JournalDamaged) as raised:
                    _read(written)
                assert raised.value.fields["model"] == "m"
        path.write_bytes(content)


def test_every_cut_of_a_synced_journal_is_damage(written: Path) -> None:
    for path in _files(written):
        content = path.read_bytes()
        for length in range(len(content)):
            path.write_bytes(content[:length])
            if path.name == MARKER:
                assert _read(written) == [1, 2, 3, 4, 5, 6]
                continue
            with pytest.raises(JournalDamaged):
                _read(written)
        path.write_bytes(content)


def test_a_tail_that_was_not_synced_is_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """However much of it is there. What was synced before is read."""
    journal = _journal(tmp_path)
    _write(journal, range(1, 3))
    journal.sync()
    kept = _files(tmp_path)[0].read_bytes()[: journal.file_bytes]
    _write(journal, range(3, 4))
    whole = _files(tmp_path)[0].read_bytes()[: journal.file_bytes]
    path = _files(tmp_path)[0]
    for length in range(len(kept), len(whole)):
        for rest in (b"", bytes(4096)):
            path.write_bytes(whole[:length] + rest)
            caplog.clear()
            if (whole[:length] + rest)[: len(whole)] == whole:  # only zeros were missing
                assert _read(tmp_path) == [1, 2, 3]
                continue
            assert _read(tmp_path) == [1, 2]
            cut_off_something = any(whole[len(kept) : length])
            assert any("dropped" in record.message for record in caplog.records) == cut_off_something
    path.write_bytes(whole)
    assert _read(tmp_path) == [1, 2, 3]
    journal.close()


def test_a_journal_goes_on_behind_a_torn_tail(tmp_path: Path) -> None:
    """The torn record stays where it is, and is never read again."""
    journal = _journal(tmp_path)
    _write(journal, range(1, 4))
    path = _files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[: journal.file_bytes - 9])
    chain = JournalChain(path.parent, UID)
    assert [record.number for record in chain.records(0)] == [1, 2]
    again = _journal(tmp_path, chain.end, chain.link)
    _write(again, range(30, 32))
    again.close()
    assert _read(tmp_path) == [1, 2, 30, 31]
    journal.close()


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_file_is_damage(written: Path, missing: int) -> None:
    """Unless a snapshot has everything that was in it."""
    _files(written)[missing].unlink()
    if missing:
        with pytest.raises(JournalDamaged):
            _read(written)
    else:
        chain = JournalChain(written / "m" / "journal", UID)
        assert not chain.continues(0) and chain.continues(3)
        assert _read(written, after=3) == [4, 5, 6]


def test_another_model_s_journal_is_refused(written: Path) -> None:
    with pytest.raises(JournalDamaged, match="another model"):
        list(JournalChain(written / "m" / "journal", b"x" * 16).records(0))


def test_files_of_another_place_are_damage(written: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A file of the same model's other journal fits by its name only."""
    other = tmp_path_factory.mktemp("other")
    journal = _journal(other)
    _write(journal, range(11, 15))
    journal.roll()
    _write(journal, range(15, 16))
    journal.close()
    mine, theirs = _files(written)[0], _files(other)[0]
    mine.write_bytes(theirs.read_bytes())
    with pytest.raises(JournalDamaged):
        _read(written)


def test_replay_ends_at_a_gap(tmp_path: Path) -> None:
    """Behind something that is not in the journal only its snapshot leads on."""
    journal = _journal(tmp_path)
    _write(journal, range(1, 3))
    number = journal.skip(2)
    _write(journal, range(10, 12))
    assert not journal.is_based
    journal.sync()
    assert journal.note_durable() == 2
    assert journal.durable_version == 2
    journal.based(number, 9)
    assert journal.note_durable() == 5
    assert journal.durable_version == 11
    journal.close()
    chain = JournalChain(tmp_path / "m" / "journal", UID)
    assert [record.number for record in chain.records(0)] == [1, 2]
    assert not chain.is_at_end
    assert [record.number for record in chain.records(number)] == [4, 5]
    assert chain.is_at_end
    assert chain.last_number() == 5


def test_pruning_keeps_what_a_snapshot_needs(tmp_path: Path) -> None:
    journal = _journal(tmp_path)
    for first in (1, 4, 7):
        _write(journal, range(first, first + 3))
        journal.roll()
    journal.prune(5)
    assert _read(tmp_path, after=5) == [6, 7, 8, 9]
    journal.prune(9)
    assert len(list((tmp_path / "m" / "journal").glob("*.journal"))) == 1
    assert _read(tmp_path, after=9) == []
    journal.close()


def test_a_full_disk_refuses_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = _journal(tmp_path)
    _write(journal, range(1, 2))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        assert not journal.has_room(1 << 60)
        with pytest.raises(JournalFull) as raised:
            journal.take_room(1 << 60)
        assert raised.value.retry_after_s
        patched.setattr(os, "pwritev", full)
        with pytest.raises(DiskFull):
            _write(journal, range(2, 3))
    _write(journal, range(3, 4))
    journal.close()
    assert _read(tmp_path) == [1, 3]


def test_a_short_write_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev

    def short(descriptor: int, parts: list[Any], at: int) -> int:
        return real(descriptor, [memoryview(parts[0])[:3]], at)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", short)
        journal = _journal(tmp_path)
        _write(journal, range(1, 5))
    journal.close()
    assert _read(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("taken", [True, False], ids=["past the cache", "refused so"])
def test_large_parts_are_read_as_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aligned: bool, taken: bool
) -> None:
    """Among small ones, and whatever memory they lie in. A flipped byte of one is seen."""
    memory = fresh_memory(DIRECT_BYTES * 3 + 4096)
    memory[:] = np.arange(memory.size) % 251
    shift = 0 if aligned else 8
    large = [memory[shift : shift + size].data for size in (DIRECT_BYTES, DIRECT_BYTES * 2 + 24)]
    small = memoryview(b"eight by")
    real = os.pwritev

    def pwritev(descriptor: int, parts: list[Any], at: int) -> int:
        if not taken and at % 4096 == 0 and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, parts, at)

    monkeypatch.setattr(os, "pwritev", pwritev)
    journal = _journal(tmp_path)
    for version in range(1, 4):
        journal.append(JournalRecord(timeline=1, version=version), [small, *large, small])
    _write(journal, range(4, 6))
    journal.close()
    folder = tmp_path / "m" / "journal"
    records = list(JournalChain(folder, UID).records(0))
    assert [record.number for record in records] == [1, 2, 3, 4, 5]
    for record in records[:3]:
        payload = PayloadReader(record.payload)
        for part in (small, *large, small):
            assert bytes(payload.take_bytes(part.nbytes).numpy()) == bytes(part)
    (path,) = folder.glob("*.journal")
    content = bytearray(path.read_bytes())
    for place in (DIRECT_BYTES // 2, DIRECT_BYTES * 2 + 4096, len(content) // 2):
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(JournalDamaged):
            list(JournalChain(folder, UID).records(0))
        content[place] ^= 1


# Power cuts.


@dataclass
class Disk:
    """What was written to a folder and forced to the disk, in order, so that a power cut can be made at any moment."""

    folder: Path
    log: list[tuple[Any, ...]] = field(default_factory=list)

    def record(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Note each write and fsync from here on."""
        pwritev, pwrite, fdatasync, fsync = os.pwritev, os.pwrite, os.fdatasync, os.fsync
        replace = os.replace

        def path_of(descriptor: int) -> Path:
            return Path(os.readlink(f"/proc/self/fd/{descriptor}"))

        def note_parts(descriptor: int, parts: list[Any], at: int) -> int:
            content = b"".join(bytes(part) for part in parts)
            self.log.append(("write", path_of(descriptor), at, content))
            return pwritev(descriptor, parts, at)

        def note_bytes(descriptor: int, content: bytes, at: int) -> int:
            self.log.append(("write", path_of(descriptor), at, bytes(content)))
            return pwrite(descriptor, content, at)

        def note_sync(descriptor: int) -> None:
            self.log.append(("sync", path_of(descriptor)))
            (fsync if path_of(descriptor).is_dir() else fdatasync)(descriptor)

        def note_name(old: Path, new: Path) -> None:
            self.log.append(("name", Path(old), Path(new)))
            replace(old, new)

        monkeypatch.setattr(os, "replace", note_name)
        monkeypatch.setattr(os, "pwritev", note_parts)
        monkeypatch.setattr(os, "pwrite", note_bytes)
        monkeypatch.setattr(os, "fdatasync", note_sync)
        monkeypatch.setattr(os, "fsync", note_sync)

    def cut(self, at: int, chance: random.Random, into: Path) -> None:
        """The folder as a power cut at an entry of the log may leave it: unsynced sectors are there or not."""
        contents: dict[Path, bytearray] = {}
        unsynced: dict[Path, list[tuple[int, bytes]]] = {}
        # the names that the folder lists for sure
        listed: set[Path] = set()
        for kind, path, *rest in self.log[:at]:
            if kind == "write":
                unsynced.setdefault(path, []).append((rest[0], rest[1]))
                contents.setdefault(path, bytearray())
            elif kind == "name":
                contents[rest[0]], unsynced[rest[0]] = contents.pop(path), unsynced.pop(path, [])
                listed.discard(path)
            elif path == self.folder:
                listed.update(contents)
            else:
                for place, content in unsynced.pop(path, []):
                    _put(contents[path], place, content)
        for path, content in contents.items():
            if path not in listed and chance.random() < 0.5:
                continue
            for place, written in unsynced.get(path, []):
                for begin in range(place - place % SECTOR_BYTES, place + len(written), SECTOR_BYTES):
                    if chance.random() < 0.5:
                        first, last = max(begin, place), min(begin + SECTOR_BYTES, place + len(written))
                        _put(content, first, written[first - place : last - place])
            (into / path.name).write_bytes(bytes(content) + bytes(chance.choice((0, 4096))))


def _put(content: bytearray, place: int, written: bytes) -> None:
    if len(content) < place + len(written):
        content.extend(bytes(place + len(written) - len(content)))
    content[place : place + len(written)] = written


def _survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, cuts: int) -> None:
    chance = random.Random(seed)
    folder = tmp_path / "m" / "journal"
    disk = Disk(folder)
    synced: list[tuple[int, int]] = []
    with monkeypatch.context() as patched:
        disk.record(patched)
        journal = _journal(tmp_path)
        for version in range(1, 25):
            _write(journal, range(version, version + 1))
            if chance.random() < 0.3:
                synced.append((len(disk.log) + 1, journal.sync()))
            if chance.random() < 0.1:
                synced.append((len(disk.log) + 1, journal.roll()))
        journal.close()
    for number in range(cuts):
        at = chance.randrange(len(disk.log) + 1)
        into = tmp_path / f"cut{number}" / "m" / "journal"
        into.mkdir(parents=True)
        disk.cut(at, chance, into)
        found = _read(into.parent.parent)
        assert found == list(range(1, len(found) + 1))
        # a sync counts once its marker could be written, which is the entry behind it
        assert len(found) >= max((last for entry, last in synced if entry < at), default=0)


@pytest.mark.parametrize("seed", range(4))
def test_a_power_cut_leaves_a_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    caplog.set_level(logging.ERROR)
    _survives(tmp_path, monkeypatch, seed, 100)


@pytest.mark.parametrize("after_gap", [False, True])
def test_a_power_cut_behind_another_start_leaves_a_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_gap: bool
) -> None:
    """What a killed process wrote is in the kernel's memory only, when the next one begins a file behind it."""
    chance = random.Random(1)
    disk = Disk(tmp_path / "m" / "journal")
    with monkeypatch.context() as patched:
        disk.record(patched)
        killed = _journal(tmp_path, level=Level.EVERYSEC)
        _write(killed, range(1, 30))
        killed._close_files()
        following = _journal(tmp_path, killed.appended, killed.link, after_gap=after_gap)
        begun = len(disk.log)
        following.close()
    for number in range(100):
        at = begun if number < 10 else chance.randrange(begun + 1)
        into = tmp_path / f"cut{number}" / "m" / "journal"
        into.mkdir(parents=True)
        disk.cut(at, chance, into)
        found = _read(into.parent.parent)
        assert found == list(range(1, len(found) + 1))
        assert len(found) == 29 or at < begun


def _grow(journal: Journal) -> None:
    journal.append(JournalRecord(timeline=1, version=4), [memoryview(bytes(32 << 20))])


def _grow_by_half(journal: Journal) -> None:
    _grow(journal)
    with journal._file.path.open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - (16 << 20))


def _roll(journal: Journal) -> None:
    journal.roll()
    _write(journal, range(4, 6))


@pytest.mark.parametrize("meanwhile", [_grow, _grow_by_half, _roll])
def test_what_is_written_beside_a_reader_is_no_damage(
    tmp_path: Path, meanwhile: Callable[[Journal], None]
) -> None:
    """A restore of a version reads the journal while the model trains: up to the last record that it knows of."""
    journal = _journal(tmp_path)
    _write(journal, range(1, 4))
    records = JournalChain(tmp_path / "m" / "journal", UID, last=journal.appended).records(0)
    found = [next(records)]
    meanwhile(journal)
    journal.sync()
    found += records
    assert [int(record.message.version) for record in found] == [1, 2, 3]
    journal.close()


@pytest.mark.soak
def test_many_power_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes at most an hour."""
    for seed in range(100, 200):
        (tmp_path / str(seed)).mkdir()
        _survives(tmp_path / str(seed), monkeypatch, seed, 200)


def test_a_fifo_in_a_file_s_place_is_refused(written: Path) -> None:
    path = _files(written)[0]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(JournalDamaged):
        _read(written)


def test_a_reader_closes_what_it_opens(written: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with JournalReader(_files(written)[0]) as reader:
        reader.read(1, reader.begin)
    assert len(os.listdir("/proc/self/fd")) == before
