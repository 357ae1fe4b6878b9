"""Snapshots: a model at one version as files, complete and verified or not there at all.

A snapshot is a folder: one safetensors file per arena (the parameters and each optimizer state, flat) and a manifest.
A link (`chains.py`) has the dense part of each arena and the changed rows of its tables, over another snapshot.
The manifest lists every file with its range and digest, and holds the groups, hooks, policy, step counts and worker
table. A snapshot is written under a temporary name. Every file and the folder are fsynced, the folder is renamed, then
the parent is fsynced. A damaged snapshot is reported and skipped; nothing that cannot be read is ever deleted or loaded.
An intact one that this build does not understand (another build's) is reported too, and no older one replaces it.
"""

from __future__ import annotations

import contextlib
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

from pushstep.proto.errors import (
    PushstepError,
    SnapshotDamaged,
    SnapshotUnsupported,
    StorageFailed,
    UnknownSnapshot,
)

from ..arenas.arenas_copy import ArenasCopy
from ..captures.capture import Capture
from ..pacing.pace import AT_ONCE, Pace
from . import files
from .chains import Base, changed_rows, order_of
from .snapshot_files import link_bytes, whole_bytes, write_arenas, write_extras
from .snapshot_manifest import EXTRAS, FORMAT, ID, LINK_FORMAT, parameters_of
from .snapshot_reader import LONGEST_MANIFEST_BYTES, MANIFEST, SnapshotReader, seal_of

log = logging.getLogger("pushstep.snapshots")
EXPORT_PREFIX: Final = "tmp-export-"


class Snapshots(SnapshotReader):
    """The snapshots of one model, in one folder, written and removed. All methods block: call them in a thread."""

    def write(
        self,
        facts: Mapping[str, Any],
        copy: Capture,
        *,
        automatic: bool,
        base: Base | None = None,
        pace: Pace = AT_ONCE,
    ) -> dict[str, Any]:
        """Write a snapshot and return its manifest.

        base: the newest snapshot of the model, over which a link may be written. StorageFailed if the disk refuses, and
        OutOfMemory; then nothing is left behind.
        """
        state = f"t{copy.timeline}-v{copy.version}-e{facts['edit']}"
        # numbered, because the worker table changes between versions and the same state may be written again
        taken = {*self._every(), *self.hidden_names(), *self.store.removing()}
        numbers = [int(known.rpartition("-")[2]) for known in taken if known.startswith(f"{state}-")]
        snapshot = f"{state}-{max(numbers, default=0) + 1}"
        temporary = self.folder / f"tmp-{uuid.uuid4().hex}"
        try:
            if not self.folder.exists():
                self.folder.mkdir(parents=True)
                files.fsync(self.folder.parent)
            temporary.mkdir()
            manifest = self._write_files(temporary, snapshot, facts, copy, automatic, base, pace)
            files.fsync(temporary)
            os.replace(temporary, self.folder / snapshot)
            files.fsync(self.folder)
            self.note_verified(manifest)
        except BaseException as error:
            refused = error
            if isinstance(error, OSError):
                refused = files.refusal(self.name(snapshot), error, self.folder, whole_bytes(copy))
            with contextlib.suppress(OSError):
                os.replace(self.folder / snapshot, temporary)  # renamed, but perhaps not durable
            shutil.rmtree(temporary, ignore_errors=True)
            raise refused from error
        return manifest

    def _write_files(
        self,
        folder: Path,
        snapshot: str,
        facts: Mapping[str, Any],
        copy: Capture,
        automatic: bool,
        base: Base | None,
        pace: Pace,
    ) -> dict[str, Any]:
        rows = changed_rows(copy, base) if base is not None and self._is_sound(base) else None
        size_bytes = whole_bytes(copy) if rows is None else link_bytes(copy, rows)
        pace.expect(size_bytes)
        written = write_arenas(folder, copy, rows, pace)
        if copy.extras:
            written.append(write_extras(folder / EXTRAS, copy.extras, pace))
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
        if rows is not None and base is not None:
            under = {"id": base.id, "digest": base.digest, "links": base.links + 1}
            manifest |= {
                "format": LINK_FORMAT,
                "base": {**under, "bytes": base.link_bytes + size_bytes},
                "tables": list(rows),
            }
        manifest["digest"] = seal_of(manifest)
        text = json.dumps(manifest)
        if len(text) > LONGEST_MANIFEST_BYTES:
            problem = (
                f"its manifest would be longer than the {LONGEST_MANIFEST_BYTES} bytes that are read back"
            )
            raise StorageFailed(path=self.name(snapshot), problem=problem)
        path = folder / MANIFEST
        path.write_text(text)
        files.fsync(path)
        return manifest

    def _is_sound(self, base: Base) -> bool:
        """True if a base, and those that it is based on, have the bytes that were verified.

        A store elsewhere is not asked: it may take minutes, in which nobody else gets at the model's folder. So the
        snapshots that it is sent are whole ones.
        """
        if not self.store.is_local:
            return False
        try:
            return base.id in self.ids() and all(map(self.was_verified, self.chain(base.id)))
        except (OSError, PushstepError):
            return False

    def manifests(
        self,
        of: Callable[[dict[str, Any]], dict[str, Any]] = dict,
        ids: Sequence[str] | None = None,
    ) -> list[dict[str, Any]]:
        """What `of` takes from the manifests of some snapshots, newest first. `ids` None: of all.

        A snapshot that is damaged, or not understood, is listed with its problem. One that is gone is left out.
        """
        found = []
        known: dict[str, dict[str, Any]] = {}
        hidden = self.hidden_names()
        for snapshot in self.ids() if ids is None else ids:
            if snapshot in hidden:
                continue
            try:
                found.append(of(self.chain(snapshot, known)[-1]))
            except UnknownSnapshot:
                continue  # deleted since
            except SnapshotDamaged as error:
                found.append({"id": snapshot, "damaged": error.message})
            except SnapshotUnsupported as error:
                found.append({"id": snapshot, "unsupported": error.message})
        return found

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
        """Delete one snapshot, or hide it while others are based on it. UnknownSnapshot if there is none."""
        if snapshot not in self.ids():
            raise UnknownSnapshot(model=self._model, snapshot=snapshot)
        try:
            if self._needed({snapshot}):
                self.hidden.hide(snapshot)
            else:
                self._remove(snapshot)
            self._remove_unneeded()
        except OSError as error:
            raise files.refusal(self.name(snapshot), error, self.folder) from error

    def _remove(self, snapshot: str) -> None:
        self.store.remove(snapshot)
        self.forget_verified(snapshot)

    def _remove_unneeded(self) -> None:
        """Remove hidden snapshots on which none is based any more. OSError."""
        hidden = self.hidden.names()
        there = set(self._every())
        for snapshot in hidden - self._needed(hidden):
            if snapshot in there:
                self._remove(snapshot)
            self.hidden.forget(snapshot)

    def _needed(self, candidates: set[str]) -> set[str]:
        """Those on which others, that are not candidates, are based, or may be: a damaged one does not say."""
        needed: set[str] = set()
        for snapshot in self.ids():
            if snapshot in candidates or not candidates:
                continue
            try:
                needed.update(manifest["id"] for manifest in self.chain(snapshot))
            except PushstepError:
                needed.update(name for name in candidates if order_of(name) < order_of(snapshot))
        return needed & candidates

    def prune(self, keep: int, made_of: Callable[[int, int], bool], pace: Pace = AT_ONCE) -> int:
        """Delete all but the newest automatic snapshots. Returns the journal's record that the oldest of them follows.

        The newest that the model descends from stays, too, by `made_of` of its timeline and version: after a restore the newer
        ones may all be of a timeline that has ended, and a start could go on from none of them.
        Only those that verify to the last byte are counted or deleted. One that has not been sent to where it is kept is not
        counted, and stays. If all that are kept stand on one whole snapshot, the newest that does not is kept, too, unless
        only one is to be kept: one damaged file must not take all.
        """
        kept, record, roots = 0, 0, set[str]()
        known: dict[str, dict[str, Any]] = {}
        unsent, has_own = self.store.unsent(), False
        for snapshot in self.ids():
            if snapshot in unsent:
                continue
            try:
                chain = self.chain(snapshot, known)
                if not chain[-1]["automatic"]:
                    continue
                self.verify_again(chain, pace)
            except (SnapshotDamaged, SnapshotUnsupported, UnknownSnapshot):
                continue
            root, is_needed = chain[0]["id"], kept < keep
            if not is_needed and keep > 1 and len(roots) == 1:
                is_needed = root not in roots
            is_own = made_of(int(chain[-1]["timeline"]), int(chain[-1]["version"]))
            if is_needed or (is_own and not has_own):
                has_own = has_own or is_own
                kept, record = kept + 1, int(chain[-1].get("journal", 0))
                roots.add(root)
            else:
                self.delete(snapshot)
        return record if kept >= keep else 0

    def sweep(self) -> None:
        """Remove what an interrupted write left behind."""
        files.sweep(self.folder, "tmp-*")
        try:
            self._remove_unneeded()
        except (OSError, PushstepError) as error:
            log.warning("%s: hidden snapshots were left behind: %s", self._model, error)

    def ids(self, older_than: str | None = None) -> list[str]:
        """Newest first: by timeline, version, edit, number. StorageFailed if the folder cannot be read.

        older_than: only those that come behind this id, which need not be there.
        """
        hidden = self.hidden_names()
        bound = None if older_than is None else order_of(older_than)
        return [
            name for name in self._every() if name not in hidden and (bound is None or order_of(name) < bound)
        ]

    def _every(self) -> list[str]:
        """Those that are hidden, too."""
        try:
            names = self.store.names()
        except OSError as error:
            raise files.unreadable(f"models/{self._model}/snapshots", error) from error
        return sorted(filter(ID.fullmatch, names), key=order_of, reverse=True)
