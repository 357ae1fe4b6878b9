"""Which of a model's snapshots a store has: noted in the data folder, because a store's list may be late or incomplete."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..storage import files
from ..storage.snapshot_manifest import ID

log = logging.getLogger("pushstep.remote")
NAME: Final = "stored.json"
LONGEST_BYTES: Final = 64 << 20
_Id = Annotated[str, Field(pattern=ID.pattern)]


class _Saved(BaseModel):
    """The file."""

    model_config = ConfigDict(strict=True, extra="ignore")

    snapshots: list[_Id]
    deleting: list[_Id] = []


@dataclass(frozen=True, slots=True)
class Index:
    """What is noted of one model: the snapshots that the store has, and those that are being deleted there."""

    snapshots: frozenset[str] = frozenset()
    deleting: frozenset[str] = frozenset()

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """What a model's folder notes. None if it notes nothing, or nothing that can be read."""
        try:
            saved = _Saved.model_validate_json(files.read_small(folder / NAME, LONGEST_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            log.warning("%s/%s cannot be read (%s)", folder.name, NAME, type(error).__name__)
            return None
        return cls(frozenset(saved.snapshots), frozenset(saved.deleting))

    def write(self, folder: Path) -> None:
        """Note it, durably. StorageFailed, DiskFull."""
        saved = _Saved(snapshots=sorted(self.snapshots), deleting=sorted(self.deleting))
        files.write_durably(folder / NAME, saved.model_dump_json(), f"models/{folder.name}/{NAME}")

    def with_sent(self, snapshot: str) -> Index:
        """The store has it."""
        return Index(self.snapshots | {snapshot}, self.deleting - {snapshot})

    def with_deleting(self, snapshot: str) -> Index:
        """It is being deleted."""
        return Index(self.snapshots - {snapshot}, self.deleting | {snapshot})

    def without(self, snapshot: str) -> Index:
        """It is gone."""
        return Index(self.snapshots - {snapshot}, self.deleting - {snapshot})
