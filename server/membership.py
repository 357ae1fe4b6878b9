"""How workers come and go. One that joins is told who it is now, what the model is, and what became of its last pushes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, zip_longest
from typing import Final, TypeVar

from pushstep.proto.errors import ManifestMismatch, MessageTooLarge, ModelLost, UnknownModel
from pushstep.proto.hyperparameters import plain_values
from pushstep.proto.identifiers import check_name
from pushstep.proto.layout import Layout, Slot
from pushstep.proto.parts import MAX_WHOLE_BYTES
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

from .catalog import Catalog, propose
from .model import Model
from .threads import INLINE_PARTS, REQUESTS
from .worker import Worker

DIFFERENCES_SHOWN: Final = 10
T = TypeVar("T")


async def join(
    catalog: Catalog, request: JoinRequest, peer: str = "", most_bytes: int = MAX_WHOLE_BYTES
) -> JoinResponse:
    """Make the caller a worker, or give it leave to create the model.

    What takes long with a large manifest is done first, in a thread. The model may change meanwhile, or begin to be.
    MessageTooLarge if the answer's manifest takes more than `most_bytes`; the join has been made, and is answered again
    by its attempt.
    """
    response, layout = await _join(catalog, request, peer)
    if layout.manifest_bytes > most_bytes:
        raise MessageTooLarge(got=layout.manifest_bytes, limit=most_bytes)
    await fill_in(response.member if response.HasField("member") else response.create, layout)
    return response


async def fill_in(answer: Membership | CreationTicket | PullHeader, layout: Layout) -> None:
    """Give an answer its manifest; in a thread if it is large."""
    few = len(layout.slots) <= INLINE_PARTS
    await REQUESTS.run_unless(few, answer.manifest.CopyFrom, layout.manifest)


async def _join(catalog: Catalog, request: JoinRequest, peer: str) -> tuple[JoinResponse, Layout]:
    """The answer without its manifest, and the layout that has it."""
    check_name(request.worker, "worker name")
    same_as: Layout | None = None
    while (model := catalog.models.get(request.model)) is not None:
        if request.model_uid and request.model_uid != model.uid:
            raise ModelLost(model=model.name)
        if not request.HasField("manifest") or model.layout is same_as:
            return _joined(model, request)
        same_as = model.layout
        await _looked_at(request.manifest, partial(_check_same, model.name, same_as))
    catalog.require_free(request.model)
    if request.model_uid:
        raise ModelLost(model=request.model[:200])
    if not request.HasField("manifest"):
        raise UnknownModel(model=request.model[:200])
    check_name(request.model, "model name")
    proposal = await _looked_at(request.manifest, propose)
    if request.model in catalog.models:
        return await _join(catalog, request, peer)
    now_s = time.monotonic()
    creation = catalog.begin_creation(
        request.model, request.worker, proposal, now_s, request.attempt, request.process, peer
    )
    ticket = CreationTicket(
        model=request.model,
        worker=request.worker,
        ticket=creation.ticket,
        expires_s=max(0.0, creation.expires_at_s - now_s),
    )
    return JoinResponse(create=ticket), proposal.layout


async def _looked_at(manifest: Manifest, look: Callable[[Manifest], T]) -> T:
    few = len(manifest.parameters) + len(manifest.groups) <= INLINE_PARTS
    return await REQUESTS.run_unless(few, look, manifest)


def _joined(model: Model, request: JoinRequest) -> tuple[JoinResponse, Layout]:
    """The next epoch of a worker of a model that is there."""
    now_s = time.monotonic()
    known = model.sessions.workers.get(request.worker)
    model.require_room_for(request.worker)
    epoch = known.epoch if known is not None else 0
    old_epoch = request.epoch if request.model_uid == model.uid else 0
    takeover = request.takeover or (known is not None and _has_ended(known, request.process))
    worker, decisions = model.judge.join(request.worker, now_s, takeover, request.attempt, old_epoch)
    if worker.epoch != epoch:
        worker.process = Process()  # of its own: a part of a message keeps all of it
        worker.process.CopyFrom(request.process)
        model.record("joined", worker.name, epoch=worker.epoch)
    model.executor.carry_out(decisions)
    return JoinResponse(member=membership(model, worker)), model.layout


def _has_ended(holder: Worker, caller: Process) -> bool:
    """Whether nobody but the caller can mean the name: its holder's process is gone, or is the caller's."""
    return bool(holder.process.pid) and (holder.process == caller or is_gone(holder.process))


async def leave(catalog: Catalog, request: LeaveRequest) -> LeaveResponse:
    """End a worker's epoch; undo its join, if it is told to."""
    if request.undo:
        await _undo(catalog, request)
        return LeaveResponse()
    model = catalog.models.get(request.model)
    # nothing to leave if the model is gone, or is another one of the same name
    if model is None or model.uid != request.identity.model_uid:
        return LeaveResponse()
    ignored, decisions = model.judge.left(
        request.identity,
        time.monotonic(),
        {edit.group: plain_values(edit.values) for edit in request.edits},
        request.worker_state if request.HasField("worker_state") else None,
    )
    if request.identity.worker in model.sessions.workers:
        model.record("left", request.identity.worker)
    model.executor.carry_out(decisions)
    return LeaveResponse(ignored_edits=ignored)


async def _undo(catalog: Catalog, request: LeaveRequest) -> None:
    """Have a join not have been; its answer may be on its way still, or be lost."""
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
    _, decisions = model.judge.left(_identity(model, worker), time.monotonic())
    model.record("left", name)
    model.executor.carry_out(decisions)
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
        manifest_hash=model.layout.manifest_hash,
        groups=model.group_values(),
        receipts=model.judge.receipts_of(worker),
        lease_s=model.sessions.lease_s,
        lead=model.sessions.leads(worker),
        worker_state=worker.worker_state,
        policy=model.judge.policy.settings.model_dump_json(),
        forgotten_epoch=worker.forgotten[0],
        forgotten_sequence=worker.forgotten[1],
        extras_version=model.extras.version,
    )


def _check_same(model: str, ours: Layout, manifest: Manifest) -> None:
    """ManifestMismatch, listing the first differences, unless the worker's manifest is the model's."""
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
