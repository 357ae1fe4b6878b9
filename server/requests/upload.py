"""Uploads of whole tensors: a new model, edited parameters, a replaced optimizer state, a new group, buffers.

As with a push, nothing of the model changes before the body is complete and checked.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Final

import torch

from pushstep.optim import RULES
from pushstep.proto.errors import (
    MalformedFrame,
    ManifestChanged,
    MapChanged,
    OtherWorkersLive,
    Unavailable,
)
from pushstep.proto.training_pb2 import (
    UPLOAD_KIND_CREATE,
    UPLOAD_KIND_EXTRAS,
    UPLOAD_KIND_GROUP,
    UPLOAD_KIND_PARAMETERS,
    UPLOAD_KIND_STATE,
    Process,
    UploadHeader,
    UploadKind,
    UploadResponse,
)
from pushstep.proto.types_pb2 import Manifest, Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.bodies import check_body
from pushstep.proto.wire.frames import Assembly, BodyDigest, Chunk
from pushstep.proto.wire.hyperparameters import plain_values
from pushstep.proto.wire.layout import Layout, with_group
from pushstep.proto.wire.parts import WHOLE_BYTES

from ..arenas.arena import Arenas
from ..arenas.arenas_copy import ArenasCopy
from ..arenas.extras import Extras
from ..captures.capture import spans_of
from ..coordinator.groups import Group
from ..coordinator.policies import catalogue as policies
from ..coordinator.worker import Worker
from ..models.catalog import Catalog
from ..models.creations import Creation
from ..models.edits import Edits
from ..models.model import Model
from ..parts.refusals import refuse
from ..parts.shard import ModelShard, whole_of
from ..process import garbage
from ..process.inline import INLINE_PARTS
from ..process.request_log import about
from ..process.threads import PUSHES, REQUESTS
from ..streams.received import INLINE_MESSAGE_BYTES
from . import push_header
from .join import fill_in, keep_epoch, membership
from .receiving import place_chunk
from .upload_content import check_complete, check_exact, check_state, extras_in

_MOST_STATES: Final = max(len(rule.state_names) for rule in RULES.values())
_OF_A_MODEL = (UPLOAD_KIND_PARAMETERS, UPLOAD_KIND_STATE, UPLOAD_KIND_GROUP, UPLOAD_KIND_EXTRAS)


class Upload:
    """One upload, from its header to its response. Owns its budget bytes and its creation ticket."""

    def __init__(self, catalog: Catalog, header: UploadHeader) -> None:
        self._catalog = catalog
        self._header = header
        self._budget = catalog.staging
        self._model: Model | None = None
        self._creation: Creation | None = None
        self._again = False
        # the sender was told to come again, with the same ticket
        self._comes_again = False
        self._reserved = 0
        self._committing = False
        self._promise = contextlib.ExitStack()
        self._has_place = False
        self._shard: ModelShard | None = None

    async def admit(self) -> None:
        """Check the header and claim the body's bytes. Raises before any of the body is read."""
        try:
            await self._admit()
        except Unavailable:
            self._comes_again = True
            raise

    async def _admit(self) -> None:
        catalog, header = self._catalog, self._header
        about(header.model, header.identity.worker, header.identity.sequence)
        now_s = catalog.clock()
        if header.kind == UPLOAD_KIND_CREATE:
            self._creation = catalog.creation(header.model, header.ticket, now_s)
            manifest = self._creation.manifest
            few = len(manifest) <= INLINE_MESSAGE_BYTES
            self._layout = await REQUESTS.run_unless(few, self._laid_out, manifest)
            self._policy = policies.from_wire(header.policy)
        elif header.kind in _OF_A_MODEL:
            self._model = catalog.get(header.model, header.identity.model_uid)
            self._again = header.kind == UPLOAD_KIND_STATE and self._model.replaced_by == header.identity
            if not self._again:
                self._model.require_current(header.identity)
                self._model.sessions.require(header.identity, now_s)
            self._layout = self._base = self._model.layout
            if header.kind != UPLOAD_KIND_EXTRAS:
                refuse(self._model.shard, header.model, "replacing values, states or groups")
            if header.kind == UPLOAD_KIND_GROUP:
                few = len(self._layout.slots) + len(header.manifest.parameters) <= INLINE_PARTS
                self._layout = await REQUESTS.run_unless(few, with_group, self._layout, header.manifest)
            elif header.kind != UPLOAD_KIND_EXTRAS and header.manifest_hash != self._layout.manifest_hash:
                raise ManifestChanged(model=header.model)
        else:
            raise MalformedFrame(problem=f"upload kind {header.kind} does not exist")
        few = len(self._layout.slots) + len(header.segments) <= INLINE_PARTS
        lengths = await REQUESTS.run_unless(few, self._check_header)
        if header.kind in (UPLOAD_KIND_EXTRAS, UPLOAD_KIND_CREATE) and header.extras_bytes:
            # counted beside the buffers that they replace: a reader may still hold those
            self._promise.enter_context(catalog.holding.promised(header.extras_bytes))
        # the worker of a creation is taken from its ticket: nothing has checked the header's identity
        worker = header.identity.worker if self._creation is None else self._creation.worker
        self._reserved = await self._budget.claim(f"{header.model}/{worker}", sum(lengths))
        made = partial(Assembly, lengths, self._digest, self._budget.buffer)
        self._body = await self._catalog.device.prepared(made, small=few)

    def _laid_out(self, manifest: bytes) -> Layout:
        """The layout of what this upload brings: of a model in several ranks the part that lies here. MapChanged."""
        whole, ranks = Layout(Manifest.FromString(manifest)), self._catalog.ranks
        if ranks is None:
            return whole
        self._shard = ranks.shard(whole)
        if self._header.map_version != self._shard.map.version:
            raise MapChanged(model=self._header.model)
        return whole if self._shard.part is None else self._shard.part.layout

    def _check_header(self) -> list[int]:
        """The byte length of each segment. Raises a named error if the layout does not allow the header."""
        header = self._header
        push_header.require_plausible(self._layout, header.segments, header.groups, states=_MOST_STATES)
        for segment in header.segments:
            check_exact(self._layout, segment)
        lengths = check_body(self._layout, header.segments, self._catalog.config.max_bytes)
        if header.kind in (UPLOAD_KIND_EXTRAS, UPLOAD_KIND_CREATE) and header.extras_bytes:
            lengths.append(header.extras_bytes)
        check_complete(self._layout, header)
        self._digest = BodyDigest(header.segments)
        return lengths

    def place(self, chunk: Chunk) -> asyncio.Future[None] | None:
        """Copy a chunk into staging, and renew the worker's lease.

        So neither the lease nor the creation ticket runs out while bytes come.
        """
        if self._model is not None:
            self._model.coordinator.on_progress(self._header.identity, self._model.clock())
        return place_chunk(self._body.place, chunk)

    def release(self) -> None:
        """Give everything back, however the upload ended. A commit that has begun does so when it ends."""
        if not self._committing:
            self._let_go()

    def _let_go(self) -> None:
        self._budget.release(self._reserved)
        self._promise.close()
        if self._creation is not None:
            self._catalog.end_creation(
                self._header.model,
                self._creation,
                self._catalog.clock(),
                had_place=self._has_place,
                comes_again=self._comes_again,
            )

    async def commit(self) -> UploadResponse:
        """Apply the whole upload, even if its sender goes away. WrongLength if the body is incomplete."""
        self._body.finish()
        self._committing = True
        return await self._catalog.whole(self._commit(), self._let_go)

    async def _commit(self) -> UploadResponse:
        kind = self._header.kind
        if any(segment.state for segment in self._header.segments):
            await PUSHES.run(check_state, self._layout, self._header, self._body)
        if kind == UPLOAD_KIND_CREATE:
            return await self._create()
        if self._model is None:
            raise MalformedFrame(problem="no model")
        if self._again:  # applied already: its answer was lost
            return await self._joined(self._model)
        self._model.require_current(self._header.identity)
        return await self._replace(self._model)

    async def _replace(self, model: Model) -> UploadResponse:
        match self._header.kind:
            case UploadKind.UPLOAD_KIND_PARAMETERS:
                return await self._replace_parameters(model)
            case UploadKind.UPLOAD_KIND_STATE:
                return await self._replace_state(model)
            case UploadKind.UPLOAD_KIND_EXTRAS:
                async with model.recorder.room_for(self._header.extras_bytes):
                    return await self._replace_extras(model)
            case _:
                return await self._add_group(model)

    async def _create(self) -> UploadResponse:
        if self._creation is None:
            raise MalformedFrame(problem="no creation ticket")
        header, worker, attempt = self._header, self._creation.worker, self._creation.attempt
        extras, ranks, uid = await self._extras(Extras()), self._catalog.ranks, b""
        if ranks is not None:
            uid = await ranks.uploaded(header.model, int(header.ticket))
        self._catalog.take_place(header.model, self._creation)
        self._has_place = True
        model = await PUSHES.run(self._catalog.new_model, header.model, self._layout, uid)
        model.extras, model.shard = extras, self._shard
        await model.writer.submit(lambda: self._fill(model.arenas, header.steps))
        model.begin_under(self._policy)
        if ranks is not None:
            try:
                await ranks.commit(model, int(header.ticket))
            except BaseException:
                await model.close()
                raise
        await self._catalog.finish_creation(header.model, self._creation, model)
        self._promise.close()  # from here on the model counts its buffers itself
        joined = self._join(model, worker, attempt, process=self._creation.process)
        await keep_epoch(self._catalog, model, joined)
        return await self._answer(model, joined, 0)

    def _values(self) -> list[tuple[Segment, torch.Tensor]]:
        """The body by its segments."""
        segments = self._header.segments
        return [(s, self._body.part(i, dtypes.to_torch(s.dtype, "segment"))) for i, s in enumerate(segments)]

    def _fill(self, arenas: Arenas | ArenasCopy, steps: Sequence[int]) -> None:
        """Write the body into arenas (in the writer thread) or into a copy of them."""
        for segment, part in self._values():
            if segment.state:
                flat = arenas.states[segment.arena][segment.state]
            else:
                flat = arenas.parameters[segment.arena]
            flat[segment.start : segment.stop].copy_(part)
        if steps:
            arenas.steps[:] = [int(step) for step in steps]

    async def _replace_parameters(self, model: Model) -> UploadResponse:
        identity = self._header.identity
        decided, decisions = model.coordinator.uploaded(identity, self._digest.value, model.clock())
        version = int(decided.receipt.version)
        if decisions is None:
            await model.recorder.until_safe()
            return UploadResponse(version=version, timeline=model.timeline)
        model.record("parameters_uploaded", identity.worker)

        fresh = [model.layout.slots[index] for index in self._header.fresh]
        values = [group.values for group in model.groups.list]

        def write() -> None:
            with model.arenas.writing(spans_of(self._header.segments, fresh)):
                model.arenas.version = version
                self._fill(model.arenas, [])
                model.arenas.begin_anew(fresh, values)
                for segment in self._header.segments:
                    for slot in model.layout.slots_of(segment):
                        model.arenas.mark_changed(slot, version)
            model.arenas.watch.look(model.arenas.layout, model.arenas.parameters)

        entry = model.recorder.values(decided, self._values(), self._header.fresh)
        writing = model.executor.write(write, decided, entry)
        model.executor.apply(decisions)  # after the write: pushes that it lets in step on top of it
        await writing
        return UploadResponse(version=version, timeline=model.timeline)

    async def _replace_state(self, model: Model) -> UploadResponse:
        header = self._header
        others = [w.name for w in model.sessions.live() if w.name != header.identity.worker]
        if others and not header.force:
            raise OtherWorkersLive(count=len(others), workers=", ".join(others[:5]))
        planned = {
            entry.group: model.groups.changed(entry.group, plain_values(entry.values), model.name)
            for entry in header.groups
        }
        async with self._catalog.restores.turns:
            _, copy = await model.copy()
            await PUSHES.run(self._fill, copy, header.steps)
            await self._catalog.restores.replace(model, copy, None, header.identity.worker)
        model.groups.write(planned)
        model.replaced_by = header.identity
        joined = self._join(model, header.identity.worker, old_epoch=header.identity.epoch)
        await keep_epoch(self._catalog, model, joined)
        return await self._joined(model)

    def _join(
        self, model: Model, name: str, attempt: int = 0, old_epoch: int = 0, process: Process | None = None
    ) -> Worker:
        worker, decisions = model.coordinator.join(
            name, model.clock(), takeover=True, attempt=attempt, old_epoch=old_epoch
        )
        worker.process = worker.process if process is None else process
        model.executor.apply(decisions)
        return worker

    async def _joined(self, model: Model) -> UploadResponse:
        worker = model.sessions.workers[self._header.identity.worker]
        return await self._answer(model, worker, model.version)

    async def _answer(self, model: Model, worker: Worker, version: int) -> UploadResponse:
        """The answer with the worker's membership.

        A manifest that is too long for one message is left out: the caller has uploaded it, or knew it before.
        """
        layout = whole_of(model)
        member = membership(model, worker)
        response = UploadResponse(member=member, version=version, timeline=model.timeline)
        if layout.manifest_bytes <= WHOLE_BYTES:
            await fill_in(response.member, layout)
        return response

    async def _extras(self, held: Extras) -> Extras:
        """The buffers after this upload: the body's last part updates or replaces `held`. MalformedFrame."""
        if not self._header.extras_bytes:
            return held
        part = self._body.part(len(self._header.segments), torch.uint8)
        sent = await PUSHES.run(extras_in, part)
        known = {name for slot in self._layout.slots for name in (slot.name, *slot.aliases)}
        if not known.isdisjoint(sent):
            raise MalformedFrame(problem=f"extras name a parameter: {sorted(known & set(sent))[0]!r}")
        all_of_them = sent if self._header.extras_all else {**held, **sent}
        return await PUSHES.run(Extras, all_of_them, held)

    async def _replace_extras(self, model: Model) -> UploadResponse:
        held: Extras | None = None
        while held is not model.extras:  # another upload replaced them while these were read
            held = model.extras
            extras = await self._extras(held)
            model.require_current(self._header.identity)
        if model.sessions.leads(model.sessions.require(self._header.identity, model.clock())):
            file = self._body.part(len(self._header.segments), torch.uint8)
            model.replace_extras(extras, file, are_all=self._header.extras_all)
            await model.recorder.until_safe()
        return UploadResponse(
            version=model.version, timeline=model.timeline, extras_version=model.extras.version
        )

    async def _add_group(self, model: Model) -> UploadResponse:
        identity = self._header.identity
        if self._layout.manifest_hash != model.layout.manifest_hash:
            added = [Group.make(group) for group in self._header.manifest.groups]
            grown = Arenas.bytes_charged(self._layout) - Arenas.bytes_charged(model.layout)
            with self._catalog.holding.promised(grown):
                extension = await PUSHES.run(self._extended, model, added)
            model.require_current(identity)
            if model.layout is not self._base:  # another group was added first: these slots are taken
                raise ManifestChanged(model=model.name)
            _, adopting = Edits(model).add_groups(extension, added, identity.worker)
            await adopting
            await self._catalog.keep_groups(model)
            garbage.set_aside(len(model.layout.slots))
        worker = model.sessions.require(identity, model.clock())
        return await self._answer(model, worker, model.version + 1)

    def _extended(self, model: Model, added: Sequence[Group]) -> ArenasCopy:
        values = [group.values for group in (*model.groups.list, *added)]
        extension = model.arenas.extended(self._layout, values)
        self._fill(extension, [])
        return extension
