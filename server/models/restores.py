"""Replaces what a model holds: by a snapshot, by a version that the journal reaches, by a state that was loaded or imported.

Each begins a new timeline, which is on the disk before anything changes. The journal does not hold the new content, so a
snapshot is taken after it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from pushstep.proto.errors import (
    InvalidManifest,
    ManifestChanged,
    PushstepError,
    SnapshotDamaged,
    Superseded,
    UnknownSnapshot,
    VersionNotKept,
)

from ..arenas.arenas_copy import ArenasCopy
from ..coordinator.hooks.hook import Point
from ..process.threads import DISK
from ..storage.model_folder import ModelFolder
from ..storage.saved_state import SavedState, saved_state
from .model import Model
from .replay import held_at
from .snapshotter import Snapshotter

log = logging.getLogger("pushstep.restores")


class Restores:
    """Restores the models of a catalog. Each restore holds a copy of a whole model, so few run at once."""

    def __init__(
        self,
        at_once: int,
        snapshotter: Snapshotter,
        folder: Callable[[str], ModelFolder],
        alone: Callable[[str], asyncio.Lock],
        scratch: Callable[[Model, SavedState], Model],
    ) -> None:
        """`scratch` makes a model of a saved state that nobody else uses. A journal is replayed on it."""
        self.turns = asyncio.Semaphore(at_once)
        self._snapshotter = snapshotter
        self._folder = folder
        self._alone = alone
        self._scratch = scratch

    async def restore(self, model: Model, snapshot: str, by: str) -> int:
        """Restore a snapshot. Returns its version. UnknownSnapshot, SnapshotDamaged, InvalidManifest."""
        async with self.turns:
            state = await self._saved(model, snapshot)
            await self.replace(model, state.copy, state, by)
            return state.copy.version

    async def planned(self, model: Model, kept: str | int) -> SavedState:
        """What a restore of a snapshot or a version would bring back. Raises what the restore raises."""
        model.require_here()
        async with self.turns:
            return await (
                self._saved(model, kept) if isinstance(kept, str) else self._at_version(model, kept)
            )

    async def _saved(self, model: Model, snapshot: str) -> SavedState:
        try:
            manifest, copy = await DISK.run(self._folder(model.name).snapshots.read, snapshot)
        except (SnapshotDamaged, UnknownSnapshot):
            model.require_here()  # a model deleted meanwhile has no snapshots: that is the error to report
            raise
        state = await DISK.run(saved_state, manifest, copy, model.name)
        if copy.layout.manifest_hash != model.layout.manifest_hash:
            raise InvalidManifest(
                problem=f"snapshot {snapshot} holds other parameters or groups than the model has now"
            )
        return state

    async def restore_version(self, model: Model, version: int, by: str) -> int:
        """Restore a version from which the present state descends: of a snapshot, or of the journal after one.

        VersionNotKept if none does.
        """
        async with self.turns:
            state = await self._at_version(model, version)
            await self.replace(model, state.copy, state, by)
            return version

    async def _at_version(self, model: Model, version: int) -> SavedState:
        state = await DISK.run(self._state_at, model, version, await model.recorder.drained())
        if state is None or state.copy.version != version:
            raise VersionNotKept(model=model.name, version=version)
        return state

    async def replace(self, model: Model, copy: ArenasCopy, saved: SavedState | None, by: str) -> None:
        """Replace what the model holds by `copy`, on a new timeline that is written to disk first.

        `saved`: the snapshot that `copy` is of; None if `copy` was made from the model itself. ManifestChanged if a group
        was added since, Superseded if a restore came since, UnknownSnapshot if the snapshot was removed since: a start after
        a crash would have nothing to go on from.
        """
        folder = self._folder(model.name)
        async with self._alone(model.name):
            model.require_here()
            if saved is None and copy.timeline != model.timeline:  # a restore came after it was copied
                raise Superseded(model=model.name, timeline=model.timeline, got=copy.timeline)
            if saved is not None and saved.snapshot not in await DISK.run(folder.snapshots.ids):
                raise UnknownSnapshot(model=model.name, snapshot=saved.snapshot)
            model.tell(Point.LOAD_STATE_DICT_PRE)
            timeline = model.timeline + 1
            identity = model.identity(None, timeline, copy.lineage_here)
            await DISK.run(folder.write_identity, identity)
            try:
                if copy.layout.manifest_hash != model.layout.manifest_hash:  # a group was added meanwhile
                    raise ManifestChanged(model=model.name)
                loading = model.restore(copy, saved, timeline, by)
            except BaseException:
                # the model stays on its old timeline
                await DISK.run(folder.write_identity, model.identity(None))
                raise
            try:
                await loading
            except Exception as error:
                model.fail_if_torn(error)
                raise
            model.tell(Point.LOAD_STATE_DICT_POST)
            await self._snapshotter.bridge(model, folder)

    async def bring_back(self, model: Model) -> None:
        """Restore a model that a failed write has left torn, to the last version before that write."""
        try:
            async with self.turns:
                state = await self._restored_before_failure(model)
                if state is None:
                    log.error(
                        "model %s failed and has no snapshot that verifies",
                        model.name,
                        extra={"model": model.name},
                    )
                    return
                log.warning(
                    "model %s failed and goes on from version %d (snapshot %s)",
                    model.name,
                    state.copy.version,
                    state.snapshot,
                    extra={"model": model.name},
                )
        except PushstepError as error:
            log.error(
                "model %s failed and could not be brought back: %s",
                model.name,
                error.message,
                extra={"model": model.name},
            )

    async def _restored_before_failure(self, model: Model) -> SavedState | None:
        """Restore the last version before a failed write, whole; None if no snapshot verifies."""
        while True:
            last = await model.recorder.appended()
            state = await DISK.run(self._state_at, model, model.arenas.version - 1, last)
            if state is None:
                return None
            try:
                await self.replace(model, state.copy, state, "server")
            except UnknownSnapshot:
                continue  # it was removed behind a newer one meanwhile
            return state

    def _state_at(self, model: Model, version: int, last: int) -> SavedState | None:
        """What the model held at a version, or as near before it as snapshots and journal reach. It blocks.

        last: the journal's last record to read. The model trains on, so those behind it are being written.
        """
        folder = self._folder(model.name)
        while True:
            kept = folder.snapshots.ids()
            try:
                found = held_at(
                    folder, model.uid, model.commits.holds, version, partial(self._scratch, model), last
                )
                break
            except PushstepError:
                if folder.snapshots.ids() == kept:
                    raise
                # what was being read was removed behind a newer snapshot: look again
        if found is None:
            return None
        return saved_state({**found.facts, "journal": found.last}, found.copy, model.name)
