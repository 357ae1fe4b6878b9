"""Keeps models on the disk: takes a snapshot at creation, at intervals, and after a change that the journal cannot hold.

A snapshot holds a model at one version, and the number of the last journal record before it. Once it is on the disk, the
journal's files before the oldest snapshot that is kept are removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Hashable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final

from pushstep.proto.errors import Draining, ModelFailed, ModelLost, PushstepError

from ..captures.capture import Capture
from ..coordinator.hooks.hook import Point
from ..journal.durability import DurabilitySettings
from ..journal.journal import LEVELS, Journal, Level
from ..pacing.pace import AT_ONCE, Pace
from ..pacing.paced_lock import PacedLock
from ..process.exit_status import disk_failed
from ..process.threads import DISK, SNAPSHOTS, Threads
from ..remote.sender import Sender
from ..storage.chains import Base, base_of
from ..storage.model_folder import ModelFolder
from .edits import Edits
from .model import Model

log = logging.getLogger("pushstep.snapshotter")
# How often the time of each model is looked at.
TICK_S: Final = 0.25
# The time until a failed snapshot is tried again. A shorter interval of the model counts instead.
RETRY_S: Final = 10.0
# A journal that is longer than both of these causes a snapshot before its time.
LONG_JOURNAL_BYTES: Final = 1 << 30
LONG_JOURNAL_MODELS: Final = 4
# An automatic snapshot takes at most so long, and at most half of its interval.
LONGEST_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Taken:
    """A snapshot that was begun: one version of a model, which training overwrites meanwhile."""

    facts: dict[str, Any]
    content: Capture
    # what the model held then, the snapshot on which this one may be based, and the journal
    held: Hashable
    base: Base | None
    journal: Journal | None


class Snapshotter:
    """Takes the snapshots of all models of a catalog.

    A snapshot may come to hold a copy of a whole model, which training overwrites meanwhile, so few run at once.
    """

    def __init__(self, at_once: int) -> None:
        self._turns = asyncio.Semaphore(at_once)
        # sends snapshots to where they are kept; None: they are kept in the data folder
        self.sender: Sender | None = None
        # as the last snapshot was written; None before the first
        self.bytes_per_s: int | None = None
        # of the snapshots that are being written
        self._paces: set[Pace] = set()
        # how many wait for their turn
        self._waiting = 0
        self._reading: set[Capture] = set()

    async def take(
        self, model: Model, folder: ModelFolder, by: str, *, automatic: bool, pace: Pace = AT_ONCE
    ) -> dict[str, Any]:
        """Take a snapshot at the current version; its manifest. Hold the lock of the folder.

        Automatic ones beyond those that are kept are removed, and what they needed of the journal.
        """
        model.tried_s = model.clock()
        if pace is AT_ONCE and self._turns.locked():
            self.hurry()
        self._waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self._waiting -= 1
        self._paces.add(pace)
        begun_s = model.clock()
        try:
            manifest = await self._write(model, folder, by, automatic, pace)
            model.counts.snapshots.taken.observe(model.saved_s - begun_s)
        finally:
            self._paces.discard(pace)
            self._turns.release()
        if self.sender is not None:
            self.sender.note(model)  # what it replaces is removed once it was sent
        elif automatic:
            await self.prune(model, folder, manifest["id"], pace=pace)
        return manifest

    async def _write(
        self, model: Model, folder: ModelFolder, by: str, automatic: bool, pace: Pace
    ) -> dict[str, Any]:
        leader = model.executor.leader
        # the others capture theirs behind the same ticket: `capture` queues this one in the same turn of the event loop
        others = None if leader is None else leader.snapshot(automatic=automatic)
        taken = await self.capture(model)
        if others is not None:
            try:
                taken.facts["ranks"] = await others
            except BaseException:
                taken.content.close()
                raise
        manifest = await self.write(model, folder, taken, by, automatic=automatic, pace=pace)
        if leader is not None:
            leader.snapshot_committed(int(manifest["version"]))
        return manifest

    async def capture(self, model: Model) -> Taken:
        """Begin a snapshot of the current version. StorageFailed."""
        model.tell(Point.STATE_DICT_PRE)
        held, base = model.content, model.base
        journal = model.recorder.journal
        if journal is not None and journal.file_bytes > _longest(model) / 2:
            base = None  # a chain that ends lets go of the journal behind the one before
        facts, content = await model.captured()
        return Taken(facts, content, held, base, journal)

    async def write(
        self, model: Model, folder: ModelFolder, taken: Taken, by: str, *, automatic: bool, pace: Pace
    ) -> dict[str, Any]:
        """Write what was captured; its manifest. StorageFailed, OutOfMemory."""
        facts, content, base, journal = taken.facts, taken.content, taken.base, taken.journal
        version, begun_s = content.version, model.clock()
        self._reading.add(content)
        try:
            manifest = await SNAPSHOTS.run(
                folder.snapshots.write, facts, content, automatic=automatic, base=base, pace=pace
            )
        finally:
            self._reading.discard(content)
            content.close()
        written_bytes = sum(file["bytes"] for file in manifest["files"])
        self.bytes_per_s = round(written_bytes / max(1e-9, model.clock() - begun_s))
        model.tell(Point.STATE_DICT_POST, snapshot=manifest["id"])
        model.record("snapshot_taken", by, snapshot=manifest["id"])
        model.saved, model.base = taken.held, base_of(manifest, content.layout)
        model.saved_s = model.clock()
        model.counts.snapshots.note(manifest["created"], written_bytes, version)
        model.recorder.saved_version = version
        if journal is not None:
            journal.based(manifest["journal"], version)
            model.recorder.note_durable(journal)
        return manifest

    @property
    def saved_bytes(self) -> int:
        """Bytes that the snapshots being written keep of what training has overwritten since they began."""
        return sum(content.saved_bytes for content in self._reading)

    def hurry(self) -> None:
        """Have the snapshots that are being written written as fast as can be."""
        for pace in self._paces:
            pace.hurry()

    def _pace_of(self, model: Model) -> Pace:
        """The pace of an automatic snapshot. It ends before the next one is due, and sooner if others wait."""
        limit_s = min(LONGEST_S, model.durability.snapshot_every_s / 2)
        return Pace(limit_s / (1 + self._waiting))

    async def prune(
        self,
        model: Model,
        folder: ModelFolder,
        snapshot: str,
        threads: Threads = SNAPSHOTS,
        alone: AbstractAsyncContextManager[Any] | None = None,
        pace: Pace = AT_ONCE,
    ) -> None:
        """Remove the automatic snapshots that are not kept, behind one that was just written, and the journal before.

        `threads`: who removes snapshots. `alone`: the lock of the folder, unless it is held.
        """
        try:
            oldest = await threads.run(
                folder.snapshots.prune, model.durability.keep, model.commits.holds, pace
            )
            async with alone or contextlib.nullcontext():
                if model.recorder.journal is not None:
                    await DISK.run(model.recorder.journal.prune, oldest)
        except PushstepError as error:
            log.warning(
                "model %s: after its snapshot %s: %s",
                model.name,
                snapshot,
                error.message,
                extra={"model": model.name},
            )

    async def delete(
        self, model: Model, folder: ModelFolder, alone: PacedLock, snapshot: str, by: str, threads: Threads
    ) -> None:
        """Delete a snapshot, but not while another is being based on it. UnknownSnapshot.

        `alone`: the lock of the folder, which is not held.
        """
        async with alone:
            await threads.run(folder.snapshots.delete, snapshot)
        model.record("snapshot_deleted", by, snapshot=snapshot)

    async def open_journal(self, model: Model, folder: ModelFolder, *, after_gap: bool) -> None:
        """Open a journal that continues after the recorder's last record, if the model's level needs one.

        DiskFull, StorageFailed.
        """
        level, recorder = model.durability.level, model.recorder
        if level is Level.APPLIED:
            return
        journal = await DISK.run(
            Journal,
            folder.journal,
            model.uid,
            level,
            recorder.last,
            recorder.link,
            disk_failed,
            after_gap=after_gap,
            counts=model.counts.journal,
        )
        if not after_gap:
            journal.durable_version = model.version
        recorder.begin(journal)

    async def bridge(self, model: Model, folder: ModelFolder) -> None:
        """Take a snapshot, because the journal does not hold the last change. Hold the lock of the folder."""
        if model.recorder.journal is not None:
            await self.take(model, folder, "server", automatic=True)

    async def set_durability(
        self, model: Model, folder: ModelFolder, settings: DurabilitySettings, by: str
    ) -> None:
        """Change a model's durability. Another level is in force when this returns. Hold the lock of the folder.

        Of a model in several ranks all have the higher one of two levels for as long as they change: rank 0 promises what the
        others keep.
        """
        leader, before = model.executor.leader, model.durability
        rises = LEVELS.index(settings.level) > LEVELS.index(before.level)
        if leader is not None and rises:
            await leader.set_durability(settings.model_dump_json())
        Edits(model).set_durability(settings, by)
        try:
            if await self.keep_at(model, folder, settings.level):
                await self.take(model, folder, by, automatic=True)
        except BaseException:
            if leader is not None and rises and model.recorder.level is not settings.level:
                await leader.set_durability(before.model_dump_json())
            raise
        if leader is not None and not rises:
            await leader.set_durability(settings.model_dump_json())

    async def keep_at(self, model: Model, folder: ModelFolder, level: Level) -> bool:
        """Use another level. True if a snapshot has to follow, since there was no journal. Hold the lock of the folder."""
        journal = model.recorder.journal
        if journal is not None and level is not Level.APPLIED:
            if journal.level is not level:
                await model.writer.submit(lambda: journal.set_level(level), reads=False)
                model.recorder.tell_level()
        elif journal is not None:
            await model.recorder.close()
        elif level is not Level.APPLIED:
            await self.open_journal(model, folder, after_gap=True)
            return True
        return False

    def is_due(self, model: Model) -> bool:
        """True if it is time for a snapshot of a model that has changed since the last one."""
        journal = model.recorder.journal
        if model.ended or model.deleted or model.failed is not None:
            return False
        if model.shard is not None and model.shard.leader is None:  # rank 0 says when
            return False
        if journal is not None and not journal.is_based:  # durable pushes wait for it
            return model.clock() - model.tried_s >= RETRY_S
        if model.saved == model.content:
            return False
        if journal is not None and journal.file_bytes > _longest(model):
            return True
        return model.clock() - model.saved_s >= model.durability.snapshot_every_s

    async def take_due(self, model: Model, folder: ModelFolder, alone: PacedLock) -> None:
        """Take a snapshot that is due. A failure is logged, and the snapshot is tried again later.

        Beside training, unless acknowledgements wait for it, or somebody waits for the lock.
        """
        if alone.locked():  # another snapshot, or a restore, which comes with one: look again later
            return
        journal = model.recorder.journal
        try:
            async with alone:
                if self.is_due(model):
                    is_awaited = journal is not None and not journal.is_based
                    pace = AT_ONCE if is_awaited else self._pace_of(model)
                    with alone.at(pace):
                        await self.take(model, folder, "server", automatic=True, pace=pace)
        except (ModelLost, ModelFailed, Draining):
            return
        except Exception as error:  # noqa: BLE001 - whatever it was, the other models are saved, and this one later
            wait_s = min(RETRY_S, model.durability.snapshot_every_s)
            model.saved_s = model.clock() - model.durability.snapshot_every_s + wait_s
            log.error(
                "model %s: its snapshot failed, again in %.0f s: %s",
                model.name,
                wait_s,
                error,
                extra={"model": model.name},
            )
            with contextlib.suppress(PushstepError):
                model.record("snapshot_failed", "server", problem=str(error))


def _longest(model: Model) -> int:
    """Bytes of a journal beyond which a snapshot is taken before its time."""
    return max(LONG_JOURNAL_BYTES, LONG_JOURNAL_MODELS * model.held_bytes)
