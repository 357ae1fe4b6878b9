"""One model's folder on the disk: its snapshots, and the file that says who it is.

A model's identity (uid and timeline) lies outside its snapshots and is fsynced before use, so that no restore brings
an old timeline back. A folder that goes is renamed first: what is half removed never comes back at a start.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pushstep.proto.errors import ModelNotLoaded

from . import files
from .arena import ArenasCopy
from .ledger import is_before
from .snapshot_manifest import ID, Count, in_words, require_understood
from .snapshots import Snapshots

log = logging.getLogger("pushstep.model_folder")
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
    # None in files of before it was kept
    lineage: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] | None = None


@dataclass(frozen=True, slots=True)
class IdentityFile:
    """Who a model is. `clean_version`: the version whose snapshot holds every acknowledged push; None: nobody knows.

    `lineage`: the (timeline, version) that each restore went on from; None in files of before it was kept.
    """

    uid: bytes
    timeline: int
    clean_version: int | None
    lineage: Sequence[tuple[int, int]] | None

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(
            {
                "uid": self.uid.hex(),
                "timeline": self.timeline,
                "clean": self.clean_version is not None,
                "version": self.clean_version,
                "lineage": self.lineage,
            }
        )

    @staticmethod
    def parse(text: bytes) -> IdentityFile:
        """What `dump` wrote. ValidationError if it is something else."""
        saved = _Saved.model_validate_json(text)
        lineage = None if saved.lineage is None else [(ended, at) for ended, at in saved.lineage]
        return IdentityFile(
            bytes.fromhex(saved.uid), saved.timeline, saved.version if saved.clean else None, lineage
        )

    def made_of(self, timeline: int, version: int) -> bool:
        """Whether the model was made from a version, or a restore had undone it."""
        return timeline == self.timeline or self.lineage is None or is_before(self.lineage, timeline, version)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a start finds of a model: who it is, and the snapshot from which it goes on."""

    identity: IdentityFile
    manifest: dict[str, Any]
    copy: ArenasCopy


class ModelFolder:
    """The folder of a name; there need not be one yet. Whoever writes into it, or removes it, does so alone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._name = path.name
        self._identity = path / "identity.json"
        self.snapshots = Snapshots(path / "snapshots")

    def recover(self) -> Recovered | None:
        """What there is to go on from, verified; None if nothing ever was: no model, or one without a snapshot.

        ModelNotLoaded, or another named error, if there is something and it cannot be loaded.
        """
        if not self._path.is_dir():
            raise ModelNotLoaded(model=self._name, problem=f"models/{self._name} is no folder")
        files.sweep(self._path, f".{self._identity.name}-*")
        self.snapshots.sweep()
        ids = self.snapshots.ids()
        identity = self._read_identity(bool(ids))
        if identity is None:
            return None
        if not ids:
            # its workers will be told model_lost, which is true; the folder stays as it is
            log.warning("model %s has no snapshot: not loaded", self._name)
            return None
        last = max(int(match[1]) for snapshot in ids if (match := ID.fullmatch(snapshot)))
        if last > identity.timeline:
            problem = f"its snapshots go to timeline {last}, identity.json says {identity.timeline}"
            raise ModelNotLoaded(model=self._name, problem=problem)
        damaged: list[str] = []
        found = self.snapshots.newest(identity.made_of)
        if found is None:
            found = self.snapshots.newest(damaged=damaged)
            if found is not None:
                log.error(
                    "model %s: only a snapshot that a restore had undone verifies: loading it", self._name
                )
        if found is None:
            problem = f"none of its {len(ids)} snapshots verifies: {'; '.join(damaged[:DAMAGED_SHOWN])}"
            raise ModelNotLoaded(model=self._name, problem=problem)
        require_understood(found[0], self._name)
        return Recovered(identity, *found)

    def _read_identity(self, is_needed: bool) -> IdentityFile | None:
        """None if there is none and none is needed: a creation that broke off, which nobody was told of."""
        try:
            return IdentityFile.parse(files.read_small(self._identity, LONGEST_IDENTITY_BYTES))
        except FileNotFoundError as error:
            if not is_needed:
                return None
            raise ModelNotLoaded(model=self._name, problem="identity.json is missing") from error
        except OSError as error:
            raise ModelNotLoaded(model=self._name, problem=f"identity.json: {files.reason(error)}") from error
        except ValidationError as error:
            raise ModelNotLoaded(model=self._name, problem=f"identity.json: {in_words(error)}") from error

    def write_identity(self, identity: IdentityFile) -> None:
        """Say on the disk who it is. StorageFailed."""
        folder, name = self._path, f"models/{self._name}/{self._identity.name}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for parent in (folder.parent, folder.parent.parent):
                files.fsync(parent)  # the names of folders just made must last, too
        except OSError as error:
            raise files.refusal(name, error, folder.parent) from error
        files.write_durably(self._identity, identity.dump(), name)

    def set_aside(self) -> None:
        """Keep the files of a model that is not loaded out of the way of a new one of its name. StorageFailed."""
        aside = self._path.with_name(f".lost-{self._name}-{secrets.token_hex(4)}")
        try:
            if os.path.lexists(self._path):
                os.replace(self._path, aside)
                log.warning("what was left of an earlier model %s is now models/%s", self._name, aside.name)
        except OSError as error:
            raise files.refusal(f"models/{self._name}", error, self._path.parent) from error

    def remove(self) -> None:
        """Remove it with everything in it. StorageFailed."""
        trash = self._path.with_name(f"{TRASH_PREFIX}{secrets.token_hex(8)}")
        try:
            os.replace(self._path, trash)
            files.remove(trash)
        except OSError as error:
            raise files.refusal(f"models/{self._name}", error, self._path.parent) from error


def model_folders(models: Path) -> list[str]:
    """The names of what lies in the models' folder, hidden ones left out. StorageFailed if it cannot be read."""
    files.sweep(models, f"{TRASH_PREFIX}*")  # a process died while it removed them
    try:
        return sorted(name for name in os.listdir(models) if not name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise files.unreadable("models", error) from error
