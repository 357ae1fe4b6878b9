"""One good request of every kind, of a raw worker's: what tests of bad ones begin with."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message

from pushstep.proto import training_pb2 as pb
from pushstep.proto.types_pb2 import GroupValues, Manifest, Parameter, ParamGroup, Segment
from tests.support.workers.wire import RawWorker


def push(raw: RawWorker) -> pb.PushRequest:
    """A whole push in one message."""
    commit = pb.PushCommit(samples=2.0, metrics={"loss": 1.0})
    header = raw.header([raw.dense("bias")], samples=2.0, pull=pb.PullOptions())
    return pb.PushRequest(header=header, payload=bytes(16), commit=commit)


def upload(raw: RawWorker, kind: pb.UploadKind, **fields: Any) -> pb.UploadRequest:
    whole = {"model": raw.model, "kind": kind, "identity": raw.identity()}
    return pb.UploadRequest(
        header=pb.UploadHeader(**{**whole, "manifest_hash": raw.member.manifest_hash, **fields})
    )


def added() -> Manifest:
    return Manifest(
        parameters=[Parameter(name="added", shape=[2], dtype=1)],  # type: ignore[arg-type]
        groups=[ParamGroup(rule="adagrad")],
    )


def requests(raw: RawWorker) -> dict[str, tuple[str, Message]]:
    """A good request of each kind, by the method that takes it."""
    model, identity = raw.model, raw.member.identity
    of_model = {"model": model, "identity": identity}
    hashed = {**of_model, "manifest_hash": raw.member.manifest_hash}
    new = upload(raw, pb.UPLOAD_KIND_GROUP, manifest=added(), segments=[Segment(arena=2, stop=2, dtype=1)])  # type: ignore[arg-type]
    fresh = upload(raw, pb.UPLOAD_KIND_PARAMETERS, fresh=[0])
    state = upload(raw, pb.UPLOAD_KIND_STATE, groups=[GroupValues()], force=True)
    join = pb.JoinRequest(model=model, worker="joined", manifest=raw.member.manifest)
    return {
        "Describe": ("Describe", pb.DescribeRequest()),
        "Join": ("Join", join),
        "Join in parts": ("JoinInParts", pb.JoinPart(part=join.SerializeToString())),
        "Join of a new one": ("Join", pb.JoinRequest(model="new", worker="joined", manifest=added())),
        "Heartbeat": ("Heartbeat", pb.HeartbeatRequest(**of_model)),
        "Leave": (
            "Leave",
            pb.LeaveRequest(**of_model, edits=[pb.GroupEdit()], worker_state=b"1", attempt=1),
        ),
        "OpenRegion": ("OpenRegion", pb.OpenRegionRequest(**hashed)),
        "Pull": ("Pull", pb.PullRequest(**hashed, options=pb.PullOptions())),
        "PullRows": ("PullRows", pb.PullRowsRequest(model=model, parameter="table", ids=[1])),
        "PullState": ("PullState", pb.PullStateRequest(model=model)),
        "PullExtras": ("PullExtras", pb.PullExtrasRequest(model=model)),
        "Push": ("Push", push(raw)),
        "Exchange": ("Exchange", push(raw)),
        "TakeSteps": ("TakeSteps", push(raw)),
        "Upload of a group": ("Upload", new),
        "Upload of fresh states": ("Upload", fresh),
        "Upload of a state": ("Upload", state),
        "Upload of extras": ("Upload", upload(raw, pb.UPLOAD_KIND_EXTRAS, extras_bytes=16)),
    }
