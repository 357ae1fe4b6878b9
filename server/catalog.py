"""The models of this server: created by their first worker, found by name, brought back at start.

A model's timeline lies on the disk before it is used (`model_folder.py`), and is never used again, whatever is restored.
While the server runs its files say so; only an orderly stop, which has snapshotted the last version, says that the
snapshot holds every acknowledged push. A start that cannot prove that begins a new timeline.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from pushstep.proto.errors import (
    InvalidManifest,
    ManifestChanged,
    ModelExists,
    ModelLost,
    ModelNotLoaded,
    NoCreationTicket,
    OutOfMemory,
    OverCapacity,
    PushstepError,
    SnapshotDamaged,
    Starting,
    Superseded,
    UnknownModel,
    UnknownSnapshot,
)
from pushstep.proto.identifiers import is_name
from pushstep.proto.layout import Layout, check_names
from pushstep.proto.status import named
from pushstep.proto.training_pb2 import Process
from pushstep.proto.types_pb2 import Manifest

from . import files, garbage, policies
from .arena import Arenas, ArenasCopy
from .config import Config
from .copies import COPIES_AT_ONCE
from .creations import Creation, Creations
from .device import device
from .groups import Group, ParamGroups
from .hooks.hook import Point
from .model import Model
from .model_folder import IdentityFile, ModelFolder, Recovered, model_folders
from .quality import Quality
from .read_budget import ReadBudget
from .session import Sessions
from .snapshot_manifest import require_understood
from .snapshots import EXPORT_PREFIX, Snapshots
from .staging import Budget, charge
from .threads import DISK

log = logging.getLogger("pushstep.catalog")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Proposal:
    """A model that somebody wants to create: laid out, and good in itself."""

    layout: Layout
    # as it is laid out, serialised
    manifest: bytes
    bytes_needed: int
    # of one push of all of it
    push_bytes: int


def propose(manifest: Manifest) -> Proposal:
    """The model that a manifest describes; InvalidManifest or InvalidHyperparameter if there can be none.

    It depends on nothing else, so that a large one is looked at in a thread.
    """
    check_names(manifest)
    layout = Layout(manifest)
    for group in manifest.groups:
        Group.make(group)
    if len(layout.first_of_group) != len(manifest.groups):
        raise InvalidManifest(problem="every param group must have parameters")
    push_bytes = sum(arena.elements * arena.dtype.itemsize for arena in layout.arenas)
    manifest_bytes = layout.manifest.SerializeToString()
    return Proposal(layout, manifest_bytes, Arenas.bytes_charged(layout), push_bytes)


class Catalog:
    """Makes, finds, saves and removes models."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = device(config.device)
        # of which pushes and uploads of all models are kept until they are stepped
        self.staging = Budget(config.staging_bytes, config.stall_s / 4, self.device.fresh_memory)
        # of which readers of all models are kept what they are sent
        self.reading = ReadBudget(config.reading_bytes(), config.stall_s / 4)
        self.models: dict[str, Model] = {}
        # those whose files could not be loaded at the start, and why: their names are not free
        self.not_loaded: dict[str, ModelNotLoaded] = {}
        self.ready = False
        self.loaded = False
        self._creations = Creations()
        self._promised_bytes = 0
        # each holds a copy of a whole model: at most so many, however many are asked for. Apart, since a restore waits
        # for the snapshot that is being written of its model.
        self._snapshotting = asyncio.Semaphore(COPIES_AT_ONCE)
        self.replacing = asyncio.Semaphore(COPIES_AT_ONCE)
        # by model name: who writes into its folder, or removes it, does so alone
        self._folders: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def get(self, name: str, uid: bytes = b"") -> Model:
        """A model by name; UnknownModel otherwise, or ModelLost for a caller that knew it by its uid. ModelNotLoaded."""
        model = self.models.get(name)
        if model is None:
            self.require_loaded()
            self.require_free(name)
            if uid:
                raise ModelLost(model=name[:200])
            raise UnknownModel(model=name[:200])
        return model

    def require_loaded(self) -> None:
        """Starting while models are still being brought back: until then a missing one is not known to be missing."""
        if not self.loaded:
            raise Starting()

    def require_free(self, name: str) -> None:
        """ModelNotLoaded if the name is that of a model whose files could not be loaded."""
        if name in self.not_loaded:
            raise copy.copy(self.not_loaded[name])

    def snapshots(self, name: str) -> Snapshots:
        """Where a model's snapshots are."""
        return self._folder(name).snapshots

    def _folder(self, name: str) -> ModelFolder:
        return ModelFolder(self.config.data / "models" / name)

    def _alone(self, name: str) -> asyncio.Lock:
        return self._folders.setdefault(name, asyncio.Lock())

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
        """Give the first caller leave to create a model; BeingCreated for the others while it lasts, or its process."""
        self.require_free(name)
        self._require_place(proposal.bytes_needed)
        push_bytes = charge(proposal.push_bytes)
        if push_bytes > self.config.staging_bytes:
            raise OverCapacity(
                problem=f"one push of this model takes {push_bytes} bytes, staging has {self.config.staging_bytes}",
                setting="staging-bytes",
            )
        needed = proposal.bytes_needed
        return self._creations.begin(name, worker, proposal.manifest, needed, now_s, attempt, peer, process)

    def _require_place(self, need_bytes: int) -> None:
        """OverCapacity unless one model more may be held."""
        coming = self._creations.with_places()
        if len(self.models) + len(coming) >= self.config.max_models:
            raise OverCapacity(
                problem=f"this server holds at most {self.config.max_models} models", setting="max-models"
            )
        self.require_room(need_bytes, sum(creation.bytes_needed for creation in coming))

    @property
    def held_bytes(self) -> int:
        """What all models count for, of --max-bytes."""
        return self._promised_bytes + sum(model.held_bytes for model in self.models.values())

    @contextlib.contextmanager
    def promised(self, need_bytes: int) -> Iterator[None]:
        """Set room aside for what is on its way. OverCapacity if there is none."""
        self.require_room(need_bytes)
        self._promised_bytes += need_bytes
        try:
            yield
        finally:
            self._promised_bytes -= need_bytes

    def require_room(self, need_bytes: int, promised_bytes: int = 0) -> None:
        """OverCapacity unless `need_bytes` more of parameters, state and extras may be held."""
        held = self.held_bytes
        if held + promised_bytes + need_bytes > self.config.max_bytes:
            raise OverCapacity(
                problem=f"{need_bytes} bytes more are needed, {held} of {self.config.max_bytes} are taken",
                setting="max-bytes",
            )

    def creation(self, name: str, ticket: int, now_s: float) -> Creation:
        """The creation whose upload begins with this ticket; NoCreationTicket otherwise. Followed by `end_creation`."""
        if name in self.models:
            raise ModelExists(model=name)
        return self._creations.begin_upload(name, ticket, now_s)

    def take_place(self, name: str, creation: Creation) -> None:
        """Have a creation count as a model: its values are there. NoCreationTicket, ModelExists or OverCapacity."""
        if name in self.models:
            raise ModelExists(model=name)
        if self._creations.get(name) is not creation or creation.has_place:
            raise NoCreationTicket(model=name)
        self._require_place(creation.bytes_needed)
        self._creations.take_place(name, creation)

    def end_creation(
        self, name: str, creation: Creation, now_s: float, *, had_place: bool, comes_again: bool
    ) -> None:
        """An upload has ended; unless it has made the model, or comes again, the next caller may create it."""
        self._creations.end_upload(name, creation, now_s, had_place=had_place, comes_again=comes_again)

    async def withdraw_creation(self, name: str, worker: str, attempt: int) -> None:
        """Take back the leave that a join was given; of one whose values have arrived, wait for the end."""
        current = self._creations.get(name)
        if current is None or not attempt or (current.worker, current.attempt) != (worker, attempt):
            return
        async with self._alone(name):
            if self._creations.get(name) is current:
                self._creations.end(name)

    async def finish_creation(self, name: str, creation: Creation, model: Model) -> None:
        """Make a filled model, which has its place, durable in name and visible to all."""
        async with self._alone(name):  # the folder of an earlier one of this name may just be going
            if self._creations.get(name) is not creation:  # withdrawn
                raise NoCreationTicket(model=name)
            await DISK.run(self._folder(name).set_aside)
            await self._write_identity(model, clean_version=None)
        self._creations.end(name)
        self.models[name] = model
        garbage.set_aside(len(model.layout.slots))
        model.record("created", creation.worker)
        log.info("model %s created by %s: %d parameters", name, creation.worker, len(model.layout.slots))

    def new_model(self, name: str, layout: Layout) -> Model:
        """A model with fresh identity and state, not yet visible."""
        groups = ParamGroups(Group.make(group) for group in layout.manifest.groups)
        try:
            model = self._model(name, secrets.token_bytes(16), 1, layout, groups)
            model.arenas.fill_initial_state([group.values for group in groups.list])
            return model
        except (OutOfMemory, torch.OutOfMemoryError):
            need = Arenas.bytes_needed(layout)
        # here, or this error would hold on to what there was memory for
        raise OutOfMemory(what=f"model {name} on {self.device.where}", need=need)

    def _model(self, name: str, uid: bytes, timeline: int, layout: Layout, groups: ParamGroups) -> Model:
        sessions = Sessions(self.config.lease_s, self.config.max_workers, name, self.config.worker_bytes)
        model = Model(name, uid, timeline, layout, groups, sessions, self.device, self.staging, self.reading)
        model.on_failed = self._failed
        return model

    async def delete(self, name: str, by: str) -> None:
        """Forget a model and its snapshots for good. The files of one that was not loaded are only put aside."""
        if name in self.not_loaded:
            async with self._alone(name):
                await DISK.run(self._folder(name).set_aside)
                self.not_loaded.pop(name, None)
            return
        model = self.get(name)
        model.record("deleted", by)
        model.deleted = True
        del self.models[name]
        async with self._alone(name):  # a snapshot that is being written would make the folder again
            await model.close()
            garbage.look_again()
            await DISK.run(self._folder(name).remove)
        log.info("model %s deleted by %s", name, by)

    # Snapshots and restores.

    async def snapshot(self, name: str, by: str, *, automatic: bool = False) -> dict[str, Any]:
        """Take a snapshot of the model at its version of now; its manifest."""
        model = self.get(name)
        async with self._alone(name), self._snapshotting:
            model.tell(Point.STATE_DICT_PRE)
            facts, copy = await model.copy()
            manifest = await DISK.run(self.snapshots(name).write, facts, copy, automatic=automatic)
            model.tell(Point.STATE_DICT_POST, snapshot=manifest["id"])
            model.record("snapshot_taken", by, snapshot=manifest["id"])
            return manifest

    async def restore(self, name: str, snapshot: str, by: str) -> int:
        """Bring a snapshot back on a new timeline; the version from which it holds."""
        model = self.get(name)
        return await self.whole(self._restore(model, snapshot, by))

    async def _restore(self, model: Model, snapshot: str, by: str) -> int:
        async with self.replacing:
            try:
                manifest, copy = await DISK.run(self.snapshots(model.name).read, snapshot)
            except (SnapshotDamaged, UnknownSnapshot):
                model.require_here()  # or what is said of a snapshot that just went would be true of none
                raise
            await DISK.run(require_understood, manifest, model.name)
            if copy.layout.manifest_hash != model.layout.manifest_hash:
                raise InvalidManifest(
                    problem=f"snapshot {snapshot} holds other parameters or groups than the model has now"
                )
            await self.replace(model, copy, manifest, by)
            return copy.version

    async def replace(self, model: Model, copy: ArenasCopy, saved: dict[str, Any] | None, by: str) -> None:
        """Put `copy` in place of what the model is, on a timeline that is on the disk first."""
        async with self._alone(model.name):
            model.require_here()
            if saved is None and copy.timeline != model.timeline:  # a restore came since it was copied
                raise Superseded(model=model.name, timeline=model.timeline, got=copy.timeline)
            model.tell(Point.LOAD_STATE_DICT_PRE)
            timeline = model.timeline + 1
            await self._write_identity(model, None, timeline, copy.lineage_here)
            try:
                if copy.layout.manifest_hash != model.layout.manifest_hash:  # a group was added meanwhile
                    raise ManifestChanged(model=model.name)
                loading = model.restore(copy, saved, timeline, by)
            except BaseException:
                await self._write_identity(model, None)  # it goes on as what it was
                raise
            try:
                await loading
            except Exception as error:
                model.fail_if_torn(error)
                raise
            model.tell(Point.LOAD_STATE_DICT_POST)

    async def whole(self, work: Coroutine[Any, Any, T], then: Callable[[], None] = lambda: None) -> T:
        """Do all of `work`, and `then`, also when whoever waits for it goes away: half an edit is none."""
        return await asyncio.shield(self._start(work, then))

    def _start(
        self, work: Coroutine[Any, Any, T], then: Callable[[], None] = lambda: None
    ) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # or it may be collected while it runs
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: then())
        return task

    def _failed(self, model: Model) -> None:
        """Bring a model back that a write has left torn."""
        self._start(self._bring_back(model))

    async def _bring_back(self, model: Model) -> None:
        try:
            async with self.replacing:
                found = await DISK.run(self.snapshots(model.name).newest, model.ledger.holds)
                if found is None:
                    log.error("model %s failed and has no snapshot that verifies", model.name)
                    return
                manifest, copy = found
                await DISK.run(require_understood, manifest, model.name)
                await self.replace(model, copy, manifest, "server")
                log.warning("model %s failed and goes on from snapshot %s", model.name, manifest["id"])
        except PushstepError as error:
            log.error("model %s failed and could not be brought back: %s", model.name, error.message)

    async def _write_identity(
        self,
        model: Model,
        clean_version: int | None,
        timeline: int | None = None,
        lineage: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """`timeline` and `lineage`: those that it is about to have."""
        stands_on = list(model.ledger.lineage if lineage is None else lineage)
        identity = IdentityFile(model.uid, timeline or model.timeline, clean_version, stands_on)
        await DISK.run(self._folder(model.name).write_identity, identity)

    # Start and stop.

    async def load(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Bring every model back from its newest verified snapshot; whatever is wrong with one, the others come."""
        # exports that were under way when the last process died
        await DISK.run(files.sweep, self.config.data, f"{EXPORT_PREFIX}*")
        for name in await DISK.run(model_folders, self.config.data / "models"):
            if stopping():
                return
            if is_name(name):
                try:
                    await self._load_model(name)
                except Exception as error:  # noqa: BLE001 - whatever a folder holds, the other models are served
                    self._note_not_loaded(name, error)
        self.loaded = self.ready = True

    def _note_not_loaded(self, name: str, error: Exception) -> None:
        if isinstance(error, ModelNotLoaded):
            found = error
        elif isinstance(error, OSError):
            found = ModelNotLoaded(model=name, problem=files.reason(error))
        else:
            found = ModelNotLoaded(model=name, problem=named(error, log).message)
        self.not_loaded[name] = copy.copy(found)  # without its traceback, which holds what was loaded
        log.error("model %s was not loaded: %s", name, found.fields["problem"])

    async def _load_model(self, name: str) -> None:
        found = await DISK.run(self._folder(name).recover)
        if found is None:
            return
        model = await DISK.run(self._recovered, name, found)
        try:
            await model.stepper.submit(partial(model.arenas.load, found.copy, model.timeline))
            await self._write_identity(model, clean_version=None)
        except BaseException:
            await model.close()
            raise
        snapshot = found.manifest["id"]
        model.record("loaded", "server", snapshot=snapshot)
        self.models[name] = model
        garbage.set_aside(len(model.layout.slots))
        log.info(
            "model %s at version %d, timeline %d, from %s", name, model.version, model.timeline, snapshot
        )

    def _recovered(self, name: str, found: Recovered) -> Model:
        """The model that was found, but for its arenas."""
        identity, manifest, copied = found.identity, found.manifest, found.copy
        proven = (identity.timeline, identity.clean_version) == (copied.timeline, copied.version)
        timeline = identity.timeline + (not proven)
        groups = ParamGroups.parse(manifest["groups"])
        model = self._model(name, identity.uid, timeline, copied.layout, groups)
        model.ledger.version, model.ledger.lineage = copied.version, list(copied.lineage)
        if not proven:
            model.ledger.go_back(copied.lineage_here, timeline)
        model.begun_at = timeline, copied.version
        model.edit = int(manifest["edit"])
        model.extras = copied.extras
        model.hooks.list[:] = model.hooks.parsed(manifest["hooks"], groups, name)
        model.sessions.parse(manifest["workers"], time.monotonic(), manifest.get("forgotten_epoch", 0))
        model.judge.quality = Quality.parsed(manifest["gate"])
        # whatever staging holds today
        model.judge.switch(policies.read(manifest["policy"]), time.monotonic())
        if not proven:
            model.sessions.close_epochs()
        return model

    async def stop(self) -> bool:
        """Snapshot every model and say on the disk that nothing is missing. False if one could not be; the log names it."""
        saved = True
        if self._tasks:  # edits whose senders have gone are done whole
            await asyncio.wait(set(self._tasks), timeout=self.config.drain_s)
        for name, model in self.models.items():
            try:
                async with self._alone(name):
                    await self._save_last(name, model)
            except Exception as error:  # noqa: BLE001 - whatever it was, the other models are saved
                saved = False
                log.error(
                    "model %s was NOT saved at version %d: %s; %s",
                    name,
                    model.version,
                    named(error, log).message,
                    await DISK.run(self._what_is_left, name),
                )
            try:
                await model.close()
            except Exception:
                log.exception("model %s could not be closed", name)
        return saved

    async def _save_last(self, name: str, model: Model) -> None:
        """Write the last snapshot, straight from the arenas, which nobody writes to any more: no memory is needed."""
        model.end()
        facts, copied = await model.copy(last=True)
        snapshots = self.snapshots(name)
        manifest = await DISK.run(snapshots.write, facts, copied, automatic=True)
        log.info("model %s saved at version %d: %s", name, copied.version, manifest["id"])
        try:
            await self._write_identity(model, clean_version=copied.version)
            await DISK.run(snapshots.prune)
        except PushstepError as error:
            log.warning("model %s: after its last snapshot: %s", name, error.message)

    def _what_is_left(self, name: str) -> str:
        try:
            ids = self.snapshots(name).ids()
        except PushstepError as error:
            return error.message
        return f"the next start has {ids[0]}" if ids else "it has no snapshot: it is lost"
