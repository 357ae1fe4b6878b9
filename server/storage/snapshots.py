"""Snapshots: a model at one version as files, complete and verified or not there at all.

A snapshot is a folder: one safetensors file per arena (the parameters and each optimizer state, flat) and a manifest.
The manifest lists every file with its range and digest, and holds the groups, hooks, policy, step counts and worker
table. A snapshot is written under a temporary name. Every file and the folder are fsynced, the folder is renamed, then
the parent is fsynced. A damaged snapshot is reported and skipped; nothing that cannot be read is ever deleted or loaded.
An intact one that this build does not understand (another build's) is reported too, and no older one replaces it.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from pushstep.optim import RULES
from pushstep.proto.errors import (
    PushstepError,
    SnapshotDamaged,
    SnapshotUnsupported,
    StorageFailed,
    UnknownSnapshot,
)
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Layout

from ..arenas.arena import ArenasCopy
from ..arenas.extras import Extras
from . import files
from .snapshot_manifest import EXTRAS, FORMAT, ID, arena_file, checked, layout_of, parameters_of
from .store import Store, opened_file, read_whole
from .tensor_file import DIGEST, OtherBytes, digest_of, kept_digest, read_tensors, write_tensors

log = logging.getLogger("pushstep.snapshots")
MANIFEST: Final = "manifest.json"
# Ten thousand workers with 64 KiB of state each take 1.3 GB of it.
LONGEST_MANIFEST_BYTES: Final = 2 << 30
PARAMETER: Final = "parameter"
# In front of the id of the hook that keeps the average.
AVERAGE: Final = "average."
EXPORT_PREFIX: Final = "tmp-export-"


class Snapshots:
    """The snapshots of one model. All methods block: call them in a thread.

    Where they are kept elsewhere than in the data folder, every method may raise SnapshotsAway.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.folder = store.folder
        self._model = store.folder.parent.name

    def write(self, facts: Mapping[str, Any], copy: ArenasCopy, *, automatic: bool) -> dict[str, Any]:
        """Write a snapshot and return its manifest.

        StorageFailed if the disk refuses; then nothing is left behind.
        """
        state = f"t{copy.timeline}-v{copy.version}-e{facts['edit']}"
        # numbered, because the worker table changes between versions and the same state may be written again
        taken = {*self.ids(), *self.store.removing()}
        numbers = [int(known.rpartition("-")[2]) for known in taken if known.startswith(f"{state}-")]
        snapshot = f"{state}-{max(numbers, default=0) + 1}"
        temporary = self.folder / f"tmp-{uuid.uuid4().hex}"
        try:
            if not self.folder.exists():
                self.folder.mkdir(parents=True)
                files.fsync(self.folder.parent)
            temporary.mkdir()
            manifest = self._write_files(temporary, snapshot, facts, copy, automatic)
            files.fsync(temporary)
            os.replace(temporary, self.folder / snapshot)
            files.fsync(self.folder)
        except BaseException as error:
            refused = error
            if isinstance(error, OSError):
                refused = files.refusal(self._name(snapshot), error, self.folder, _bytes_of(copy))
            with contextlib.suppress(OSError):
                os.replace(self.folder / snapshot, temporary)  # renamed, but perhaps not durable
            shutil.rmtree(temporary, ignore_errors=True)
            raise refused from error
        return manifest

    def _write_files(
        self, folder: Path, snapshot: str, facts: Mapping[str, Any], copy: ArenasCopy, automatic: bool
    ) -> dict[str, Any]:
        written = [self._write_arena(folder, copy, index) for index in range(len(copy.parameters))]
        if copy.extras:
            written.append(_written(folder / EXTRAS, copy.extras))
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
            "parameters": parameters_of(copy.layout),
            "files": written,
        }
        manifest["digest"] = _digest(manifest)
        text = json.dumps(manifest)
        if len(text) > LONGEST_MANIFEST_BYTES:
            problem = (
                f"its manifest would be longer than the {LONGEST_MANIFEST_BYTES} bytes that are read back"
            )
            raise StorageFailed(path=self._name(snapshot), problem=problem)
        path = folder / MANIFEST
        path.write_text(text)
        files.fsync(path)
        return manifest

    def _write_arena(self, folder: Path, copy: ArenasCopy, index: int) -> dict[str, Any]:
        spec = copy.layout.arenas[index]
        place = {"arena": index, "group": spec.group, "start": 0, "stop": spec.elements}
        tensors = {PARAMETER: copy.parameters[index], **copy.states[index]}
        for hook, averages in copy.averages.items():
            if index in averages:
                tensors[AVERAGE + hook] = averages[index]
        return {**place, **_written(folder / arena_file(index), tensors)}

    def manifests(
        self,
        of: Callable[[dict[str, Any]], dict[str, Any]] = dict,
        ids: Sequence[str] | None = None,
    ) -> list[dict[str, Any]]:
        """What `of` takes from the manifests of some snapshots, newest first. `ids` None: of all.

        A snapshot that is damaged, or not understood, is listed with its problem. One that is gone is left out.
        """
        found = []
        for snapshot in self.ids() if ids is None else ids:
            try:
                found.append(of(self._verified(snapshot)))
            except SnapshotDamaged as error:
                found.append({"id": snapshot, "damaged": error.message})
            except SnapshotUnsupported as error:
                found.append({"id": snapshot, "unsupported": error.message})
            except UnknownSnapshot:
                continue  # deleted since
        return found

    def read(self, snapshot: str) -> tuple[dict[str, Any], ArenasCopy]:
        """A snapshot's manifest and arenas, every byte verified.

        UnknownSnapshot, SnapshotDamaged, SnapshotUnsupported; OutOfMemory or StorageFailed where this process lacks
        the means to read it.
        """
        try:
            return self._read(snapshot)
        except SnapshotDamaged:
            self._require_there(snapshot)  # UnknownSnapshot if it was deleted while it was read
            raise

    def _read(self, snapshot: str) -> tuple[dict[str, Any], ArenasCopy]:
        manifest = self._verified(snapshot)
        layout = layout_of(snapshot, manifest)
        parameters, states = [], []
        averages: dict[str, dict[int, Tensor]] = {}
        extras = Extras()
        for entry in manifest["files"]:
            tensors = self._read_file(snapshot, entry)
            if entry["file"] == EXTRAS:
                extras = Extras(tensors)
                continue
            for name in [name for name in tensors if name.startswith(AVERAGE)]:
                averages.setdefault(name.removeprefix(AVERAGE), {})[entry["arena"]] = tensors.pop(name)
            _require_arena(snapshot, layout, entry["arena"], tensors)
            parameters.append(tensors.pop(PARAMETER))
            states.append(tensors)
        timeline, version = int(manifest["timeline"]), int(manifest["version"])
        lineage = [(int(ended), int(at)) for ended, at in manifest.get("lineage", ())]
        _require_averages(snapshot, layout, averages)
        steps = manifest["steps"]
        copy = ArenasCopy(
            layout, timeline, version, parameters, states, steps, extras, lineage, averages=averages
        )
        return manifest, copy

    def verified(self, snapshot: str) -> dict[str, Any]:
        """A snapshot's manifest, after every byte is verified. Keeps no tensor. Raises as `read` does."""
        manifest = self._verified(snapshot)
        for entry in manifest["files"]:
            self._verify_file(snapshot, entry)
        return manifest

    def newest(
        self,
        made_of: Callable[[int, int], bool] = lambda timeline, version: True,
        damaged: list[str] | None = None,
    ) -> tuple[dict[str, Any], ArenasCopy] | None:
        """The newest snapshot that verifies.

        Damaged ones are named in the log, and in `damaged`, and left alone. `made_of` says whether the model descends
        from a timeline and version; other snapshots are skipped. What `read` raises for a snapshot that is not
        damaged is raised: an older snapshot does not hold what that one holds.
        """
        for snapshot in self.ids():
            timeline, version, *_ = map(int, re.findall("[0-9]+", snapshot))
            if not made_of(timeline, version):
                continue
            try:
                return self.read(snapshot)
            except SnapshotDamaged as error:
                log.error("%s: skipped, %s", self._model, error.message)
                if damaged is not None:
                    damaged.append(error.message)
        return None

    def delete(self, snapshot: str) -> None:
        """Delete one snapshot. UnknownSnapshot if there is none."""
        if snapshot not in self.ids():
            raise UnknownSnapshot(model=self._model, snapshot=snapshot)
        try:
            self.store.remove(snapshot)
        except OSError as error:
            raise files.refusal(self._name(snapshot), error, self.folder) from error

    def prune(self, keep: int, written: str = "") -> int:
        """Delete all but the newest automatic snapshots. Returns the journal's record that the oldest of them follows.

        Only those that verify to the last byte are counted or deleted. `written`: the one that was written just now,
        and verified then. One that has not been sent to where it is kept is not counted, and stays.
        """
        kept, record = 0, 0
        unsent = self.store.unsent()
        for entry in self.manifests():
            if not entry.get("automatic") or entry["id"] in unsent:
                continue
            try:
                is_verified = entry["id"] == written or self.store.was_verified(entry["id"])
                for file in () if is_verified else entry["files"]:
                    self._verify_file(entry["id"], file)
            except SnapshotDamaged:
                continue
            if kept == keep:
                self.delete(entry["id"])
            else:
                kept, record = kept + 1, entry.get("journal", 0)
        return record if kept == keep else 0

    def sweep(self) -> None:
        """Remove what an interrupted write left behind."""
        files.sweep(self.folder, "tmp-*")

    def ids(self, older_than: str | None = None) -> list[str]:
        """Newest first: by timeline, version, edit, number. StorageFailed if the folder cannot be read.

        older_than: only those that come behind this id, which need not be there.
        """
        try:
            names = self.store.names()
        except OSError as error:
            raise files.unreadable(f"models/{self._model}/snapshots", error) from error
        numbered = sorted(((_numbers(name), name) for name in names if ID.fullmatch(name)), reverse=True)
        bound = None if older_than is None else _numbers(older_than)
        return [name for numbers, name in numbered if bound is None or numbers < bound]

    def _name(self, snapshot: str) -> str:
        return f"models/{self._model}/snapshots/{snapshot}"

    def _verified(self, snapshot: str) -> dict[str, Any]:
        self._require_there(snapshot)
        try:
            manifest = self._sealed_manifest(snapshot)
            checked(snapshot, manifest)
            for entry in manifest["files"]:
                if self.store.size_of(snapshot, entry["file"]) != entry["bytes"]:
                    raise SnapshotDamaged(snapshot=snapshot, problem=f"{entry['file']} has another length")
        except OSError as error:
            raise self._cannot_read(snapshot, error) from error
        return manifest

    def _require_there(self, snapshot: str) -> None:
        if not ID.fullmatch(snapshot) or not self.store.holds(snapshot):
            raise UnknownSnapshot(model=self._model, snapshot=snapshot)

    def _sealed_manifest(self, snapshot: str) -> dict[str, Any]:
        """The manifest, if its digest is right. OSError, SnapshotDamaged."""
        with self.store.opened(snapshot, MANIFEST) as source:
            text = read_whole(source, LONGEST_MANIFEST_BYTES)
        try:
            manifest: dict[str, Any] = json.loads(text)
            whole = json.dumps(manifest).encode() == text  # other bytes may stand for the same JSON
            sealed = {key: value for key, value in manifest.items() if key != "digest"}
            whole = whole and (manifest["digest"], manifest["id"]) == (_digest(sealed), snapshot)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise SnapshotDamaged(
                snapshot=snapshot, problem=f"its manifest is none ({type(error).__name__})"
            ) from error
        if not whole:
            raise SnapshotDamaged(snapshot=snapshot, problem="its manifest has other bytes or another id")
        return manifest

    def _read_file(self, snapshot: str, entry: Mapping[str, Any]) -> dict[str, Tensor]:
        try:
            with self.store.opened(snapshot, entry["file"]) as source:
                return read_tensors(source, entry["file"], entry["bytes"], *kept_digest(entry))
        except OSError as error:
            raise self._cannot_read(snapshot, error) from error
        except OtherBytes as error:
            raise SnapshotDamaged(snapshot=snapshot, problem=f"{entry['file']} {error}") from error
        except ValueError as error:
            raise SnapshotUnsupported(snapshot=snapshot, problem=f"{entry['file']}: {error}") from error

    def _verify_file(self, snapshot: str, entry: Mapping[str, Any]) -> None:
        kind, expected = kept_digest(entry)
        try:
            with self.store.opened(snapshot, entry["file"]) as source:
                same = digest_of(source, kind) == expected
        except OSError as error:
            raise self._cannot_read(snapshot, error) from error
        if not same:
            raise SnapshotDamaged(snapshot=snapshot, problem=f"{entry['file']} has other bytes")

    def _cannot_read(self, snapshot: str, error: OSError) -> PushstepError:
        """SnapshotDamaged for a missing or unreadable file; not damage if this process lacks descriptors."""
        if files.is_ours(error):
            return files.unreadable(self._name(snapshot), error)
        file = Path(error.filename).name if isinstance(error.filename, str) else MANIFEST
        return SnapshotDamaged(snapshot=snapshot, problem=f"{file}: {files.reason(error)}")


def _require_arena(snapshot: str, layout: Layout, index: int, tensors: Mapping[str, Tensor]) -> None:
    """SnapshotUnsupported unless `tensors` are all of an arena's parameters and states."""
    arena = layout.arenas[index]
    state = dtypes.state_dtype(arena.dtype)
    rule = RULES[layout.manifest.groups[arena.group].rule]
    wanted = {PARAMETER: (arena.dtype, (arena.elements,))}
    wanted |= dict.fromkeys(rule.state_names, (state, (arena.elements,)))
    if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} != wanted:
        raise SnapshotUnsupported(
            snapshot=snapshot, problem=f"{arena_file(index)} does not hold what its parameters need"
        )


def _require_averages(snapshot: str, layout: Layout, averages: Mapping[str, Mapping[int, Tensor]]) -> None:
    """SnapshotUnsupported unless averages are as long as their arenas, and in the dtype of their state."""
    for kept in averages.values():
        for index, average in kept.items():
            arena = layout.arenas[index]
            if (average.dtype, average.shape) != (dtypes.state_dtype(arena.dtype), (arena.elements,)):
                raise SnapshotUnsupported(
                    snapshot=snapshot, problem=f"{arena_file(index)} has averages of another kind"
                )


def _written(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write tensors into a file and fsync it. Returns its name, size and digest. OSError."""
    write_tensors(path, tensors, {})
    files.fsync(path)
    with opened_file(path) as source:
        return {"file": path.name, "bytes": source.size_bytes, DIGEST: digest_of(source)}


def _bytes_of(copy: ArenasCopy) -> int:
    """About how many bytes a copy's files take."""
    states = [tensor for named in copy.states for tensor in named.values()]
    return sum(tensor.nbytes for tensor in (*copy.parameters, *states, *copy.extras.values()))


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _numbers(snapshot: str) -> tuple[int, ...]:
    """The numbers in an id; none in what is no id, which comes before every snapshot."""
    found = ID.fullmatch(snapshot)
    return () if found is None else tuple(map(int, found.groups()))
