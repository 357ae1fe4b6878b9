"""A server's place in a store of objects: whose it is, which models' snapshots lie there, and what is to be deleted.

An owner marker in the store names one start of one server. It is written at a start and read again before each snapshot's
manifest, so of two servers that were given one URL the later start has it, and the other one's snapshots stay in its data
folder. A start of another server is refused by name unless it is told to take over. The data folder notes where its
snapshots are, so that it is not started without them.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pushstep.proto.errors import PushstepError, SnapshotsAway, SnapshotsOwned, StorageFailed

from ..storage import files
from ..storage.model_folder import TRASH_PREFIX
from .bucket import Bucket
from .object_store import ObjectStore, place_of

log = logging.getLogger("pushstep.remote")
MARKER: Final = "owner.json"
NOTE: Final = "snapshots-store.json"
LONGEST_NOTE_BYTES: Final = 16 << 20
_Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class _Read(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class Marker(_Read):
    """The owner marker, in the store."""

    server: _Hex
    start: _Hex
    host: Annotated[str, Field(max_length=300)]
    folder: Annotated[str, Field(max_length=5000)]

    def in_words(self) -> str:
        """Who that is."""
        return f"another server (folder {self.folder} on {self.host})"


class Note(_Read):
    """What a data folder notes of its store."""

    server: _Hex
    store: str
    # models that are only in the store are to be brought into the data folder
    adopts: bool = False
    # the places of models that were deleted
    trash: list[str] = []


class Remote:
    """One server's snapshots at a URL. All methods but `store` block."""

    def __init__(self, bucket: Bucket, data: Path) -> None:
        self.bucket = bucket
        self._data = data
        self._start = secrets.token_hex(16)
        self._lock = threading.Lock()
        self._note = Note(server=secrets.token_hex(16), store=bucket.shown)

    @property
    def adopts(self) -> bool:
        """True if the data folder may lack models that the store has."""
        return self._note.adopts

    def store(self, model: Path) -> ObjectStore:
        """The snapshots of a model, by its folder."""
        return ObjectStore(model, self.bucket, self.require_owned)

    def open(self, *, takeover: bool) -> None:
        """Make the place this server's. SnapshotsOwned, SnapshotsAway, StorageFailed."""
        noted = noted_store(self._data)
        marker = self._marker()
        if marker is None and noted is not None and not takeover:
            problem = f"it has no {MARKER}, and this server has kept its snapshots at {noted.store}; is it that place?"
            raise self.bucket.away(problem)
        is_ours = noted is not None and marker is not None and marker.server == noted.server
        if marker is not None and not is_ours and not takeover:
            raise SnapshotsOwned(store=self.bucket.shown, owner=marker.in_words())
        before = noted or self._note
        adopts = before.adopts or noted is None or takeover
        self._write_note(before.model_copy(update={"store": self.bucket.shown, "adopts": adopts}))
        mine = Marker(
            server=self._note.server,
            start=self._start,
            host=socket.gethostname()[:300],
            folder=str(self._data.resolve())[:5000],
        )
        content = mine.model_dump_json().encode()
        if marker is not None:
            self.bucket.write_small(MARKER, content)
        elif not self.bucket.create_small(MARKER, content):
            log.info("another server has just written its marker")
        self.require_owned()

    def require_owned(self) -> None:
        """SnapshotsOwned if another start has the place now; SnapshotsAway also if the marker is gone."""
        marker = self._marker()
        if marker is None:
            raise self.bucket.away(f"it has no {MARKER} any more")
        if marker.start != self._start:
            raise SnapshotsOwned(store=self.bucket.shown, owner=marker.in_words())

    def _marker(self) -> Marker | None:
        try:
            return Marker.model_validate_json(self.bucket.read_small(MARKER))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self.bucket.away(f"{MARKER}: {files.reason(error)}") from None
        except ValidationError as error:
            raise StorageFailed(
                f"what is at {self.bucket.shown}/{MARKER} is no owner marker: choose another URL",
                path=self.bucket.shown,
                problem="no owner marker",
            ) from error

    def _write_note(self, note: Note) -> None:
        files.write_durably(self._data / NOTE, note.model_dump_json(), NOTE)
        self._note = note

    def adopted(self) -> None:
        """All models of the store are in the data folder."""
        with self._lock:
            self._write_note(self._note.model_copy(update={"adopts": False}))

    # Deleted models.

    def forget_trash(self) -> None:
        """At a start: note the models that were being deleted, before their folders go."""
        models = self._data / "models"
        if models.is_dir():
            for name in os.listdir(models):
                if name.startswith(TRASH_PREFIX):
                    self.forget(models / name)

    def forget(self, model: Path) -> None:
        """Note that a model's snapshots are to be deleted; its folder is about to go. StorageFailed."""
        try:
            place = place_of(model)
        except (OSError, ValueError):
            return  # it never had one
        name = place.rpartition("/")[2].rpartition(".")[2]
        with self._lock:
            # a folder in the trash has another name, and the same uid
            trash = sorted({*self._note.trash, name})
            self._write_note(self._note.model_copy(update={"trash": trash}))

    @property
    def has_trash(self) -> bool:
        """True if something is to be deleted."""
        return bool(self._note.trash)

    def empty_trash(self) -> None:
        """Delete the snapshots of deleted models. SnapshotsAway: it is tried again."""
        self.require_owned()
        places = self.bucket.names("models")
        for uid in list(self._note.trash):
            for place in places:
                if place.endswith(f".{uid}"):
                    self.bucket.delete_all(f"models/{place}")
            with self._lock:
                trash = [other for other in self._note.trash if other != uid]
                self._write_note(self._note.model_copy(update={"trash": trash}))


def noted_store(data: Path) -> Note | None:
    """What a data folder notes of the store of its snapshots; None if it has all of them itself. StorageFailed."""
    try:
        return Note.model_validate_json(files.read_small(data / NOTE, LONGEST_NOTE_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        problem = files.reason(error) if isinstance(error, OSError) else "it has other bytes"
        raise StorageFailed(f"cannot read {NOTE}: {problem}", path=NOTE, problem=problem) from error


def remote_of(data: Path, url: str) -> Remote | None:
    """The store of a data folder's snapshots, not opened; None if they are in the folder itself.

    StorageFailed if the folder's snapshots are elsewhere, or the URL is of no use.
    """
    if url:
        return Remote(Bucket(url), data)
    noted = noted_store(data)
    if noted is not None:
        problem = (
            f"the snapshots of {data} are kept at {noted.store}: pass --snapshots with that URL (or copy them back into "
            f"each model's folder `snapshots`, and remove {NOTE})"
        )
        raise StorageFailed(problem, path=str(data), problem=problem)
    return None


def retried(error: PushstepError) -> bool:
    """True if a start waits for what the error says to end."""
    return isinstance(error, SnapshotsAway)
