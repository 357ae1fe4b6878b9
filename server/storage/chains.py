"""Chains of snapshots: a whole one, and links that each hold what has changed since the one before.

A link names its base by id and by the digest of its manifest, so the chain is verified with it. A chain has a bounded number
of links, and of bytes in them: a start reads them all. A snapshot that was deleted, and on which another is based, is only
hidden: a mark lies beside it. It goes with the last one that needs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pushstep.proto.errors import SnapshotDamaged, SnapshotUnsupported, UnknownSnapshot
from pushstep.proto.wire.layout import Layout

from ..captures.capture import Capture
from . import files
from .snapshot_files import Rows, link_bytes, whole_bytes
from .snapshot_manifest import ID, MOST_LINKS

# Links of a chain take this share of a whole snapshot at most, each and together: a start reads so much more.
LARGEST_SHARE: Final = 0.5
HIDDEN: Final = "deleted-"
Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Base:
    """A snapshot that the next one may be based on, if the model has not been replaced since."""

    id: str
    digest: str
    timeline: int
    version: int
    # of its parameters and groups: those of the model must be the same
    manifest_hash: int
    links: int
    link_bytes: int


def base_of(manifest: Mapping[str, Any], layout: Layout) -> Base | None:
    """A snapshot as the base of the next one. None if it is no snapshot as it lies on the disk."""
    if "digest" not in manifest:
        return None
    under = manifest.get("base") or {"links": 0, "bytes": 0}
    return Base(
        manifest["id"],
        manifest["digest"],
        int(manifest["timeline"]),
        int(manifest["version"]),
        layout.manifest_hash,
        int(under["links"]),
        int(under["bytes"]),
    )


def changed_rows(content: Capture, base: Base | None) -> Rows | None:
    """The rows of each table that have changed since a base; None if a whole snapshot is to be written."""
    if base is None or not content.tables or base.links >= MOST_LINKS:
        return None
    if content.has_averages:  # each step moves all of them
        return None
    if base.timeline != content.timeline or base.version > content.version:
        return None
    if base.manifest_hash != content.layout.manifest_hash:
        return None
    most_bytes = LARGEST_SHARE * whole_bytes(content) - base.link_bytes
    rows = {index: content.touched(index, base.version) for index in sorted(content.tables)}
    return rows if link_bytes(content, rows) <= most_bytes else None


def order_of(snapshot: str) -> tuple[int, ...]:
    """What sorts ids: by timeline, version, edit, number."""
    match = ID.fullmatch(snapshot)
    return tuple(map(int, match.groups())) if match else ()


def chain_of(snapshot: str, manifest_of: Callable[[str], Manifest]) -> list[Manifest]:
    """The manifests of a chain, the whole snapshot first. `manifest_of` raises what reading one does.

    SnapshotDamaged if a base is missing, damaged or another one.
    """
    chain = [manifest_of(snapshot)]
    while (base := chain[-1].get("base")) is not None:
        name = base["id"]
        if len(chain) > MOST_LINKS or order_of(name) >= order_of(chain[-1]["id"]):
            raise SnapshotUnsupported(snapshot=snapshot, problem="its chain has no end")
        try:
            found = manifest_of(name)
        except UnknownSnapshot as error:
            raise SnapshotDamaged(snapshot=snapshot, problem=f"its base {name} is missing") from error
        except SnapshotDamaged as error:
            problem = f"its base {name} is damaged: {error.fields['problem']}"
            raise SnapshotDamaged(snapshot=snapshot, problem=problem) from error
        if found["digest"] != base["digest"]:
            raise SnapshotDamaged(snapshot=snapshot, problem=f"its base {name} is another one")
        if found["parameters"] != chain[0]["parameters"]:
            raise SnapshotUnsupported(snapshot=snapshot, problem=f"its base {name} has other parameters")
        chain.append(found)
    return chain[::-1]


class HiddenSnapshots:
    """The marks of deleted snapshots that others are based on, in the folder of the snapshots."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> set[str]:
        """The ids that are marked. OSError."""
        try:
            found = os.listdir(self._folder)
        except FileNotFoundError:
            return set()
        return {name.removeprefix(HIDDEN) for name in found if name.startswith(HIDDEN)}

    def hide(self, snapshot: str) -> None:
        """Mark one. OSError."""
        descriptor = os.open(
            self._folder / f"{HIDDEN}{snapshot}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        files.fsync(self._folder)

    def forget(self, snapshot: str) -> None:
        """Remove a mark: the snapshot is gone. OSError."""
        os.unlink(self._folder / f"{HIDDEN}{snapshot}")
        files.fsync(self._folder)
