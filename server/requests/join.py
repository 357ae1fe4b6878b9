"""Joins and leaves of workers.

A worker that joins is told its identity, the model's manifest and settings, and the outcomes of its last pushes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, zip_longest
from typing import Final, TypeVar

from pushstep.proto.errors import Fenced, ManifestMismatch, MessageTooLarge, ModelLost, UnknownModel
from pushstep.proto.process import is_gone
from pushstep.proto.training_pb2 import (
    CreationTicket,
    JoinRequest,
    JoinResponse,
    LeaveRequest,
    LeaveResponse,
    Membership,
    Process,
    PullHeader,
)
from pushstep.proto.types_pb2 import Identity, Manifest
from pushstep.proto.wire.hyperparameters import plain_values
from pushstep.proto.wire.layout import Layout, Slot
from pushstep.proto.wire.names import check_name
from pushstep.proto.wire.parts import MAX_WHOLE_BYTES

from ..coordinator.worker import Worker
from ..models.catalog import Catalog
from ..models.creations import propose
from ..models.model import Model
from ..parts.shard import whole_of
from ..process.inline import INLINE_PARTS
from ..process.request_log import about
from ..process.threads import REQUESTS

DIFFERENCES_SHOWN: Final = 10
T = TypeVar("T")


async def join(
    catalog: Catalog, request: JoinRequest, peer: str = "", most_bytes: int = MAX_WHOLE_BYTES
) -> JoinResponse:
    """Make the caller a worker of the model, or give it a ticket to create the model.

    A large manifest is examined first, in a thread. The model may change meanwhile, or be created.
    MessageTooLarge if the answer's manifest takes more than `most_bytes`. The join stands then: a join with the same
    attempt gets the same answer.
    """
    about(request.model, request.worker)
    response, layout = await _join(catalog, request, peer)
    if layout.manifest_bytes > most_bytes:
        raise MessageTooLarge(got=layout.manifest_bytes, limit=most_bytes)
    await fill_in(response.member if response.HasField("member") else response.create, layout)
    return response


async def fill_in(answer: Membership | CreationTicket | PullHeader, layout: Layout) -> None:
    """Put the layout's manifest into an answer; in a thread if the manifest is large."""
    few = len(layout.slots) <= INLINE_PARTS
    await REQUESTS.run_unless(few, answer.manifest.CopyFrom, layout.manifest)


async def _join(catalog: Catalog, request: JoinRequest, peer: str) -> tuple[JoinResponse, Layout]:
    """The answer without its manifest, and the layout that holds the manifest."""
    check_name(request.worker, "worker name")
    same_as: Layout | None = None
    while (model := catalog.models.get(request.model)) is not None:
        if request.model_uid and request.model_uid != model.uid:
            raise ModelLost(model=model.name)
        if not request.HasField("manifest") or whole_of(model) is same_as:
            await model.recorder.require_room()
            if catalog.models.get(request.model) is not model:
                continue
            worker = _joined(model, request)
            await keep_epoch(catalog, model, worker)
            member = membership(model, worker)
            member.rolled_back = model.identity(None).rolled_back(request.timeline, request.version)
            return JoinResponse(member=member), whole_of(model)
        same_as = whole_of(model)
        await _looked_at(request.manifest, partial(_check_same, model.name, same_as))
    catalog.require_free(request.model)
    if request.model_uid:
        raise ModelLost(model=request.model[:200])
    if not request.HasField("manifest"):
        raise UnknownModel(model=request.model[:200])
    check_name(request.model, "model name")
    proposal = await _looked_at(
        request.manifest, partial(propose, part_bytes=catalog.config.part_bytes, ranks=catalog.ranks)
    )
    if request.model in catalog.models:
        return await _join(catalog, request, peer)
    now_s = catalog.clock()
    creation = catalog.begin_creation(
        request.model, request.worker, proposal, now_s, request.attempt, request.process, peer
    )
    ticket = CreationTicket(
        model=request.model,
        worker=request.worker,
        ticket=creation.ticket,
        expires_s=max(0.0, creation.expires_at_s - now_s),
    )
    if catalog.ranks is not None and proposal.shard is not None:
        catalog.ranks.announce(request.model, creation.ticket, proposal.shard)
        ticket.shards.CopyFrom(proposal.shard.map)
    return JoinResponse(create=ticket), proposal.layout


async def _looked_at(manifest: Manifest, look: Callable[[Manifest], T]) -> T:
    few = len(manifest.parameters) + len(manifest.groups) <= INLINE_PARTS
    return await REQUESTS.run_unless(few, look, manifest)


def _joined(model: Model, request: JoinRequest) -> Worker:
    """Join a model that exists: open the worker's next epoch, unless this attempt has opened it already."""
    now_s = model.clock()
    known = model.sessions.workers.get(request.worker)
    model.require_room_for(request.worker)
    epoch = known.epoch if known is not None else 0
    old_epoch = request.epoch if request.model_uid == model.uid else 0
    takeover = request.takeover or (known is not None and _has_ended(known, request.process))
    worker, decisions = model.coordinator.join(request.worker, now_s, takeover, request.attempt, old_epoch)
    if worker.epoch != epoch:
        worker.process = Process()  # a copy: a submessage keeps the whole request in memory
        worker.process.CopyFrom(request.process)
        model.record("joined", worker.name, epoch=worker.epoch)
    model.executor.apply(decisions)
    return worker


async def keep_epoch(catalog: Catalog, model: Model, worker: Worker) -> None:
    """Have a worker's new epoch kept before anyone is told of it. Fenced if another session joined meanwhile."""
    epoch = worker.epoch
    await catalog.keep_epoch(model, epoch)
    await model.recorder.until_safe()
    if worker.epoch != epoch or model.sessions.workers.get(worker.name) is not worker:
        raise Fenced(worker=worker.name, epoch=epoch, why="another session joined under this name")


def _has_ended(holder: Worker, caller: Process) -> bool:
    """True if the caller may take over the name: the holder's process is gone, or is the caller's own."""
    return bool(holder.process.pid) and (holder.process == caller or is_gone(holder.process))


async def leave(catalog: Catalog, request: LeaveRequest) -> LeaveResponse:
    """End a worker's epoch. If the request says `undo`, undo its join instead."""
    about(request.model, request.identity.worker)
    if request.undo:
        await _undo(catalog, request)
        return LeaveResponse()
    model = catalog.models.get(request.model)
    # nothing to leave if the model is gone, or is another one of the same name
    if model is None or model.uid != request.identity.model_uid:
        return LeaveResponse()
    ignored, decisions = model.coordinator.on_leave(
        request.identity,
        model.clock(),
        {edit.group: plain_values(edit.values) for edit in request.edits},
        request.worker_state if request.HasField("worker_state") else None,
    )
    if request.identity.worker in model.sessions.workers:
        model.record("left", request.identity.worker)
    model.executor.apply(decisions)
    await model.recorder.until_safe()
    return LeaveResponse(ignored_edits=ignored)


async def _undo(catalog: Catalog, request: LeaveRequest) -> None:
    """Undo a join, whose answer may still be on its way or be lost.

    Its creation ticket is withdrawn, and its epoch is ended. The model is deleted too if the join is the first epoch of
    the only worker and the model has not changed since its creation. Nothing happens if another join has come since.
    """
    name, attempt = request.identity.worker, request.attempt
    await catalog.withdraw_creation(request.model, name, attempt)
    model = catalog.models.get(request.model)
    worker = None if model is None else model.sessions.workers.get(name)
    if model is None or worker is None:
        return
    answered = request.identity.model_uid == model.uid and request.identity.epoch == worker.epoch
    if not answered and not (attempt and worker.attempts and worker.attempts[-1] == attempt):
        return
    alone = model.sessions.workers.keys() == {name} and worker.epoch == 1
    _, decisions = model.coordinator.on_leave(_identity(model, worker), model.clock())
    model.record("left", name)
    model.executor.apply(decisions)
    await model.recorder.until_safe()
    if alone and (model.timeline, model.version, model.edit) == (1, 0, 0):
        await catalog.delete(model.name, by=name)


def _identity(model: Model, worker: Worker) -> Identity:
    return Identity(
        model_uid=model.uid,
        timeline=model.timeline,
        worker=worker.name,
        epoch=worker.epoch,
        sequence=worker.sequence,
    )


def membership(model: Model, worker: Worker) -> Membership:
    """The membership of a joined worker, without the manifest."""
    return Membership(
        identity=_identity(model, worker),
        version=model.version,
        manifest_hash=whole_of(model).manifest_hash,
        shards=None if model.shard is None else model.shard.map,
        groups=model.groups.messages(),
        receipts=model.coordinator.receipts_of(worker),
        lease_s=model.sessions.lease_s,
        lead=model.sessions.leads(worker),
        worker_state=worker.worker_state,
        policy=model.coordinator.policy.settings.model_dump_json(),
        forgotten_epoch=worker.forgotten[0],
        forgotten_sequence=worker.forgotten[1],
        extras_version=model.extras.version,
    )


def _check_same(model: str, ours: Layout, manifest: Manifest) -> None:
    """Raise ManifestMismatch with the first differences unless the worker's manifest is the model's."""
    theirs = Layout(manifest)
    if theirs.manifest_hash == ours.manifest_hash:
        return
    differences = _differences(ours, theirs)
    shown = "; ".join(islice(differences, DIFFERENCES_SHOWN)) or "aliases or optimizers are not the same"
    more = sum(1 for _ in differences)
    raise ManifestMismatch(model=model, differences=shown + (f"; and {more} more" if more else ""))


def _differences(ours: Layout, theirs: Layout) -> Iterator[str]:
    for index, (here, there) in enumerate(zip_longest(ours.slots, theirs.slots)):
        if here is None:
            yield f"only this worker has {there.name!r}"
        elif there is None:
            yield f"only the server has {here.name!r}"
        elif _agreed(here) != _agreed(there):
            yield f"parameter {index}: the server has {_shown(here)}, this worker {_shown(there)}"
    groups = zip_longest(ours.manifest.groups, theirs.manifest.groups)
    for index, (known, sent) in enumerate(groups):
        rules = [None if group is None else group.rule for group in (known, sent)]
        if rules[0] != rules[1]:
            yield f"group {index}: the server has {rules[0]}, this worker {rules[1]}"


def _agreed(slot: Slot) -> tuple[object, ...]:
    return slot.name, slot.shape, slot.dtype, slot.group


def _shown(slot: Slot) -> str:
    return f"{slot.name!r} {slot.shape} {slot.dtype} in group {slot.group}"
