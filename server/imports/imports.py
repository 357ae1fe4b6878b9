"""Brings a file's values into a model, or makes a model of a file.

An import works like a restore: it begins a new timeline, and all workers are told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from pushstep.proto.errors import InvalidFile, InvalidSettings, ManifestChanged, ModelExists
from pushstep.proto.training_pb2 import Process
from pushstep.proto.wire.layout import Layout
from pushstep.proto.wire.names import check_name
from pushstep.proto.wire.tensor_names import GROUPS

from ..arenas.extras import Extras
from ..coordinator.policies import catalogue as policies
from ..models.catalog import Catalog
from ..models.creations import Proposal, propose
from ..models.model import Model
from ..process.threads import READS
from .content import FileContent, Sorting, header_limit, read_file
from .file_groups import manifest_of
from .incoming_file import IncomingFile


@dataclass(frozen=True, slots=True)
class ImportSettings:
    """How a file is brought into a model: which of it, and what becomes of the optimizer state."""

    partial: bool
    weights_only: bool
    keep_state: bool


class Imports:
    """What operators bring into the models of a catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def replace(
        self, model: Model, file: IncomingFile, settings: ImportSettings, by: str
    ) -> dict[str, Any]:
        """Replace values of a model by those of a complete file, which this releases. What it did, as JSON."""
        return await self._catalog.whole(self._replace(model, file, settings, by), file.release)

    async def create(self, name: str, groups: str | None, file: IncomingFile, by: str) -> Model:
        """Make a model of a complete file, which this releases. `groups` None: those that the file names."""
        return await self._catalog.whole(self._create(name, groups, file, by), file.release)

    def require_new(self, name: str, length_bytes: int | None) -> None:
        """InvalidName, ModelExists, ModelNotLoaded, OverCapacity, Draining: refusals before a file is read."""
        self._catalog.require_open()
        check_name(name, "model name")
        self._catalog.require_free(name)
        if name in self._catalog.models:
            raise ModelExists(model=name)
        self._catalog.holding.require_room(length_bytes or 0)

    async def _replace(
        self, model: Model, file: IncomingFile, settings: ImportSettings, by: str
    ) -> dict[str, Any]:
        content, layout = await self._read_for(model, file, settings)
        async with self._catalog.restores.turns:
            _, copy = await model.copy()
            if copy.layout is not layout:
                raise ManifestChanged(model=model.name)
            groups = [group.values for group in model.groups.list]
            await READS.run(partial(content.fill, copy, groups, keeps_state=settings.keep_state))
            extras = await READS.run(_extras, content.extras, copy.extras)
            await self._catalog.restores.replace(model, replace(copy, extras=extras), None, by)
        done = _done(content, settings)
        model.record("imported", by, parameters=done["parameters"], state=done["state"])
        return {"timeline": model.timeline, "effective_version": copy.version, **done}

    async def plan_replace(
        self, model: Model, file: IncomingFile, settings: ImportSettings
    ) -> dict[str, Any]:
        """What `replace` would do. It releases the file, and raises what `replace` raises."""
        try:
            content, _ = await self._read_for(model, file, settings)
        finally:
            file.release()
        return {"timeline": model.timeline + 1, "version": model.version, **_done(content, settings)}

    async def _read_for(
        self, model: Model, file: IncomingFile, settings: ImportSettings
    ) -> tuple[FileContent, Layout]:
        model.require_whole()
        layout = model.layout

        def read() -> FileContent:
            tensors, _ = read_file(file.content, header_limit(layout))
            sorting = Sorting(layout, model.name, model.extras)
            return sorting.sorted(tensors, partial=settings.partial, weights_only=settings.weights_only)

        content = await READS.run(read)
        if content.states and settings.keep_state:
            raise InvalidSettings(problem="keep_state: the file has state of its own; say weights_only, too")
        return content, layout

    async def plan_create(self, name: str, groups: str | None, file: IncomingFile) -> dict[str, Any]:
        """What `create` would make. It releases the file, and raises what `create` raises."""
        try:
            proposal, content = await self._read_new(name, groups, file)
        finally:
            file.release()
        self._catalog.require_creatable(name, proposal)
        layout = proposal.layout
        return {
            "name": name,
            "parameters": len(layout.slots),
            "elements": sum(arena.elements for arena in layout.arenas),
            "bytes": proposal.bytes_needed,
            "groups": len(layout.manifest.groups),
            "buffers": len(content.extras),
        }

    async def _read_new(
        self, name: str, groups: str | None, file: IncomingFile
    ) -> tuple[Proposal, FileContent]:
        def read() -> tuple[Proposal, FileContent]:
            tensors, texts = read_file(file.content)
            text = groups if groups is not None else texts.get(GROUPS)
            if text is None:
                raise InvalidFile(problem=f"name its param groups, in `groups` or its metadata {GROUPS!r}")
            proposal = propose(manifest_of(tensors, text), self._catalog.config.part_bytes)
            sorting = Sorting(proposal.layout, name, None)
            return proposal, sorting.sorted(tensors, partial=False, weights_only=False)

        proposal, content = await READS.run(read)
        extras_bytes = sum(tensor.nbytes for tensor in content.extras.values())
        self.require_new(name, proposal.bytes_needed + extras_bytes)
        return proposal, content

    async def _create(self, name: str, groups: str | None, file: IncomingFile, by: str) -> Model:
        catalog = self._catalog
        proposal, content = await self._read_new(name, groups, file)
        extras_bytes = sum(tensor.nbytes for tensor in content.extras.values())
        now_s = catalog.clock()
        ticket = catalog.begin_creation(name, by, proposal, now_s, 0, Process()).ticket
        creation, has_place = catalog.creation(name, ticket, now_s), False
        try:
            with catalog.holding.promised(extras_bytes):
                catalog.take_place(name, creation)
                has_place = True
                model = await READS.run(catalog.new_model, name, proposal.layout)
                model.extras = await READS.run(_extras, content.extras, Extras())
                values = [group.values for group in model.groups.list]
                fill = partial(content.fill, model.arenas, values, keeps_state=True)
                await model.writer.submit(fill)
                model.begin_under(policies.from_wire(""))
                # or a first worker that withdraws its join would take the model along, as one that it has made
                model.edit = 1
                await catalog.finish_creation(name, creation, model)
        finally:
            catalog.end_creation(name, creation, catalog.clock(), had_place=has_place, comes_again=False)
        return model


def _done(content: FileContent, settings: ImportSettings) -> dict[str, Any]:
    """What of a file comes into a model."""
    state = "replaced" if content.states else "kept" if settings.keep_state else "begun_anew"
    return {"parameters": len(content.values), "buffers": len(content.extras), "state": state}


def _extras(sent: Mapping[str, Tensor], held: Extras) -> Extras:
    """The buffers after an import, in memory of their own."""
    return Extras({**held, **{name: tensor.clone() for name, tensor in sent.items()}}, held) if sent else held
