"""Loads all models when a server starts, and saves them when it stops.

A fault in one model does not affect the others: they are loaded, and saved.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from functools import partial

from pushstep.proto.errors import ModelNotLoaded, PushstepError
from pushstep.proto.errors.status import named
from pushstep.proto.wire.identifiers import is_name

from ..process import garbage
from ..process.threads import DISK
from ..storage import files
from ..storage.model_folder import Recovered, model_folders
from ..storage.snapshots import EXPORT_PREFIX
from .catalog import Catalog
from .model import Model

log = logging.getLogger("pushstep.catalog")


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
        for name in await DISK.run(model_folders, self._catalog.config.data / "models"):
            if stopping():
                return
            if is_name(name):
                try:
                    await self._load_model(name)
                except Exception as error:  # noqa: BLE001 - whatever a folder holds, the other models are served
                    self._note_not_loaded(name, error)
        self._catalog.loaded = self._catalog.ready = True

    def _note_not_loaded(self, name: str, error: Exception) -> None:
        if isinstance(error, ModelNotLoaded):
            found = error
        elif isinstance(error, OSError):
            found = ModelNotLoaded(model=name, problem=files.reason(error))
        else:
            found = ModelNotLoaded(model=name, problem=named(error, log).message)
        self._catalog.not_loaded[name] = copy.copy(
            found
        )  # a copy, without the traceback, which would hold what was loaded
        log.error("model %s was not loaded: %s", name, found.fields["problem"])

    async def _load_model(self, name: str) -> None:
        found = await DISK.run(self._catalog.folder(name).recover)
        if found is None:
            return
        model = await DISK.run(self._recovered, name, found)
        try:
            await model.writer.submit(partial(model.arenas.load, found.state.copy, model.timeline))
            await self._catalog.write_identity(model, clean_version=None)
        except BaseException:
            await model.close()
            raise
        snapshot = found.state.snapshot
        model.record("loaded", "server", snapshot=snapshot)
        self._catalog.models[name] = model
        garbage.set_aside(len(model.layout.slots))
        log.info(
            "model %s at version %d, timeline %d, from %s", name, model.version, model.timeline, snapshot
        )

    def _recovered(self, name: str, found: Recovered) -> Model:
        """The model that was found, except for the content of its arenas."""
        identity, state, copied = found.identity, found.state, found.state.copy
        proven = (identity.timeline, identity.clean_version) == (copied.timeline, copied.version)
        timeline = identity.timeline + (not proven)
        model = self._catalog.made(name, identity.uid, timeline, copied.layout, state.groups)
        model.commits.version, model.commits.lineage = copied.version, list(copied.lineage)
        if not proven:
            model.commits.go_back(copied.lineage_here, timeline)
        model.begun_at = timeline, copied.version
        model.adopt(state)
        model.sessions.parse(state.workers, time.monotonic(), state.forgotten_epoch)
        # without the check that a round fits in staging: a smaller budget must not keep the model from loading
        model.coordinator.switch(state.policy, time.monotonic())
        if not proven:
            model.sessions.close_epochs()
        return model

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
                )
            try:
                await model.close()
            except Exception:
                log.exception("model %s could not be closed", name)
        return saved

    async def _save_last(self, name: str, model: Model) -> None:
        """Write the last snapshot straight from the arenas.

        Nobody writes to them any more, so no copy is needed.
        """
        model.end()
        facts, copied = await model.copy(last=True)
        snapshots = self._catalog.snapshots(name)
        manifest = await DISK.run(snapshots.write, facts, copied, automatic=True)
        log.info("model %s saved at version %d: %s", name, copied.version, manifest["id"])
        try:
            await self._catalog.write_identity(model, clean_version=copied.version)
            await DISK.run(snapshots.prune)
        except PushstepError as error:
            log.warning("model %s: after its last snapshot: %s", name, error.message)

    def _what_is_left(self, name: str) -> str:
        try:
            ids = self._catalog.snapshots(name).ids()
        except PushstepError as error:
            return error.message
        return f"the next start has {ids[0]}" if ids else "it has no snapshot: it is lost"
