"""One model's folder on the disk: its snapshots, and the file that says who it is.

A model's identity (uid and timeline) lies outside its snapshots and is fsynced before use, so that no restore brings
an old timeline back. A folder that goes is renamed first: what is half removed never comes back at a start.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pushstep.proto.errors import StorageFailed

from .ledger import is_before
from .snapshots import Snapshots, fsync, reason, write_durably

log = logging.getLogger("pushstep.model_folder")


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
    def parse(text: str) -> IdentityFile:
        """What `dump` wrote. ValueError, KeyError or TypeError if it is damaged."""
        saved = json.loads(text)
        clean_version = int(saved["version"]) if saved["clean"] else None
        kept = saved.get("lineage")
        lineage = None if kept is None else [(int(ended), int(at)) for ended, at in kept]
        return IdentityFile(bytes.fromhex(saved["uid"]), int(saved["timeline"]), clean_version, lineage)

    def made_of(self, timeline: int, version: int) -> bool:
        """Whether the model was made from a version, or a restore had undone it."""
        return timeline == self.timeline or self.lineage is None or is_before(self.lineage, timeline, version)


class ModelFolder:
    """The folder of a name; there need not be one yet. Whoever writes into it, or removes it, does so alone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity = path / "identity.json"
        self.snapshots = Snapshots(path / "snapshots")

    def has_identity(self) -> bool:
        """Whether a model was ever acknowledged here."""
        return self._identity.exists()

    def identity(self) -> IdentityFile | None:
        """Who it is; None, and a line in the log, if its file is damaged."""
        try:
            return IdentityFile.parse(self._identity.read_text())
        except (ValueError, KeyError, TypeError) as error:
            log.error("model %s: identity.json is damaged (%r): not loaded", self._path.name, error)
            return None

    def write_identity(self, identity: IdentityFile) -> None:
        """Say on the disk who it is. StorageFailed."""
        folder = self._path
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for parent in (folder.parent, folder.parent.parent):
                fsync(parent)  # the names of folders just made must last, too
        except OSError as error:
            raise StorageFailed(path=folder, problem=reason(error)) from error
        write_durably(self._identity, identity.dump())

    def set_aside(self) -> None:
        """Keep the files of a model that could not be loaded out of the way of the new one of its name."""
        name = self._path.name
        aside = self._path.with_name(f".lost-{name}-{secrets.token_hex(4)}")
        try:
            if self._path.exists():
                os.replace(self._path, aside)
                log.warning("what was left of an earlier model %s is now %s", name, aside)
        except OSError as error:
            raise StorageFailed(path=self._path, problem=reason(error)) from error

    def remove(self) -> None:
        """Remove it with everything in it. StorageFailed."""
        trash = self._path.with_name(f".trash-{secrets.token_hex(8)}")
        try:
            os.replace(self._path, trash)
            shutil.rmtree(trash)
        except OSError as error:
            raise StorageFailed(path=self._path, problem=reason(error)) from error
