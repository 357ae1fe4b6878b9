"""A model's journal as it is written: one record for each change, in files that snapshots make superfluous.

Records are appended by the model's writer thread and forced to the disk by the server's one syncing thread
(`journal/sync.py`). Room for a push's record is taken before the push is decided on, so a full disk refuses
pushes and loses nothing. What is not in the journal (a restore, a group that was added) is bridged by a snapshot: until
that is on the disk, no later record counts as durable.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final, NoReturn

from pushstep.proto.errors import JournalFull, PushstepError
from pushstep.proto.journal_pb2 import JournalRecord

from ..counters.model_counts import JournalCounts
from ..storage import files
from .chain import MARKER, first_of, journal_files, marker
from .file import Heading, JournalFile, record_bytes
from .reserve import FLOOR_BYTES, RESERVE_BYTES

log = logging.getLogger("pushstep.journal")
# Room that pushes leave to the records of joins, leaves and edits, which nobody can refuse.
SPARE_BYTES: Final = 1 << 20
# A record's message, beside its gradients and what a worker sends with it.
MESSAGE_BYTES: Final = 4 << 10
RETRY_AFTER_S: Final = 2.0


class Level(StrEnum):
    """How safe a push is when it is acknowledged."""

    APPLIED = "applied"
    EVERYSEC = "everysec"
    DURABLE = "durable"


# From the least safe one on.
LEVELS: Final = tuple(Level)


@functools.cache
def boot() -> bytes:
    """The machine's boot: what a process wrote before it died is still there, while this stays the same."""
    text = Path("/proc/sys/kernel/random/boot_id").read_text()
    return bytes.fromhex(text.strip().replace("-", ""))


class Journal:
    """Appends records, counts the room that is promised, and knows what is on the disk.

    `append` and `roll` belong to the model's writer thread, `sync` to the syncing thread, the rest to the event loop.
    """

    def __init__(
        self,
        folder: Path,
        uid: bytes,
        level: Level,
        last: int,
        link: int,
        fail: Callable[[str, Exception], NoReturn],
        *,
        after_gap: bool,
        counts: JournalCounts | None = None,
    ) -> None:
        """A journal that goes on behind record `last`, whose checksum is `link`. DiskFull, StorageFailed.

        `fail` gets the name of the model and the error of an fsync, and ends the process.
        after_gap: the next record does not follow from the last one, because something that is not in the journal came
        between; a snapshot has to be taken, and `based` called.
        """
        self.folder = folder
        self.level = level
        self.fail = fail
        self.counts = counts or JournalCounts()
        self.model = folder.parent.name
        self._uid = uid
        # the last record that was appended, and the last one on the disk
        self.appended = self.synced = last + after_gap
        # True unless a snapshot that follows record `_awaited_base` has to be taken first
        self._based = not after_gap
        self._awaited_base = self.appended
        # (record, version) of what has been appended and is not on the disk yet
        self._versions: deque[tuple[int, int]] = deque()
        self.durable_version = 0
        self._promised_bytes = 0
        # between the writer, who changes the file, and the syncing thread and the loop. Nobody holds it for a disk
        self._lock = threading.Lock()
        # bytes that the disk had free when it was last asked, without what was appended since
        self._free_bytes = 0
        self._closed = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refusal(error) from error
        # everything that is needed to make records durable is opened here: a process that has no descriptor left has lost
        # nothing that was written
        self._folder = self._marker = -1
        # first what earlier processes wrote, which may be in the kernel's memory only: the file behind it says that it is whole
        self._force_earlier()
        self._file = self._made(last, self.appended, link)
        try:
            self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._marker = os.open(folder / MARKER, flags, 0o600)
            os.fsync(self._folder)
            files.fsync(folder.parent)
        except OSError as error:
            self._close_files()
            raise self._refusal(error) from error

    def _made(self, previous: int, last: int, link: int) -> JournalFile:
        heading = Heading(self._uid, boot(), last + 1, previous, link)
        try:
            return JournalFile(self.folder, heading)
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError, need_bytes: int = 0) -> Exception:
        return files.refusal(f"models/{self.model}/journal", error, self.folder, need_bytes)

    # Room.

    def has_room(self, need_bytes: int) -> bool:
        """True, with the room promised, if the disk had room for a record of so many bytes when it was last asked."""
        with self._lock:
            if self._free_bytes - self._promised_bytes - SPARE_BYTES < need_bytes + MESSAGE_BYTES:
                return False
            self._promised_bytes += need_bytes + MESSAGE_BYTES
            return True

    def take_room(self, need_bytes: int) -> None:
        """Ask the disk, and promise room for a record of so many bytes. It blocks. JournalFull: nothing is promised."""
        self._look_at_room()
        if not self.has_room(need_bytes):
            free = max(0, self._free_bytes - self._promised_bytes)
            raise JournalFull(model=self.model, need=need_bytes, free=free, retry_after_s=RETRY_AFTER_S)

    def _look_at_room(self) -> None:
        try:
            disk = os.statvfs(self.folder)
        except OSError as error:
            raise self._refusal(error) from error
        with self._lock:
            left_bytes = self._file.reserved_bytes
            # what will be set aside again, behind the next records
            lacks_bytes = 0 if left_bytes is None else max(0, RESERVE_BYTES - left_bytes)
            self._free_bytes = disk.f_bavail * disk.f_frsize - lacks_bytes

    def has_room_for_an_edit(self) -> bool:
        """True if what is set aside takes the record of an edit or a join, and leaves enough to what cannot be refused."""
        left_bytes = self._file.reserved_bytes
        return left_bytes is None or left_bytes >= FLOOR_BYTES

    def take_room_for_an_edit(self) -> None:
        """Set more room aside. It blocks. JournalFull."""
        try:
            self._file.extend_reserve()
        except OSError:
            if not self.has_room_for_an_edit():
                self._look_at_room()
                raise JournalFull(
                    model=self.model, need=RESERVE_BYTES, free=self._free_bytes, retry_after_s=RETRY_AFTER_S
                ) from None

    def give_back_room(self, need_bytes: int) -> None:
        """Take a promise back: the record has been appended, or will not be."""
        with self._lock:
            self._promised_bytes -= need_bytes + MESSAGE_BYTES

    @property
    def link(self) -> int:
        """The checksum of the last record."""
        return self._file.link

    @property
    def file_bytes(self) -> int:
        """Bytes in the present file."""
        return self._file.end

    @property
    def free_bytes(self) -> int:
        """Bytes that the disk had free when it was last asked, without what is promised and was appended since."""
        return self._free_bytes - self._promised_bytes

    # Writing.

    def append(self, record: JournalRecord, payload: Sequence[memoryview] = ()) -> int:
        """Append a record; its number. DiskFull, StorageFailed: then it is as if it had not been tried."""
        message = record.SerializeToString()
        number = self.appended + 1
        need_bytes = record_bytes(len(message), sum(part.nbytes for part in payload))
        begin = self._file.end
        try:
            self._file.write(number, self.synced, message, payload)
        except OSError as error:
            raise self._refusal(error, need_bytes) from error
        with self._lock:
            self.appended = number
            self._free_bytes -= need_bytes
            self._versions.append((number, record.version))
        self.counts.records += 1
        self.counts.appended_bytes += self._file.end - begin
        return number

    def roll(self) -> int:
        """Begin a new file, so that the present one can be removed later; the last record's number.

        The present file is forced to the disk first. Raises what the disk does; then nothing has changed.
        """
        if self._file.end > self._file.begin:
            self._roll(self.appended, self.appended)
        return self.appended

    def skip(self, kept_version: int) -> int:
        """Note that something came that is not in the journal; the number that its snapshot has to name.

        No version above `kept_version` counts as durable from here on, until `based` is called. Raises what the disk
        does.
        """
        previous = self.appended
        self._roll(previous, previous + 1)
        self.note_durable()
        with self._lock:
            self.appended = self._awaited_base = previous + 1
            self._based = False
            self._versions.clear()
            self.durable_version = min(self.durable_version, kept_version)
        return self.appended

    def set_level(self, level: Level) -> None:
        """Go on at another level, in a new file."""
        self._roll(self.appended, self.appended)
        self.level = level

    def _roll(self, previous: int, last: int) -> None:
        """Go on in a new file behind record `last`, of which `previous` was the one before it in the journal."""
        try:
            self._file.sync()
        except OSError as error:
            self.fail(self.model, error)
        file = self._made(previous, last, self._file.link)
        try:
            os.fsync(self._folder)
        except OSError as error:
            self.fail(self.model, error)
        with self._lock:
            ended, self._file = self._file, file
            self._note_synced(previous)
        ended.close()

    # The disk.

    def sync(self) -> int:
        """Force everything appended so far to the disk; the last such record's number.

        OSError: then nothing is known of what is on the disk, and nothing may be acknowledged any more.
        """
        with self._lock:
            number, file = self.appended, self._file
            if self._closed:
                return self.synced
        begun_s = time.monotonic()
        file.sync()
        self.counts.sync.observe(time.monotonic() - begun_s)
        with self._lock:
            if not self._closed:
                self._note_synced(number)
        with contextlib.suppress(PushstepError):
            self._look_at_room()
        return number

    def _note_synced(self, number: int) -> None:
        self.synced = max(self.synced, number)
        with contextlib.suppress(OSError):  # it only helps to tell damage from a torn tail
            os.pwrite(self._marker, marker(self.synced, self._uid), 0)

    def _force_earlier(self) -> None:
        """Force the files of earlier processes to the disk."""
        for path in journal_files(self.folder, self.model):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError as error:  # nothing was lost
                raise self._refusal(error) from error
            try:
                os.fsync(descriptor)
            except OSError as error:
                self.fail(self.model, error)
            finally:
                os.close(descriptor)

    def note_durable(self) -> int:
        """Move `durable_version` on to what is on the disk; the last record that counts as durable."""
        with self._lock:
            number = self.synced if self._based else min(self.synced, self._awaited_base - 1)
            while self._versions and self._versions[0][0] <= number:
                self.durable_version = max(self.durable_version, self._versions.popleft()[1])
            return number

    def based(self, number: int, version: int) -> None:
        """A snapshot that follows record `number`, of this version, is on the disk."""
        with self._lock:
            if number >= self._awaited_base:
                self._based = True
                self.durable_version = max(self.durable_version, version)

    @property
    def is_based(self) -> bool:
        """True unless a snapshot has to be taken before anything counts as durable."""
        return self._based

    def prune(self, number: int) -> None:
        """Remove the files of which no record is behind number `number`. StorageFailed."""
        for path, following in itertools.pairwise(journal_files(self.folder, self.model)):
            if 0 < first_of(following) <= number + 1 and path != self._file.path:
                try:
                    path.unlink()
                except OSError as error:
                    raise self._refusal(error) from error

    def close(self) -> None:
        """Force everything to the disk and close the files."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            self._file.sync()
        except OSError as error:
            self.fail(self.model, error)
        self._note_synced(self.appended)
        self._close_files()

    def _close_files(self) -> None:
        self._file.close()
        for descriptor in (self._folder, self._marker):
            if descriptor >= 0:
                os.close(descriptor)
