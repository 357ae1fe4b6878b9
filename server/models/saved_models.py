"""Loads all models when a server starts, and saves them when it stops.

A fault in one model does not affect the others: they are loaded, and saved.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

from pushstep.proto.errors import ModelNotLoaded, PushstepError, SnapshotsAway
from pushstep.proto.errors.status import named
from pushstep.proto.wire.names import is_name

from ..coordinator.hooks.hook import Point
from ..journal.chain import JournalChain
from ..journal.journal import Level, boot
from ..parts.shard import Goal, Ranks, Survey
from ..parts.whole_file import shard_in
from ..process import garbage
from ..process.threads import DISK, STORE
from ..remote.adoption import adopt
from ..storage import files
from ..storage.model_folder import IdentityFile, ModelFolder, Recovered, model_folders, sweep_models
from ..storage.snapshots import EXPORT_PREFIX
from .catalog import Catalog
from .model import Model
from .replay import Replay

log = logging.getLogger("pushstep.catalog")
# How long a start waits for a store of snapshots until it asks again, and how often it looks whether it is to stop.
FIRST_WAIT_S: Final = 1.0
LONGEST_WAIT_S: Final = 30.0
LOOK_S: Final = 0.1
T = TypeVar("T")


def not_loaded(name: str, error: Exception) -> ModelNotLoaded:
    """Why a model was not loaded, whatever its folder has made of the attempt."""
    if isinstance(error, ModelNotLoaded):
        return error
    problem = files.reason(error) if isinstance(error, OSError) else named(error, log).message
    return ModelNotLoaded(model=name, problem=problem)


class SavedModels:
    """Loads and saves the models of one catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def load(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Load every model from its newest verified snapshot, until `stopping`.

        A fault in one does not stop the others.
        """
        # exports that the last process left unfinished
        await DISK.run(files.sweep, self._catalog.config.data, f"{EXPORT_PREFIX}*")
        remote = self._catalog.remote
        if remote is not None:
            await DISK.run(remote.forget_trash)
        await DISK.run(sweep_models, self._catalog.config.data / "models")
        if remote is not None and remote.adopts:
            await self._patiently(partial(STORE.run, adopt, remote, self._catalog.config.data), stopping)
        names = await DISK.run(model_folders, self._catalog.config.data / "models")
        if self._catalog.ranks is not None:
            await self._load_parts(self._catalog.ranks, list(filter(is_name, names)))
            names = []
        for name in names:
            if stopping():
                return
            if is_name(name):
                try:
                    await self._patiently(partial(self._load_model, name), stopping)
                except Exception as error:  # noqa: BLE001 - whatever a folder holds, the other models are served
                    self._note_not_loaded(name, error)
        self._catalog.loaded = self._catalog.ready = True

    async def _load_parts(self, ranks: Ranks, names: Sequence[str]) -> None:
        """Load the parts that lie in this rank, each at the newest version that all ranks have."""
        brought: dict[str, tuple[Model, Recovered]] = {}
        surveys: dict[str, Survey] = {}
        for name in names:
            try:
                await DISK.run(self._catalog.folder(name).sweep)
                found = await self.bring_back(name, Goal())
            except Exception as error:  # noqa: BLE001 - the other ranks are told
                surveys[name] = Survey(problem=not_loaded(name, error))
                continue
            if found is not None:
                brought[name] = model, of = found
                layout, identity = model.layout, of.identity
                at = model.timeline, model.version, layout.manifest_hash
                others = () if model.shard is None else model.shard.others
                reaches = await DISK.run(self._reaches, name, identity, model.version)
                surveys[name] = Survey(identity.uid, *at, identity.timeline, of.proven, reaches, others)
        goals = await ranks.meet(surveys)
        for name, survey in surveys.items():
            goal = goals.get(name, Goal(refused=survey.problem))
            if name in brought and (goal.refused or goal.aside or goal.version is not None):
                await brought.pop(name)[0].close()
            if goal.aside:
                await DISK.run(self._catalog.folder(name).set_aside)
            elif goal.refused is not None:
                self._note_not_loaded(name, goal.refused)
            else:
                try:
                    again = brought.get(name) or await self.bring_back(name, goal)
                    if again is not None:
                        await self._adopt(name, again[0], again[1])
                except Exception as error:  # noqa: BLE001 - the other models are served; a process that ended would come back so
                    self._note_not_loaded(name, error)
        await ranks.met()

    def _reaches(self, name: str, identity: IdentityFile, newest: int) -> list[tuple[int, int]]:
        """The versions up to `newest` that `bring_back` comes to, as runs with both ends included. It blocks."""
        folder = self._catalog.folder(name)
        chain = JournalChain(folder.journal, identity.uid)
        runs: list[tuple[int, int]] = []
        last = newest
        for manifest in folder.snapshots.manifests():  # newest first
            if "damaged" in manifest or "unsupported" in manifest:
                continue
            version = int(manifest["version"])
            if version <= last and identity.made_of(int(manifest["timeline"]), version):
                goes_on = chain.continues(int(manifest.get("journal", 0)))
                runs.append((version, last if goes_on else version))
                last = version - 1
        return runs

    async def _patiently(self, work: Callable[[], Awaitable[T]], stopping: Callable[[], bool]) -> T:
        """What `work` returns, once the store of snapshots answers. SnapshotsAway if the server is told to stop."""
        wait_s = FIRST_WAIT_S
        while True:
            try:
                return await work()
            except SnapshotsAway as error:
                log.warning("the start waits, again in %.0f s: %s", wait_s, error.message)
                until_s = time.monotonic() + wait_s
                while time.monotonic() < until_s:
                    if stopping():
                        raise
                    await asyncio.sleep(LOOK_S)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _note_not_loaded(self, name: str, error: Exception) -> None:
        found = not_loaded(name, error)
        # a copy, without the traceback, which would hold what was loaded
        self._catalog.not_loaded[name] = copy.copy(found)
        log.error("model %s was not loaded: %s", name, found.fields["problem"], extra={"model": name})

    async def _load_model(self, name: str) -> None:
        folder = self._catalog.folder(name)
        await DISK.run(folder.sweep)
        if self._catalog.remote is not None:
            await STORE.run(self._catalog.remote.store(folder.path).open)
        brought = await self.bring_back(name)
        if brought is not None:
            await self._adopt(name, *brought)

    async def _adopt(self, name: str, model: Model, found: Recovered) -> None:
        """Serve a model that was brought back."""
        folder, state, identity = self._catalog.folder(name), found.state, found.identity
        try:
            proven = model.timeline == identity.timeline
            model.begun_at = model.timeline, model.version
            model.counts.snapshots.note(state.created_s, state.files_bytes, state.copy.version)
            model.base = state.base
            crashed = [*identity.crashed, *([] if proven else [identity.timeline])]
            model.kept = replace(identity, crashed=crashed)
            await DISK.run(folder.write_identity, model.identity(None))
            await self._catalog.snapshotter.open_journal(model, folder, after_gap=not proven)
            if not proven:
                await self._catalog.snapshotter.bridge(model, folder)
        except BaseException:
            await model.close()
            raise
        model.record("loaded", "server", snapshot=state.snapshot)
        self._catalog.models[name] = model
        if self._catalog.ranks is not None:
            self._catalog.ranks.loaded(model)
        if self._catalog.sender is not None:
            self._catalog.sender.note(model)
        garbage.set_aside(len(model.layout.slots))
        log.info(
            "model %s at version %d, timeline %d, from %s",
            name,
            model.version,
            model.timeline,
            state.snapshot,
            extra={"model": name},
        )

    async def bring_back(self, name: str, goal: Goal | None = None) -> tuple[Model, Recovered] | None:
        """A model as a start makes it of what is on the disk, before it is served; nothing is written.

        None if there is none. A named error if it cannot be loaded. `goal`: of a part, where it is to go on.
        """
        folder = self._catalog.folder(name)
        found = await DISK.run(folder.recover, None if goal is None else goal.version)
        if found is None:
            return None
        saved, uid = found.state.copy, found.identity.uid
        model = self._catalog.made(name, uid, saved.timeline, saved.layout, found.state.groups)
        try:
            model.shard = await DISK.run(shard_in, folder.path, saved.layout, self._catalog.ranks)
            proven = await DISK.run(self._bring_forward, model, found, folder, goal)
        except BaseException:
            await model.close()
            raise
        return model, replace(found, proven=proven)

    def _bring_forward(self, model: Model, found: Recovered, folder: ModelFolder, goal: Goal | None) -> bool:
        """Load a model from its snapshot and its journal. It blocks. True if that is proven to be all that was acknowledged.

        Unless it is, the model goes on on a new timeline. Of a part rank 0 says whether, and which.
        """
        identity, state = found.identity, found.state
        until = None if goal is None else goal.version
        model.load(state, state.copy.timeline)
        model.recorder.saved_version = state.copy.version
        chain = JournalChain(folder.journal, identity.uid)
        last, whole = state.journal, False
        if chain.continues(last):
            replay = Replay(model, chain, last, identity.made_of, until)
            replay.run()
            last = replay.last
            whole = replay.is_complete and chain.is_at_end and self._keeps_all(model, chain)
        if until is not None and model.version != until:
            raise ModelNotLoaded(model=model.name, problem=f"it reaches version {model.version}, not {until}")
        clean = (identity.timeline, identity.clean_version) == (model.timeline, model.version)
        proven = clean or (whole and model.timeline == identity.timeline)
        later = identity.timeline + 1 if goal is None else goal.timeline
        if later is not None and (not proven or goal is not None):
            copy = model.as_it_is()[1]
            model.commits.go_back(copy.lineage_here, later)
            model.arenas.timeline = model.timeline
            model.sessions.close_epochs(identity.epochs)
            if not chain.is_at_end:  # its last file has not been read
                last = max(last, chain.last_number())
        model.recorder.last, model.recorder.link = last, chain.link
        return proven

    def _keeps_all(self, model: Model, chain: JournalChain) -> bool:
        """True if nothing that was acknowledged can be missing at the end of a journal."""
        heading, level = chain.heading, model.durability.level
        if heading is None or level is Level.APPLIED:
            return False
        return level is Level.DURABLE or heading.boot == boot()

    async def save(self) -> bool:
        """Snapshot every model, and record on disk that nothing is missing.

        False if one failed; the log names it.
        """
        saved = True
        await self._catalog.until_whole(self._catalog.config.drain_s)
        for name, model in self._catalog.models.items():
            try:
                async with self._catalog.alone(name):
                    await self._save_last(name, model)
            except Exception as error:  # noqa: BLE001 - whatever it was, the other models are saved
                saved = False
                log.error(
                    "model %s was NOT saved at version %d: %s; %s",
                    name,
                    model.version,
                    named(error, log).message,
                    await DISK.run(self._what_is_left, name),
                    extra={"model": name},
                )
            try:
                await model.close()
            except Exception:
                log.exception("model %s could not be closed", name, extra={"model": name})
        # when all are on the disk: a store that does not answer takes no model's time
        sent = await asyncio.gather(*map(self._send_last, self._catalog.models.values()))
        return saved and all(sent)

    async def _save_last(self, name: str, model: Model) -> None:
        """Write the last snapshot, straight from the arenas: nobody writes to them any more."""
        model.end()
        model.tell(Point.STATE_DICT_PRE)
        facts, content = await model.captured(last=True)
        folder, version = self._catalog.folder(name), content.version
        try:
            manifest = await DISK.run(folder.snapshots.write, facts, content, automatic=True, base=model.base)
        finally:
            content.close()
        model.tell(Point.STATE_DICT_POST, snapshot=manifest["id"])
        log.info("model %s saved at version %d: %s", name, version, manifest["id"], extra={"model": name})
        try:
            await DISK.run(folder.write_identity, model.identity(version))
            # of a part the older ones stay: the other ranks may not have come so far, and all meet where each has a snapshot
            if self._catalog.sender is None and model.shard is None:
                await self._catalog.snapshotter.prune(model, folder, manifest["id"])
        except PushstepError as error:
            log.warning("model %s: after its last snapshot: %s", name, error.message, extra={"model": name})

    async def _send_last(self, model: Model) -> bool:
        """Send what a stop has written to where snapshots are kept. False if that fails: the data folder has it."""
        if self._catalog.sender is None:
            return True
        try:
            await self._catalog.sender.send_last(model, self._catalog.prune_sent)
        except Exception as error:  # noqa: BLE001 - whatever it was, the other models are sent
            log.error(
                "model %s is saved at version %d in the data folder ONLY, where the next start finds it: %s",
                model.name,
                model.version,
                named(error, log).message,
                extra={"model": model.name},
            )
            return False
        return True

    def _what_is_left(self, name: str) -> str:
        try:
            ids = self._catalog.snapshots(name).ids()
        except PushstepError as error:
            return error.message
        return f"the next start has {ids[0]}" if ids else "it has no snapshot: it is lost"
