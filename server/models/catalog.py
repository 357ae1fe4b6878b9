"""The models of this server: created by their first worker, found by name, brought back at start.

A model's timeline is written to disk before it is used (`storage/model_folder.py`), and is never used again, whatever
is restored. While the server runs, the model's identity file names no clean version. Only an orderly stop writes one,
after it has snapshotted the last version: that snapshot holds every acknowledged push. A start that cannot prove that
begins a new timeline.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Final, TypeVar

import torch

from pushstep.proto.errors import (
    Draining,
    ModelExists,
    ModelLost,
    ModelNotLoaded,
    NoCreationTicket,
    OutOfMemory,
    OverCapacity,
    Starting,
    UnknownModel,
)
from pushstep.proto.training_pb2 import Process
from pushstep.proto.wire.layout import Layout

from ..arenas.arena import Arenas
from ..config import Config
from ..coordinator.groups import Group, ParamGroups
from ..coordinator.sessions import Sessions
from ..counters.server_counts import ServerCounts
from ..devices.choose import device
from ..journal.durability import DurabilitySettings
from ..journal.sync import JournalSync
from ..observers.catalogue import register
from ..pacing.paced_lock import PacedLock
from ..parts.shard import Ranks
from ..parts.whole_file import write_whole
from ..process import garbage
from ..process.threads import DISK, STORE
from ..remote.remote import remote_of
from ..remote.sender import Sender
from ..staging.budget import Budget, charge
from ..staging.model_budget import ModelBudget
from ..staging.read_budget import ReadBudget
from ..storage.model_folder import ModelFolder
from ..storage.saved_state import SavedState
from ..storage.snapshots import Snapshots
from .copies import COPIES_AT_ONCE
from .creations import Creation, Creations, Proposal
from .model import Model
from .restores import Restores
from .snapshotter import TICK_S, Snapshotter

log = logging.getLogger("pushstep.catalog")
# Joins under one name between two writes of a model's identity.
EPOCHS_AHEAD: Final = 1000
T = TypeVar("T")


class Catalog:
    """Owns the models by name: creates, finds, snapshots, restores and deletes them."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: that of the event loop."""
        self.config = config
        self.clock = clock
        register()
        self.device = device(config.device)
        self._models = config.data / "models"
        # for pushes and uploads of all models, until they are stepped
        self.staging = Budget(config.staging_bytes, config.stall_s / 4, self.device.fresh_memory)
        # for what readers of all models are sent
        self.reading = ReadBudget(config.reading_bytes(), config.stall_s / 4)
        # for what all models hold
        self.holding = ModelBudget(config.max_bytes, self._held_bytes)
        self.counts = ServerCounts()
        self.models: dict[str, Model] = {}
        # models whose files could not be loaded at the start, and why; their names are not free
        self.not_loaded: dict[str, ModelNotLoaded] = {}
        self.ready = False
        self.loaded = False
        # no new work is taken: the server stops
        self.draining = False
        self.ranks: Ranks | None = None  # of a process that is one of several
        self.creations = Creations()
        self._journal_sync = JournalSync()
        # each with a number at once of its own, because a restore waits for the snapshot of its model that is being written
        self.snapshotter = Snapshotter(COPIES_AT_ONCE)
        self.restores = Restores(COPIES_AT_ONCE, self.snapshotter, self.folder, self.alone, self._scratch)
        # where snapshots are kept, if that is not the data folder, and who sends them there
        self.remote = remote_of(config.data, config.snapshots_url())
        self.sender = None if self.remote is None else Sender(self.remote, self._models)
        self.snapshotter.sender = self.sender
        # by model name: held while its folder is written to or removed
        self._folders: dict[str, PacedLock] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def _held_bytes(self) -> int:
        """Bytes of all models. In any thread: of those that there are now."""
        return sum(model.held_bytes for model in list(self.models.values()))

    def get(self, name: str, uid: bytes = b"") -> Model:
        """The model of a name; else Starting, ModelNotLoaded, ModelLost (if `uid` is given), UnknownModel."""
        model = self.models.get(name)
        if model is None:
            self.require_loaded()
            self.require_free(name)
            if uid:
                raise ModelLost(model=name[:200])
            raise UnknownModel(model=name[:200])
        return model

    def require_loaded(self) -> None:
        """Starting while models are still being loaded: a model that is not found may yet be loaded."""
        if not self.loaded:
            raise Starting()

    def require_open(self) -> None:
        """Starting, or Draining, while no new work is taken."""
        self.require_loaded()
        if self.draining:
            raise Draining()

    def require_free(self, name: str) -> None:
        """ModelNotLoaded if the name belongs to a model whose files could not be loaded."""
        if name in self.not_loaded:
            raise copy.copy(self.not_loaded[name])

    def snapshots(self, name: str) -> Snapshots:
        """A model's snapshots."""
        return self.folder(name).snapshots

    def folder(self, name: str) -> ModelFolder:
        """A model's folder, which need not exist."""
        path = self._models / name
        return ModelFolder(path, None if self.remote is None else self.remote.store(path))

    def alone(self, name: str) -> PacedLock:
        """The lock of a model's folder: hold it to write into the folder or to remove it."""
        return self._folders.setdefault(name, PacedLock())

    # Creation: a ticket, then the values, then the model.

    def begin_creation(
        self,
        name: str,
        worker: str,
        proposal: Proposal,
        now_s: float,
        attempt: int,
        process: Process,
        peer: str = "",
    ) -> Creation:
        """Give the first caller a ticket to create a model. ModelNotLoaded, OverCapacity.

        BeingCreated for other callers, until the ticket runs out or the process that has it is gone.
        """
        self.require_creatable(name, proposal)
        needed = proposal.bytes_needed
        return self.creations.begin(name, worker, proposal.manifest, needed, now_s, attempt, peer, process)

    def require_creatable(self, name: str, proposal: Proposal) -> None:
        """ModelNotLoaded or OverCapacity unless a model like this may be created now."""
        self.require_free(name)
        self._require_place(proposal.bytes_needed)
        push_bytes = charge(proposal.push_bytes)
        if push_bytes > self.config.staging_bytes:
            raise OverCapacity(
                problem=f"one push of this model takes {push_bytes} bytes, staging has {self.config.staging_bytes}",
                setting="staging-bytes",
            )

    def _require_place(self, need_bytes: int) -> None:
        """OverCapacity unless one more model, of `need_bytes`, may be held."""
        coming = self.creations.with_places()
        if len(self.models) + len(coming) >= self.config.max_models:
            raise OverCapacity(
                problem=f"this server holds at most {self.config.max_models} models", setting="max-models"
            )
        self.holding.require_room(need_bytes, sum(creation.bytes_needed for creation in coming))

    def creation(self, name: str, ticket: int, now_s: float) -> Creation:
        """The creation whose upload begins now; call `end_creation` later. NoCreationTicket, ModelExists."""
        if name in self.models:
            raise ModelExists(model=name)
        return self.creations.begin_upload(name, ticket, now_s)

    def take_place(self, name: str, creation: Creation) -> None:
        """Count a creation as a model: its values are there. NoCreationTicket, ModelExists, OverCapacity."""
        if name in self.models:
            raise ModelExists(model=name)
        if self.creations.get(name) is not creation or creation.has_place:
            raise NoCreationTicket(model=name)
        self._require_place(creation.bytes_needed)
        self.creations.take_place(name, creation)

    def end_creation(
        self, name: str, creation: Creation, now_s: float, *, had_place: bool, comes_again: bool
    ) -> None:
        """Note the end of an upload. Unless it made the model or is retried, others may create the model."""
        self.creations.end_upload(name, creation, now_s, had_place=had_place, comes_again=comes_again)
        if self.ranks is not None and self.creations.get(name) is not creation:
            self.ranks.withdraw(name, creation.ticket)

    async def withdraw_creation(self, name: str, worker: str, attempt: int) -> None:
        """Withdraw the ticket that a join was given. A creation that is being finished is waited for."""
        current = self.creations.get(name)
        if current is None or not attempt or (current.worker, current.attempt) != (worker, attempt):
            return
        async with self.alone(name):
            if self.creations.get(name) is current:
                self.creations.end(name)

    async def finish_creation(self, name: str, creation: Creation, model: Model) -> None:
        """Write the identity of a filled model with a place, and make it visible to all. NoCreationTicket."""
        async with self.alone(name):  # the folder of an earlier model of this name may still be being removed
            try:
                if self.creations.get(name) is not creation:  # withdrawn
                    raise NoCreationTicket(model=name)
                folder = self.folder(name)
                await DISK.run(folder.set_aside)
                model.kept = replace(model.kept, epochs=EPOCHS_AHEAD)
                if model.shard is not None:
                    await DISK.run(write_whole, folder.path, model.shard)
                model.record("created", creation.worker)
                await DISK.run(folder.write_identity, model.identity(None))
                # no later crash may leave it without a snapshot
                await self.snapshotter.open_journal(model, folder, after_gap=False)
                await self.snapshotter.take(model, folder, "server", automatic=True)
            except BaseException:
                await model.close()
                raise
        self.creations.end(name)
        self.models[name] = model
        if self.ranks is not None:
            self.ranks.loaded(model)
        garbage.set_aside(len(model.layout.slots))
        by, many = creation.worker, len(model.layout.slots)
        log.info("model %s created by %s: %d parameters", name, by, many, extra={"model": name})

    def new_model(self, name: str, layout: Layout, uid: bytes = b"") -> Model:
        """A model with a new uid, if none is given, and initial optimizer state, not yet visible. OutOfMemory."""
        groups = ParamGroups(Group.make(group) for group in layout.manifest.groups)
        try:
            model = self.made(name, uid or secrets.token_bytes(16), 1, layout, groups)
            model.arenas.fill_initial_state([group.values for group in groups.list])
            return model
        except (OutOfMemory, torch.OutOfMemoryError):
            need = Arenas.bytes_needed(layout)
        # raised outside the handler: the first error's traceback holds the memory that was allocated
        raise OutOfMemory(what=f"model {name} on {self.device.where}", need=need)

    def made(self, name: str, uid: bytes, timeline: int, layout: Layout, groups: ParamGroups) -> Model:
        """A model with this server's limits, not yet visible."""
        sessions = Sessions(self.config.lease_s, self.config.max_workers, name, self.config.worker_bytes)
        shared = (
            self.device,
            self.staging,
            self.reading,
            self._journal_sync,
            self.config.durability_settings(),
        )
        model = Model(name, uid, timeline, layout, groups, sessions, *shared, self.clock)
        model.on_failed = self._failed
        model.observers.place = self.config.place(name)
        return model

    def _scratch(self, model: Model, saved: SavedState) -> Model:
        """Another model with the content of a snapshot, that is not served. It blocks."""
        return self.loaded_from(saved, model.name, model.uid)

    def loaded_from(self, saved: SavedState, name: str, uid: bytes) -> Model:
        """A model with the content of a snapshot, not visible. It blocks."""
        made = self.made(name, uid, saved.copy.timeline, saved.copy.layout, saved.groups)
        made.load(saved, saved.copy.timeline)
        return made

    async def delete(self, name: str, by: str) -> None:
        """Delete a model and its snapshots; files that were not loaded are only set aside. UnknownModel."""
        if name in self.not_loaded:
            async with self.alone(name):
                await DISK.run(self.folder(name).set_aside)
                self.not_loaded.pop(name, None)
            return
        model = self.get(name)
        model.record("deleted", by)
        model.deleted = True
        model.events.end("deleted")
        del self.models[name]
        if self.ranks is not None:
            await self.ranks.delete(name, model.uid)
        async with self.alone(name):  # or a snapshot that is being written would create the folder again
            await model.close()
            garbage.look_again()
            if self.remote is not None:
                await DISK.run(self.remote.forget, self._models / name)
            await DISK.run(self.folder(name).remove)
        log.info("model %s deleted by %s", name, by, extra={"model": name})

    # Snapshots and restores.

    async def snapshot(self, name: str, by: str, *, automatic: bool = False) -> dict[str, Any]:
        """Take a snapshot of the model at its current version. Returns the snapshot's manifest."""
        model = self.get(name)
        async with self.alone(name):
            manifest = await self.snapshotter.take(model, self.folder(name), by, automatic=automatic)
        if self.sender is not None:
            await self.whole(self.sender.send(model, manifest["id"]))
        return manifest

    async def restore(self, name: str, snapshot: str, by: str) -> int:
        """Restore a snapshot on a new timeline. Returns the snapshot's version."""
        return await self.whole(self.restores.restore(self.get(name), snapshot, by))

    async def restore_version(self, name: str, version: int, by: str) -> int:
        """Restore a version that a snapshot or the journal holds, on a new timeline. VersionNotKept."""
        return await self.whole(self.restores.restore_version(self.get(name), version, by))

    async def keep_epoch(self, model: Model, epoch: int) -> None:
        """Have it on the disk that this epoch may have been given out. StorageFailed."""
        while epoch > model.kept.epochs:
            async with self.alone(model.name):
                model.require_here()
                kept = replace(model.identity(None), epochs=epoch + EPOCHS_AHEAD)
                await DISK.run(self.folder(model.name).write_identity, kept)
                model.kept = kept

    async def set_durability(self, name: str, wanted: Callable[[], DurabilitySettings], by: str) -> None:
        """Keep a model on the disk in another way; another level holds when this returns.

        `wanted` gives the settings, or refuses, when no other change of them can come in between.
        """
        model = self.get(name)

        async def change() -> None:
            async with self.alone(name):
                model.require_here()
                await model.recorder.require_room()
                await self.snapshotter.set_durability(model, self.folder(name), wanted(), by)
            # without the lock: what is decided may wait for a snapshot, which takes the lock
            await model.recorder.until_safe()

        await self.whole(change())

    async def keep_groups(self, model: Model) -> None:
        """Take a snapshot, since no record holds a group that was added. At each level: workers go by the new manifest."""
        async with self.alone(model.name):
            await self.snapshotter.take(model, self.folder(model.name), "server", automatic=True)

    async def take_due_snapshots(self) -> None:
        """Take the automatic snapshots of all models when they are due, until this is cancelled."""
        while True:
            for name, model in list(self.models.items()):
                if self.snapshotter.is_due(model) and not self.draining:
                    self._start(self.snapshotter.take_due(model, self.folder(name), self.alone(name)))
            if self.sender is not None and not self.draining:
                self.sender.start_due(self.models.values(), self.prune_sent)
            await asyncio.sleep(TICK_S)

    async def prune_sent(self, model: Model, snapshot: str) -> None:
        """Remove what a snapshot that was sent makes superfluous."""
        folder, alone = self.folder(model.name), self.alone(model.name)
        await self.snapshotter.prune(model, folder, snapshot, STORE, alone)

    async def whole(self, work: Coroutine[Any, Any, T], then: Callable[[], None] = lambda: None) -> T:
        """Run `work` and `then` to the end, even if the caller is cancelled: no edit may stop half way."""
        return await asyncio.shield(self._start(work, then))

    def _start(
        self, work: Coroutine[Any, Any, T], then: Callable[[], None] = lambda: None
    ) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # without a reference it may be collected while it runs
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: then())
        return task

    def _failed(self, model: Model) -> None:
        """Start to restore a model that a failed write has left torn."""
        self._start(self.restores.bring_back(model))

    def close(self) -> None:
        """End the thread that forces journals to the disk."""
        self._journal_sync.close()

    async def until_whole(self, timeout_s: float) -> None:
        """Wait, for at most `timeout_s`, for edits that are under way, also those whose callers have gone."""
        self.snapshotter.hurry()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=timeout_s)
