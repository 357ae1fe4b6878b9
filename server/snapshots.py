"""Snapshots: a model at one version as files, complete and verified or not there at all.

A snapshot is a folder: one safetensors file per arena (the parameters and each optimizer state, flat) and a
manifest that lists every file with its range and SHA-256, and holds the groups, hooks, policy, step counts and
worker table. It is written under a temporary name, every file and the folder fsynced, then renamed, then the parent
fsynced. What is damaged is reported and skipped; nothing that cannot be read is ever deleted or loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pushstep.optim import RULES
from pushstep.proto import dtypes
from pushstep.proto.errors import SnapshotDamaged, StorageFailed, UnknownSnapshot
from pushstep.proto.layout import Layout
from pushstep.proto.types_pb2 import Manifest, ParamGroup

from .arena import ArenasCopy
from .extras import Extras

log = logging.getLogger("pushstep.snapshots")
FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
PARAMETER: Final = "parameter"
EXTRAS: Final = "extras.safetensors"
EXPORT_PREFIX: Final = "tmp-export-"
# Snapshots that the server took by itself: the newest ones are kept, an operator's are kept until deleted.
KEPT_AUTOMATIC: Final = 2
_ID: Final = re.compile(r"t(\d+)-v(\d+)-e(\d+)-(\d+)")


class Snapshots:
    """The snapshots of one model, in one folder. All methods block: call them in a thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, facts: Mapping[str, Any], copy: ArenasCopy, *, automatic: bool) -> dict[str, Any]:
        """Write a snapshot and return its manifest. StorageFailed when the disk refuses; nothing is left behind then."""
        state = f"t{copy.timeline}-v{copy.version}-e{facts['edit']}"
        # the worker table moves on while the version does not: the same state may be written again
        numbers = [int(known.rpartition("-")[2]) for known in self._ids() if known.startswith(f"{state}-")]
        snapshot = f"{state}-{max(numbers, default=0) + 1}"
        temporary = self.folder / f"tmp-{uuid.uuid4().hex}"
        try:
            if not self.folder.exists():
                self.folder.mkdir(parents=True)
                fsync(self.folder.parent)
            temporary.mkdir()
            files = [self._write_arena(temporary, copy, index) for index in range(len(copy.parameters))]
            if copy.extras:
                files.append(self._write_extras(temporary, copy))
            manifest = {
                "format": FORMAT,
                "id": snapshot,
                "automatic": automatic,
                "created": time.time(),
                **facts,
                "version": copy.version,
                "timeline": copy.timeline,
                "lineage": list(map(list, copy.lineage)),
                "steps": copy.steps,
                "parameters": _parameters(copy.layout),
                "files": files,
            }
            manifest["digest"] = _digest(manifest)
            path = temporary / MANIFEST
            path.write_text(json.dumps(manifest))
            fsync(path)
            fsync(temporary)
            os.replace(temporary, self.folder / snapshot)
            fsync(self.folder)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                os.replace(self.folder / snapshot, temporary)  # renamed, but not known to last
            shutil.rmtree(temporary, ignore_errors=True)
            raise StorageFailed(path=self.folder / snapshot, problem=reason(error)) from error
        return manifest

    def _write_arena(self, folder: Path, copy: ArenasCopy, index: int) -> dict[str, Any]:
        path = folder / f"arena-{index:04d}.safetensors"
        save_file({PARAMETER: copy.parameters[index], **copy.states[index]}, path)
        spec = copy.layout.arenas[index]
        place = {"arena": index, "group": spec.group, "start": 0, "stop": spec.elements}
        return {**place, **_sealed(path)}

    def _write_extras(self, folder: Path, copy: ArenasCopy) -> dict[str, Any]:
        save_file(dict(copy.extras), folder / EXTRAS)
        return _sealed(folder / EXTRAS)

    def manifests(self) -> list[dict[str, Any]]:
        """Every snapshot's manifest, newest first. A damaged one is listed with its problem."""
        found = []
        for snapshot in self._ids():
            try:
                found.append(self._verified(snapshot))
            except SnapshotDamaged as error:
                found.append({"id": snapshot, "damaged": error.message})
        return found

    def read(self, snapshot: str) -> tuple[dict[str, Any], ArenasCopy]:
        """A snapshot's manifest and arenas, every byte verified. UnknownSnapshot or SnapshotDamaged."""
        try:
            return self._read(snapshot)
        except SnapshotDamaged:
            self._require_there(snapshot)  # or it was deleted while it was read
            raise

    def _read(self, snapshot: str) -> tuple[dict[str, Any], ArenasCopy]:
        manifest = self._verified(snapshot)
        layout = layout_of(manifest)
        parameters, states = [], []
        extras = Extras()
        for entry in manifest["files"]:
            path = self.folder / snapshot / entry["file"]
            self._verify_file(snapshot, entry)
            try:
                tensors = load_file(path)
            except (OSError, SafetensorError) as error:
                raise SnapshotDamaged(snapshot=snapshot, problem=f"{entry['file']}: {error}") from error
            if entry["file"] == EXTRAS:
                extras = Extras(tensors)
                continue
            parameters.append(tensors.pop(PARAMETER))
            states.append(tensors)
        timeline, version = int(manifest["timeline"]), int(manifest["version"])
        lineage = [(int(ended), int(at)) for ended, at in manifest.get("lineage", ())]
        copy = ArenasCopy(layout, timeline, version, parameters, states, manifest["steps"], extras, lineage)
        return manifest, copy

    def newest(
        self, made_of: Callable[[int, int], bool] = lambda timeline, version: True
    ) -> tuple[dict[str, Any], ArenasCopy] | None:
        """The newest snapshot that verifies; damaged ones are named in the log and left alone.

        `made_of` says of a timeline and a version whether the model was made from it.
        """
        for snapshot in self._ids():
            timeline, version, *_ = map(int, re.findall(r"\d+", snapshot))
            if not made_of(timeline, version):
                continue
            try:
                return self.read(snapshot)
            except SnapshotDamaged as error:
                log.error("%s: skipped, %s", self.folder.parent.name, error.message)
        return None

    def delete(self, snapshot: str) -> None:
        """Delete one snapshot. UnknownSnapshot if there is none."""
        if snapshot not in self._ids():
            raise UnknownSnapshot(model=self.folder.parent.name, snapshot=snapshot)
        trash = self.folder / f"tmp-{uuid.uuid4().hex}"
        try:
            # renamed first, so that a half-deleted snapshot never looks like one
            os.replace(self.folder / snapshot, trash)
            shutil.rmtree(trash)
            fsync(self.folder)
        except OSError as error:
            raise StorageFailed(path=self.folder / snapshot, problem=reason(error)) from error

    def prune(self) -> None:
        """Delete all but the newest automatic snapshots, counting, and deleting, only those that verify to the last byte."""
        kept = 0
        for entry in self.manifests():
            if not entry.get("automatic"):
                continue
            try:
                for file in entry["files"]:
                    self._verify_file(entry["id"], file)
            except SnapshotDamaged:
                continue
            if kept == KEPT_AUTOMATIC:
                self.delete(entry["id"])
            else:
                kept += 1

    def sweep(self) -> None:
        """Remove what an interrupted write left behind."""
        for path in self.folder.glob("tmp-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _ids(self) -> list[str]:
        """Newest first: by timeline, version, edit, number."""
        if not self.folder.exists():
            return []
        matches = [match for path in self.folder.iterdir() if (match := _ID.fullmatch(path.name))]
        ordered = sorted(matches, key=lambda match: tuple(map(int, match.groups())), reverse=True)
        return [match.group() for match in ordered]

    def _verified(self, snapshot: str) -> dict[str, Any]:
        self._require_there(snapshot)
        try:
            text = (self.folder / snapshot / MANIFEST).read_text()
            manifest: dict[str, Any] = json.loads(text)
            if json.dumps(manifest) != text:  # other bytes may stand for the same JSON
                raise SnapshotDamaged(snapshot=snapshot, problem="its manifest has other bytes")
            claimed = manifest["digest"]
            sealed = {key: value for key, value in manifest.items() if key != "digest"}
            if claimed != _digest(sealed) or manifest["format"] != FORMAT or manifest["id"] != snapshot:
                raise SnapshotDamaged(
                    snapshot=snapshot, problem="its manifest has other bytes, another format or another id"
                )
            for entry in manifest["files"]:
                if (self.folder / snapshot / entry["file"]).stat().st_size != entry["bytes"]:
                    raise SnapshotDamaged(snapshot=snapshot, problem=f"{entry['file']} has another length")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise SnapshotDamaged(snapshot=snapshot, problem=f"manifest: {error}") from error
        return manifest

    def _require_there(self, snapshot: str) -> None:
        if not _ID.fullmatch(snapshot) or not (self.folder / snapshot).is_dir():
            raise UnknownSnapshot(model=self.folder.parent.name, snapshot=snapshot)

    def _verify_file(self, snapshot: str, entry: Mapping[str, Any]) -> None:
        try:
            same = _file_digest(self.folder / snapshot / entry["file"]) == entry["sha256"]
        except OSError as error:
            raise SnapshotDamaged(snapshot=snapshot, problem=f"{entry['file']}: {error}") from error
        if not same:
            raise SnapshotDamaged(snapshot=snapshot, problem=f"{entry['file']} has other bytes")


def layout_of(manifest: Mapping[str, Any]) -> Layout:
    """The layout that a snapshot's manifest describes."""
    message = Manifest(
        groups=[ParamGroup(rule=group["rule"], optimizer=group["optimizer"]) for group in manifest["groups"]]
    )
    for entry in manifest["parameters"]:
        message.parameters.add(
            name=entry["name"],
            shape=entry["shape"],
            dtype=dtypes.to_wire(getattr(torch, entry["dtype"]), entry["name"]),
            group=entry["group"],
            aliases=entry["aliases"],
        )
    return Layout(message)


def _parameters(layout: Layout) -> list[dict[str, Any]]:
    return [
        {
            "name": slot.name,
            "shape": list(slot.shape),
            "dtype": dtypes.NAMES[slot.dtype],
            "group": slot.group,
            "aliases": list(slot.aliases),
        }
        for slot in layout.slots
    ]


def _sealed(path: Path) -> dict[str, Any]:
    """A written file, forced to the disk, with what it takes to recognise it."""
    fsync(path)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": _file_digest(path)}


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: Exception) -> str:
    """Why the disk refused, in words; safetensors has an error of its own for it."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def fsync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Replace a small file so that after a crash it holds the old text or the new one."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(text)
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageFailed(path=path, problem=reason(error)) from error


def rules_known(manifest: Mapping[str, Any]) -> bool:
    """Whether this build has every rule that a snapshot needs."""
    return all(group["rule"] in RULES for group in manifest["groups"])
