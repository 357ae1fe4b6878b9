"""Reads the snapshots of one model: manifests, chains of them, files; every byte is verified before it is used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from pushstep.proto.errors import PushstepError, SnapshotDamaged, SnapshotUnsupported, UnknownSnapshot
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Layout

from ..arenas.arenas_copy import ArenasCopy
from ..arenas.extras import Extras
from ..arenas.rules import rule_of
from ..captures.capture import AVERAGE, PARAMETER
from ..pacing.pace import AT_ONCE, Pace
from . import files
from .chains import HiddenSnapshots, chain_of
from .snapshot_files import lay_dense, lay_rows
from .snapshot_manifest import EXTRAS, ID, arena_file, checked, is_rows, layout_of
from .store import Store, read_whole
from .tensor_file import OtherBytes, digest_of, kept_digest, read_tensors

MANIFEST: Final = "manifest.json"
# Ten thousand workers with 64 KiB of state each take 1.3 GB of it.
LONGEST_MANIFEST_BYTES: Final = 2 << 30
# By a snapshot's folder: what its files were when this process last wrote or verified their bytes.
_verified: Final[dict[Path, object]] = {}


class SnapshotReader:
    """The snapshots of one model, read. All methods block: call them in a thread.

    Where they are kept elsewhere than in the data folder, every method may raise SnapshotsAway.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.folder = store.folder
        self._model = store.folder.parent.name
        self.hidden = HiddenSnapshots(store.folder)

    def read(self, snapshot: str) -> tuple[dict[str, Any], ArenasCopy]:
        """A snapshot's manifest and arenas, every byte verified.

        UnknownSnapshot, SnapshotDamaged, SnapshotUnsupported; OutOfMemory or StorageFailed where this process lacks
        the means to read it.
        """
        with self._unless_deleted(snapshot):
            self._require_listed(snapshot)
            return self._read(snapshot)

    def _read(self, snapshot: str) -> tuple[dict[str, Any], ArenasCopy]:
        chain = self.chain(snapshot)
        layout = layout_of(snapshot, chain[-1])
        parameters, states = [], []
        averages: dict[str, dict[int, Tensor]] = {}
        extras = Extras()
        for entry in _arenas(chain[0]):
            tensors = self._read_file(chain[0]["id"], entry, snapshot)
            for name in [name for name in tensors if name.startswith(AVERAGE)]:
                averages.setdefault(name.removeprefix(AVERAGE), {})[entry["arena"]] = tensors.pop(name)
            _require_arena(snapshot, layout, entry["arena"], tensors)
            parameters.append(tensors.pop(PARAMETER))
            rule = rule_of(layout, layout.arenas[entry["arena"]].group)
            states.append({name: tensors[name] for name in rule.state_names})
        for entry in chain[-1]["files"]:
            if entry["file"] == EXTRAS:
                extras = Extras(self._read_file(snapshot, entry, snapshot))
        manifest = chain[-1]
        timeline, version = int(manifest["timeline"]), int(manifest["version"])
        lineage = [(int(ended), int(at)) for ended, at in manifest.get("lineage", ())]
        _require_averages(snapshot, layout, averages)
        if len(chain) > 1:
            averages = {}  # a link has none
        steps = manifest["steps"]
        copy = ArenasCopy(
            layout, timeline, version, parameters, states, steps, extras, lineage, averages=averages
        )
        for link in chain[1:]:
            self._lay(link, copy, snapshot)
        for manifest in chain:
            self.note_verified(manifest)
        return chain[-1], copy

    def _lay(self, link: Mapping[str, Any], copy: ArenasCopy, snapshot: str) -> None:
        """Lay a link over what the chain before it holds."""
        for entry in _arenas(link):
            tensors = self._read_file(link["id"], entry, snapshot)
            lay = lay_rows if is_rows(entry["file"]) else lay_dense
            try:
                lay(copy, entry["arena"], link["tables"], tensors)
            except ValueError as error:
                raise SnapshotUnsupported(snapshot=snapshot, problem=f"{entry['file']}: {error}") from error

    def verified(self, snapshot: str) -> dict[str, Any]:
        """A snapshot's manifest, after every byte is verified. Keeps no tensor. Raises as `read` does."""
        with self._unless_deleted(snapshot):
            self._require_listed(snapshot)
            chain = self.chain(snapshot)
            for manifest in chain:
                self._verify(manifest, snapshot, AT_ONCE)
            return chain[-1]

    def verify_again(self, chain: Sequence[Mapping[str, Any]], pace: Pace) -> None:
        """Verify the files of a chain that may have changed since they were verified. Raises as `read` does."""
        for manifest in chain:
            if not self.was_verified(manifest):
                self._verify(manifest, chain[-1]["id"], pace)
                self.note_verified(manifest)

    def _verify(self, manifest: Mapping[str, Any], snapshot: str, pace: Pace) -> None:
        for entry in manifest["files"] if manifest["id"] == snapshot else _arenas(manifest):
            self._verify_file(manifest["id"], entry, snapshot, pace)

    def chain(self, snapshot: str, known: dict[str, dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """The manifests of a snapshot and of those that it is based on, the whole one first.

        known: manifests that were read before, to which this adds. Raises as `read` does.
        """
        found = {} if known is None else known

        def manifest_of(name: str) -> dict[str, Any]:
            if name not in found:
                found[name] = self.manifest(name)
            return found[name]

        with self._unless_deleted(snapshot):
            return chain_of(snapshot, manifest_of)

    @contextmanager
    def _unless_deleted(self, snapshot: str) -> Iterator[None]:
        """Raise UnknownSnapshot, and not what its missing files look like, if it is deleted while this reads it."""
        try:
            yield
        except SnapshotDamaged:
            self._require_there(snapshot)
            raise

    def name(self, snapshot: str) -> str:
        """A snapshot's path below the data folder."""
        return f"models/{self._model}/snapshots/{snapshot}"

    def manifest(self, snapshot: str) -> dict[str, Any]:
        """A snapshot's manifest, with a good digest and schema, and files of the right lengths. Raises as `read` does."""
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
            whole = whole and (manifest["digest"], manifest["id"]) == (seal_of(sealed), snapshot)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise SnapshotDamaged(
                snapshot=snapshot, problem=f"its manifest is none ({type(error).__name__})"
            ) from error
        if not whole:
            raise SnapshotDamaged(snapshot=snapshot, problem="its manifest has other bytes or another id")
        return manifest

    def _read_file(self, holder: str, entry: Mapping[str, Any], snapshot: str) -> dict[str, Tensor]:
        """The tensors of a file of `holder`: `snapshot` itself, or one that it is based on."""
        name = entry["file"] if holder == snapshot else f"{holder}/{entry['file']}"
        try:
            with self.store.opened(holder, entry["file"]) as source:
                return read_tensors(source, entry["file"], entry["bytes"], *kept_digest(entry))
        except OSError as error:
            raise self._cannot_read(snapshot, error) from error
        except OtherBytes as error:
            raise SnapshotDamaged(snapshot=snapshot, problem=f"{name} {error}") from error
        except ValueError as error:
            raise SnapshotUnsupported(snapshot=snapshot, problem=f"{name}: {error}") from error

    def _verify_file(self, holder: str, entry: Mapping[str, Any], snapshot: str, pace: Pace) -> None:
        kind, expected = kept_digest(entry)
        name = entry["file"] if holder == snapshot else f"{holder}/{entry['file']}"
        try:
            with self.store.opened(holder, entry["file"]) as source:
                same = digest_of(source, kind, pace) == expected
        except OSError as error:
            raise self._cannot_read(snapshot, error) from error
        if not same:
            raise SnapshotDamaged(snapshot=snapshot, problem=f"{name} has other bytes")

    def was_verified(self, manifest: Mapping[str, Any]) -> bool:
        """True if nothing has written to its files since their bytes were verified, or written, by this process."""
        if self.store.was_verified(manifest["id"]):
            return True
        return _verified.get(self.folder / manifest["id"]) == self._files_of(manifest)

    def note_verified(self, manifest: Mapping[str, Any]) -> None:
        """Note that the bytes of a snapshot's files are right as they are now."""
        _verified[self.folder / manifest["id"]] = self._files_of(manifest)

    def forget_verified(self, snapshot: str) -> None:
        """Forget about a snapshot that is gone."""
        _verified.pop(self.folder / snapshot, None)

    def _files_of(self, manifest: Mapping[str, Any]) -> object:
        folder = self.folder / manifest["id"]
        names = (MANIFEST, *(file["file"] for file in manifest["files"]))
        try:
            found = [os.lstat(folder / name) for name in names]
        except OSError:
            return object()  # equal to nothing
        kept = [
            (each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in found
        ]
        return manifest["digest"], kept

    def _require_listed(self, snapshot: str) -> None:
        if snapshot in self.hidden_names():
            raise UnknownSnapshot(model=self._model, snapshot=snapshot)

    def hidden_names(self) -> set[str]:
        """The ids of deleted snapshots on which others are based. StorageFailed."""
        try:
            return self.hidden.names()
        except OSError as error:
            raise files.unreadable(f"models/{self._model}/snapshots", error) from error

    def _cannot_read(self, snapshot: str, error: OSError) -> PushstepError:
        """SnapshotDamaged for a missing or unreadable file; not damage if this process lacks descriptors."""
        if files.is_ours(error):
            return files.unreadable(self.name(snapshot), error)
        file = Path(error.filename).name if isinstance(error.filename, str) else MANIFEST
        return SnapshotDamaged(snapshot=snapshot, problem=f"{file}: {files.reason(error)}")


def _require_arena(snapshot: str, layout: Layout, index: int, tensors: Mapping[str, Tensor]) -> None:
    """SnapshotUnsupported unless `tensors` are all of an arena's parameters and states."""
    arena = layout.arenas[index]
    state = dtypes.state_dtype(arena.dtype)
    rule = rule_of(layout, arena.group)
    wanted = {PARAMETER: (arena.dtype, (arena.elements,))}
    wanted |= dict.fromkeys(rule.state_names, (state, (arena.elements,)))
    if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} != wanted:
        raise SnapshotUnsupported(
            snapshot=snapshot, problem=f"{arena_file(index)} does not hold what its parameters need"
        )


def _arenas(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of all files but the extras', which are not those of a snapshot that is based on this one."""
    return [entry for entry in manifest["files"] if entry["file"] != EXTRAS]


def _require_averages(snapshot: str, layout: Layout, averages: Mapping[str, Mapping[int, Tensor]]) -> None:
    """SnapshotUnsupported unless averages are as long as their arenas, and in the dtype of their state."""
    for kept in averages.values():
        for index, average in kept.items():
            arena = layout.arenas[index]
            if (average.dtype, average.shape) != (dtypes.state_dtype(arena.dtype), (arena.elements,)):
                raise SnapshotUnsupported(
                    snapshot=snapshot, problem=f"{arena_file(index)} has averages of another kind"
                )


def seal_of(manifest: Mapping[str, Any]) -> str:
    """The digest of a manifest, which it carries itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
