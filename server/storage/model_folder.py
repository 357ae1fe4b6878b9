"""One model's folder on disk: its snapshots, and the file with its identity.

A model's identity (uid and timeline) lies outside its snapshots and is fsynced before use, so that no restore brings
an old timeline back. A folder is renamed before it is removed, so that a half-removed one never comes back at a start.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pushstep.proto.errors import ModelNotLoaded

from ..coordinator.commits import is_before
from . import files
from .saved_state import SavedState, saved_state
from .snapshot_manifest import ID, Count, in_words
from .snapshots import Snapshots
from .store import FolderStore, Store

log = logging.getLogger("pushstep.model_folder")
IDENTITY: Final = "identity.json"
TRASH_PREFIX: Final = ".trash-"
# A restore adds some 20 bytes.
LONGEST_IDENTITY_BYTES: Final = 64 << 20
DAMAGED_SHOWN: Final = 3


class _Saved(BaseModel):
    """identity.json."""

    model_config = ConfigDict(strict=True, extra="ignore")

    uid: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    timeline: Annotated[Count, Field(ge=1)]
    clean: bool
    version: Count | None = None
    # None in files written before it was kept
    lineage: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] | None = None
    epochs: Count = 0
    crashed: list[Count] = []


@dataclass(frozen=True, slots=True)
class IdentityFile:
    """Who a model is.

    `clean_version`: the version whose snapshot holds every acknowledged push; None: unknown. `lineage`: the
    (timeline, version) that each restore continued from; None in files written before it was kept.
    """

    uid: bytes
    timeline: int
    clean_version: int | None
    lineage: Sequence[tuple[int, int]] | None
    # no worker was given a higher epoch; 0 in files written before it was kept
    epochs: int = 0
    # the timelines that a crash has ended, which may have undone what was acknowledged
    crashed: Sequence[int] = ()

    def rolled_back(self, timeline: int, version: int) -> int:
        """How many versions up to one that a worker was told of, on its timeline, a crash has undone."""
        if timeline not in self.crashed or not self.lineage:
            return 0
        return max(0, version - dict(self.lineage).get(timeline, self.lineage[-1][1]))

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(
            {
                "uid": self.uid.hex(),
                "timeline": self.timeline,
                "clean": self.clean_version is not None,
                "version": self.clean_version,
                "lineage": self.lineage,
                "epochs": self.epochs,
                "crashed": list(self.crashed),
            }
        )

    @staticmethod
    def parse(text: bytes) -> IdentityFile:
        """What `dump` wrote. ValidationError if it is something else."""
        saved = _Saved.model_validate_json(text)
        lineage = None if saved.lineage is None else [(ended, at) for ended, at in saved.lineage]
        return IdentityFile(
            bytes.fromhex(saved.uid),
            saved.timeline,
            saved.version if saved.clean else None,
            lineage,
            saved.epochs,
            saved.crashed,
        )

    def made_of(self, timeline: int, version: int) -> bool:
        """True if the model descends from (timeline, version), or its lineage is unknown.

        False if a restore undid it.
        """
        return timeline == self.timeline or self.lineage is None or is_before(self.lineage, timeline, version)

    def continued_from(self, timeline: int, version: int) -> IdentityFile:
        """The identity once what came behind (timeline, version) is lost: on the next timeline, as after a crash."""
        before = [entry for entry in self.lineage or () if entry[0] < timeline]
        return replace(
            self,
            timeline=self.timeline + 1,
            clean_version=None,
            lineage=[*before, (timeline, version)],
            crashed=[*self.crashed, self.timeline],
        )


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a start finds of a model: its identity, and the snapshot from which it continues."""

    identity: IdentityFile
    state: SavedState
    # once it was brought forward by its journal: nothing that was acknowledged can be missing
    proven: bool = False


class ModelFolder:
    """The folder of a name, which need not exist yet.

    Only one caller at a time may write into it or remove it.
    """

    def __init__(self, path: Path, store: Store | None = None) -> None:
        """`store`: where its snapshots are kept; None: in the folder."""
        self.path = path
        self.name = path.name
        self._identity = path / IDENTITY
        self.snapshots = Snapshots(store or FolderStore(path / "snapshots"))
        self.journal = path / "journal"

    def sweep(self) -> None:
        """Remove what interrupted writes left behind."""
        if self.path.is_dir():
            files.sweep(self.path, f".{self._identity.name}-*")
            self.snapshots.sweep()

    def recover(self, at_most: int | None = None) -> Recovered | None:
        """The verified snapshot to continue from, if need be of a version `at_most`. None if there is none. Writes nothing.

        ModelNotLoaded, or another named error, if there is something that cannot be loaded.
        """
        if not self.path.is_dir():
            raise ModelNotLoaded(model=self.name, problem=f"models/{self.name} is no folder")
        ids = self.snapshots.ids()
        identity = self.read_identity(bool(ids))
        if identity is None:
            return None
        if not ids:
            # its workers get model_lost, which is true; the folder stays as it is
            log.warning("model %s has no snapshot: not loaded", self.name, extra={"model": self.name})
            return None
        last = max(int(match[1]) for snapshot in ids if (match := ID.fullmatch(snapshot)))
        if last > identity.timeline:
            problem = f"its snapshots go to timeline {last}, identity.json says {identity.timeline}"
            raise ModelNotLoaded(model=self.name, problem=problem)
        damaged: list[str] = []

        def is_wanted(timeline: int, version: int) -> bool:
            return identity.made_of(timeline, version) and (at_most is None or version <= at_most)

        found = self.snapshots.newest(is_wanted)
        if found is None and at_most is not None:
            raise ModelNotLoaded(model=self.name, problem=f"no snapshot goes back to version {at_most}")
        if found is None:
            found = self.snapshots.newest(damaged=damaged)
            if found is not None:
                log.error(
                    "model %s: only a snapshot that a restore had undone verifies: loading it",
                    self.name,
                    extra={"model": self.name},
                )
        if found is None:
            problem = f"none of its {len(ids)} snapshots verifies: {'; '.join(damaged[:DAMAGED_SHOWN])}"
            raise ModelNotLoaded(model=self.name, problem=problem)
        return Recovered(identity, saved_state(*found, self.name))

    def read_identity(self, is_needed: bool) -> IdentityFile | None:
        """The identity file.

        None if it is missing and not needed: a creation broke off before anyone was told of it. ModelNotLoaded if it
        is needed, or cannot be read.
        """
        try:
            return IdentityFile.parse(files.read_small(self._identity, LONGEST_IDENTITY_BYTES))
        except FileNotFoundError as error:
            if not is_needed:
                return None
            raise ModelNotLoaded(model=self.name, problem="identity.json is missing") from error
        except OSError as error:
            raise ModelNotLoaded(model=self.name, problem=f"identity.json: {files.reason(error)}") from error
        except ValidationError as error:
            raise ModelNotLoaded(model=self.name, problem=f"identity.json: {in_words(error)}") from error

    def write_identity(self, identity: IdentityFile) -> None:
        """Write the identity to disk. StorageFailed."""
        folder, name = self.path, f"models/{self.name}/{self._identity.name}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for parent in (folder.parent, folder.parent.parent):
                files.fsync(parent)  # the names of new folders must be durable, too
        except OSError as error:
            raise files.refusal(name, error, folder.parent) from error
        files.write_durably(self._identity, identity.dump(), name)

    def set_aside(self) -> None:
        """Rename the folder of a model that is not loaded, so that a new model can have its name.

        StorageFailed.
        """
        aside = self.path.with_name(f".lost-{self.name}-{secrets.token_hex(4)}")
        try:
            if os.path.lexists(self.path):
                os.replace(self.path, aside)
                files.fsync(self.path.parent)
                log.warning("what was left of an earlier model %s is now models/%s", self.name, aside.name)
        except OSError as error:
            raise files.refusal(f"models/{self.name}", error, self.path.parent) from error

    def remove(self) -> None:
        """Remove the folder with everything in it. StorageFailed."""
        trash = self.path.with_name(f"{TRASH_PREFIX}{secrets.token_hex(8)}")
        try:
            os.replace(self.path, trash)
            files.fsync(self.path.parent)  # or a power cut could bring a half of it back
            files.remove(trash)
        except OSError as error:
            raise files.refusal(f"models/{self.name}", error, self.path.parent) from error


def model_folders(models: Path) -> list[str]:
    """The names in the models' folder, except hidden ones. StorageFailed if it cannot be read."""
    try:
        return sorted(name for name in os.listdir(models) if not name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise files.unreadable("models", error) from error


def sweep_models(models: Path) -> None:
    """Remove the folders that a process was removing when it died."""
    files.sweep(models, f"{TRASH_PREFIX}*")
