"""What a worker is told when it joins: who it is now, what the model is, and what became of its last pushes."""

from __future__ import annotations

import time

from pushstep.proto.errors import ManifestMismatch, ModelLost, UnknownModel
from pushstep.proto.identifiers import check_name
from pushstep.proto.layout import Layout
from pushstep.proto.process import is_gone
from pushstep.proto.training_pb2 import CreationTicket, JoinRequest, JoinResponse, Membership, Process
from pushstep.proto.types_pb2 import Identity, Manifest

from .catalog import CREATION_S, Catalog
from .model import Model
from .worker import Worker

DIFFERENCES_SHOWN = 10


def join(catalog: Catalog, request: JoinRequest) -> JoinResponse:
    """Make the caller a worker, or give it leave to create the model."""
    check_name(request.worker, "worker name")
    now_s = time.monotonic()
    model = catalog.models.get(request.model)
    if model is None:
        if request.model_uid:
            raise ModelLost(model=request.model[:200])
        if not request.HasField("manifest"):
            raise UnknownModel(model=request.model[:200])
        creation = catalog.begin_creation(
            request.model, request.worker, request.manifest, now_s, request.attempt, request.process
        )
        return JoinResponse(
            create=CreationTicket(
                model=request.model,
                worker=request.worker,
                ticket=creation.ticket,
                expires_s=CREATION_S,
                manifest=creation.layout.manifest,
            )
        )
    if request.model_uid and request.model_uid != model.uid:
        raise ModelLost(model=model.name)
    if request.HasField("manifest"):
        _check_same(model, request.manifest)
    known = model.sessions.workers.get(request.worker)
    model.require_room_for(request.worker)
    epoch = known.epoch if known is not None else 0
    old_epoch = request.epoch if request.model_uid == model.uid else 0
    takeover = request.takeover or (known is not None and _has_ended(known, request.process))
    worker, decisions = model.judge.join(request.worker, now_s, takeover, request.attempt, old_epoch)
    if worker.epoch != epoch:
        worker.process = request.process
        model.record("joined", worker.name, epoch=worker.epoch)
    model.executor.carry_out(decisions)
    return JoinResponse(member=membership(model, worker))


def _has_ended(holder: Worker, caller: Process) -> bool:
    """Whether nobody but the caller can mean the name: its holder's process is gone, or is the caller's."""
    return bool(holder.process.pid) and (holder.process == caller or is_gone(holder.process))


def membership(model: Model, worker: Worker) -> Membership:
    """The membership of a joined worker."""
    return Membership(
        identity=Identity(
            model_uid=model.uid,
            timeline=model.timeline,
            worker=worker.name,
            epoch=worker.epoch,
            sequence=worker.sequence,
        ),
        version=model.version,
        manifest_hash=model.layout.manifest_hash,
        manifest=model.layout.manifest,
        groups=model.group_values(),
        receipts=model.judge.receipts_of(worker),
        lease_s=model.sessions.lease_s,
        lead=model.sessions.leads(worker),
        worker_state=worker.worker_state,
        policy=model.judge.policy.settings.model_dump_json(),
        forgotten_epoch=worker.forgotten[0],
        forgotten_sequence=worker.forgotten[1],
    )


def _check_same(model: Model, manifest: Manifest) -> None:
    """ManifestMismatch, listing the differences, unless the worker's manifest is the model's."""
    theirs = Layout(manifest)
    if theirs.manifest_hash == model.layout.manifest_hash:
        return
    differences = []
    for index in range(max(len(theirs.slots), len(model.layout.slots))):
        here = model.layout.slots[index] if index < len(model.layout.slots) else None
        there = theirs.slots[index] if index < len(theirs.slots) else None
        if here is None or there is None:
            what = here or there
            where = "only the server has" if there is None else "only this worker has"
            differences.append(f"{where} {what.name if what else ''!r}")
        elif (here.name, here.shape, here.dtype, here.group) != (
            there.name,
            there.shape,
            there.dtype,
            there.group,
        ):
            differences.append(
                f"parameter {index}: the server has {here.name!r} {here.shape} {here.dtype} in group {here.group}, "
                f"this worker {there.name!r} {there.shape} {there.dtype} in group {there.group}"
            )
    rules = [[group.rule for group in side.manifest.groups] for side in (model.layout, theirs)]
    if rules[0] != rules[1]:
        differences.append(f"the server's groups are {rules[0]}, this worker's {rules[1]}")
    if not differences:
        differences.append("aliases or optimizers are not the same")
    more = len(differences) - DIFFERENCES_SHOWN
    shown = "; ".join(differences[:DIFFERENCES_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    raise ManifestMismatch(model=model.name, differences=shown)
