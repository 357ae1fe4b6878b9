"""The snapshots of one model in a store of objects.

A snapshot is written into the data folder first, as one that stays there. It is then sent: its files, and its manifest
last, so that what has no manifest is no snapshot. All of it is read back and compared. Only then is it noted as sent, and
its copy in the data folder removed; until then a start finds that copy. What a store has is read from the index in the data
folder. A list that the store gives can add to it, never take away.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import xxhash

from pushstep.proto.errors import SnapshotsAway, UnknownSnapshot

from ..storage import files
from ..storage.model_folder import IDENTITY, LONGEST_IDENTITY_BYTES, IdentityFile
from ..storage.snapshot_manifest import ID
from ..storage.snapshot_reader import MANIFEST
from ..storage.store import FolderStore, Source, opened_file
from .bucket import CHUNK_BYTES, Bucket
from .index import Index

MODELS: Final = "models"
# An index is read, changed and written: by one thread at a time.
_INDEXES: Final = threading.Lock()


def place_of(model: Path) -> str:
    """The key below which a model's snapshots lie, by its name and uid: a later model of the name has another.

    OSError or ValueError if the folder does not say who the model is.
    """
    identity = IdentityFile.parse(files.read_small(model / IDENTITY, LONGEST_IDENTITY_BYTES))
    return f"{MODELS}/{model.name}.{identity.uid.hex()}"


def _order(snapshot: str) -> tuple[int, ...]:
    match = ID.fullmatch(snapshot)
    return tuple(map(int, match.groups())) if match else ()


class ObjectSource:
    """An object that is being read, a chunk at a time."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self._bucket, self._key = bucket, key
        self.size_bytes = bucket.size_of(key)
        self._at = 0
        self._chunk = memoryview(b"")

    def readinto(self, block: memoryview) -> int:
        """OSError, SnapshotsAway."""
        if not self._chunk and self._at < self.size_bytes:
            stop = min(self._at + CHUNK_BYTES, self.size_bytes)
            self._chunk = memoryview(self._bucket.read(self._key, self._at, stop))
            self._at = stop
        count = min(len(self._chunk), len(block))
        block[:count] = self._chunk[:count]
        self._chunk = self._chunk[count:]
        return count


class ObjectStore:
    """Snapshots that are sent to a store of objects, and read from there."""

    is_local = False

    def __init__(self, model: Path, bucket: Bucket, require_owned: Callable[[], None]) -> None:
        """`model`: the model's folder. `require_owned` raises unless this server may write to the bucket."""
        self._model = model
        self._bucket = bucket
        self._require_owned = require_owned
        self._local = FolderStore(model / "snapshots")
        self.folder = self._local.folder

    def _key(self, snapshot: str, file: str) -> str:
        return f"{self._prefix(snapshot)}/{file}"

    def _prefix(self, snapshot: str) -> str:
        try:
            return f"{place_of(self._model)}/{snapshot}"
        except ValueError as error:
            raise UnknownSnapshot(model=self._model.name, snapshot=snapshot) from error

    def _index(self) -> Index:
        return Index.read(self._model) or Index()

    def _note(self, change: Callable[[Index], Index]) -> None:
        with _INDEXES:
            change(self._index()).write(self._model)

    def open(self) -> None:
        """At a start: take over what the store lists and the index lacks, and go on deleting what it was deleting."""
        known = self._index()
        try:
            place = place_of(self._model)
        except (OSError, ValueError):
            return  # whoever needs the identity says so
        listed = [name for name in self._bucket.names(place) if ID.fullmatch(name)]
        for snapshot in {*listed} - known.snapshots - known.deleting:
            # without a manifest it was never whole: it is sent again, or nobody knows of it
            with contextlib.suppress(FileNotFoundError):
                self._bucket.size_of(f"{place}/{snapshot}/{MANIFEST}")
                known = known.with_sent(snapshot)
        if known != (Index.read(self._model) or Index()):
            known.write(self._model)
        self.finish_deleting()

    def finish_deleting(self) -> None:
        """Delete in the store what is noted as being deleted."""
        for snapshot in self._index().deleting:
            self._require_owned()
            self._bucket.delete(self._key(snapshot, MANIFEST))
            self._bucket.delete_all(self._prefix(snapshot))
            self._note(lambda index, gone=snapshot: index.without(gone))  # type: ignore[misc]

    # What `Store` asks for.

    def names(self) -> list[str]:
        """Of the data folder and of the index. OSError."""
        return sorted({*self._local.names()} | self._index().snapshots)

    def holds(self, snapshot: str) -> bool:
        """Here or there."""
        return self._local.holds(snapshot) or snapshot in self._index().snapshots

    def size_of(self, snapshot: str, file: str) -> int:
        """OSError, SnapshotsAway."""
        if self._local.holds(snapshot):
            try:
                return self._local.size_of(snapshot, file)
            except FileNotFoundError:
                if self._local.holds(snapshot):
                    raise
        return self._bucket.size_of(self._key(snapshot, file))

    @contextmanager
    def opened(self, snapshot: str, file: str) -> Iterator[Source]:
        """OSError, SnapshotsAway."""
        with contextlib.ExitStack() as stack:
            source: Source | None = None
            if self._local.holds(snapshot):
                try:
                    source = stack.enter_context(self._local.opened(snapshot, file))
                except FileNotFoundError:
                    if self._local.holds(snapshot):  # not: it was sent just now
                        raise
            yield source or ObjectSource(self._bucket, self._key(snapshot, file))

    def was_verified(self, snapshot: str) -> bool:
        """Read back by this process, or read since: a store does not lose single bytes of what it has had."""
        return self._prefix(snapshot) in self._bucket.verified

    def remove(self, snapshot: str) -> None:
        """OSError; SnapshotsAway, and then it is still there."""
        if snapshot in self._index().snapshots:
            self._require_owned()  # asks the store, so that nothing is noted while it is away
            self._note(lambda index: index.with_deleting(snapshot))
            self._bucket.verified.discard(self._prefix(snapshot))
            with contextlib.suppress(SnapshotsAway):  # it is tried again
                self.finish_deleting()
        if self._local.holds(snapshot):
            self._local.remove(snapshot)

    def discard(self, snapshot: str) -> None:
        """Remove a snapshot that was not sent. What may be of it in the store is deleted later. OSError."""
        self._note(lambda index: index.with_deleting(snapshot))
        self._local.remove(snapshot)

    def removing(self) -> Iterable[str]:
        """Those that the store may still have."""
        return self._index().deleting

    def unsent(self) -> Sequence[str]:
        """Those of which a copy is in the data folder. OSError."""
        return [name for name in self._local.names() if ID.fullmatch(name)]

    def send(self, snapshot: str) -> None:
        """OSError of the disk; SnapshotsAway, SnapshotsOwned: the copy in the data folder stays."""
        if not self._local.holds(snapshot):
            return
        files_of = sorted(path.name for path in (self.folder / snapshot).iterdir())
        self._require_owned()
        digests = {}
        for file in sorted(files_of, key=lambda name: name == MANIFEST):
            if file == MANIFEST:
                self._require_owned()
            with opened_file(self.folder / snapshot / file) as source:
                digests[file] = self._sent(source, self._key(snapshot, file))
        for file, digest in digests.items():
            self._read_back(self._key(snapshot, file), digest)
        self._bucket.verified.add(self._prefix(snapshot))
        self._note(lambda index: index.with_sent(snapshot))
        self._local.remove(snapshot)

    def send_unsent(self) -> str:
        """Send all that is only in the data folder; the newest one's name, or "".

        Of the automatic ones only the newest is sent: the others were to be replaced by it. Raises as `send` does.
        """
        found = sorted(self.unsent(), key=_order, reverse=True)
        for snapshot in list(filter(self._is_automatic, found))[1:]:
            self.discard(snapshot)
            found.remove(snapshot)
        for snapshot in found:
            self.send(snapshot)
        self.finish_deleting()
        return found[0] if found else ""

    def _is_automatic(self, snapshot: str) -> bool:
        """False for one that cannot be read, too: it stays."""
        try:
            return json.loads((self.folder / snapshot / MANIFEST).read_bytes())["automatic"] is True
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _sent(self, source: Source, key: str) -> str:
        """Send a file; its digest."""
        digest = xxhash.xxh3_128()
        block = memoryview(bytearray(CHUNK_BYTES))

        def parts() -> Iterator[bytes]:
            while count := source.readinto(block):
                if not self.folder.exists():  # the model was deleted
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), key)
                digest.update(block[:count])
                yield bytes(block[:count])

        self._bucket.write(key, parts())
        return digest.hexdigest()

    def _read_back(self, key: str, expected: str) -> None:
        """SnapshotsAway unless the store has what was sent."""
        digest = xxhash.xxh3_128()
        try:
            source = ObjectSource(self._bucket, key)
            block = memoryview(bytearray(min(CHUNK_BYTES, max(1, source.size_bytes))))
            while count := source.readinto(block):
                digest.update(block[:count])
        except OSError as error:
            raise self._bucket.away(f"what was sent cannot be read back: {files.reason(error)}") from None
        if digest.hexdigest() != expected:
            raise self._bucket.away("what is read back is not what was sent")
