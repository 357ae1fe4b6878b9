"""What outlives a server process: a model's identity and its snapshots, in memory, behind the server's own folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pushstep.proto.errors import UnknownSnapshot
from pushstep.server.arenas.arenas_copy import ArenasCopy
from pushstep.server.arenas.extras import Extras
from pushstep.server.captures.capture import PARAMETER, Capture
from pushstep.server.pacing.pace import AT_ONCE, Pace
from pushstep.server.storage.chains import Base
from pushstep.server.storage.model_folder import IdentityFile, ModelFolder, Recovered
from pushstep.server.storage.saved_state import saved_state
from pushstep.server.storage.snapshots import Snapshots
from pushstep.server.storage.store import FolderStore

from .story import Books

NOWHERE = Path("/nowhere/models")


class Facts(dict[str, Any]):
    """What a snapshot's manifest holds, with the witness's books of the same moment."""

    books: Books


@dataclass(frozen=True)
class Snapshot:
    """One snapshot."""

    manifest: str
    copy: ArenasCopy


@dataclass
class Disk:
    """One model's folder. A process that is killed keeps a disk of its own, which nobody reads."""

    identity: str = ""
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    # of every snapshot that there ever was: one may be removed while it is being restored
    books: dict[str, Books] = field(default_factory=dict)

    def left(self) -> Disk:
        """As the next process finds it."""
        return Disk(self.identity, dict(self.snapshots), dict(self.books))

    @property
    def newest(self) -> str:
        """The newest snapshot."""
        return MemorySnapshots(self).ids()[0]


class MemorySnapshots(Snapshots):
    """The snapshots on such a disk."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(FolderStore(NOWHERE / "m" / "snapshots"))
        self._disk = disk

    def ids(self, older_than: str | None = None) -> list[str]:
        return sorted(
            self._disk.snapshots, key=lambda name: list(map(int, re.findall("[0-9]+", name))), reverse=True
        )

    def write(
        self,
        facts: Mapping[str, Any],
        copy: Capture,
        *,
        automatic: bool,
        base: Base | None = None,
        pace: Pace = AT_ONCE,
    ) -> dict[str, Any]:
        assert isinstance(facts, Facts)
        snapshot = f"t{copy.timeline}-v{copy.version}-e{facts['edit']}-{len(self._disk.books) + 1}"
        manifest = json.dumps({**facts, "id": snapshot, "automatic": automatic, "files": [], "created": 0.0})
        self._disk.snapshots[snapshot] = Snapshot(manifest, _read(copy))
        self._disk.books[snapshot] = facts.books
        return dict(json.loads(manifest))

    def read(self, snapshot: str) -> tuple[dict[str, Any], ArenasCopy]:
        if snapshot not in self._disk.snapshots:
            raise UnknownSnapshot(model="m", snapshot=snapshot)
        kept = self._disk.snapshots[snapshot]
        return json.loads(kept.manifest), kept.copy

    def prune(self, keep: int, made_of: Callable[[int, int], bool], pace: Pace = AT_ONCE) -> int:
        every = self.ids()
        own = (name for name in every if made_of(*list(map(int, re.findall("[0-9]+", name)))[:2]))
        for snapshot in {*every[keep:]} - {next(own, "")}:
            del self._disk.snapshots[snapshot]
        return 0


def _read(content: Capture) -> ArenasCopy:
    """What a capture holds, a piece at a time, as the server's own snapshots read it."""
    arenas = [
        {
            name: torch.cat([part.clone().reshape(-1) for part in content.whole(arena.index, name)])
            for name in content.names(arena.index)
        }
        for arena in content.layout.arenas
    ]
    parameters = [flats.pop(PARAMETER) for flats in arenas]
    extras = content.extras
    assert isinstance(extras, Extras)
    layout, timeline, version = content.layout, content.timeline, content.version
    return ArenasCopy(
        layout, timeline, version, parameters, arenas, content.steps, extras, list(content.lineage)
    )


class MemoryFolder(ModelFolder):
    """A model's folder on such a disk."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(NOWHERE / "m")
        self._disk = disk
        self.snapshots = MemorySnapshots(disk)

    def sweep(self) -> None:
        pass

    def set_aside(self) -> None:
        pass

    def recover(self, at_most: int | None = None) -> Recovered | None:
        identity = IdentityFile.parse(self._disk.identity.encode())
        found = self.snapshots.newest(
            lambda timeline, version: (
                identity.made_of(timeline, version) and (at_most is None or version <= at_most)
            )
        )
        return None if found is None else Recovered(identity, saved_state(*found, self.name))

    def write_identity(self, identity: IdentityFile) -> None:
        self._disk.identity = identity.dump()
