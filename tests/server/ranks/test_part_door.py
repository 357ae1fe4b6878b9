"""What the doors of ranks are sent that does not fit: each is refused by name, and nothing is applied in any rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from pushstep.client import Session
from pushstep.proto import training_pb2 as pb
from pushstep.proto.types_pb2 import Identity
from pushstep.proto.wire.frames import BodyDigest, Piece, pack
from pushstep.proto.wire.shards import Part, cut
from tests.support.ranks.group import RankGroup, running_ranks
from tests.support.servers.harness import wait_until
from tests.support.workers.wire import RawWorker, Wire, named

RANKS = 3
START = {"flat": np.ones(50_000, np.float32), "table": np.ones((3000, 8), np.float32)}


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankGroup]:
    with running_ranks(tmp_path_factory.mktemp("ranks"), RANKS) as started:
        yield started


@dataclass
class Raw:
    """A worker that makes the messages to each rank by hand."""

    worker: RawWorker
    wires: list[Wire]
    parts: list[Part]

    def header(self, rank: int, **changes: Any) -> pb.PushHeader:
        """Of a rank's part: the gradient of all that it has."""
        layout = self.parts[rank].layout
        segments = [segment for segment, _ in layout.dense_segments(list(layout.slots))]
        own = {"manifest_hash": layout.manifest_hash, "map_version": self.map_version, "segments": segments}
        return self.worker.header(**{**own, "hold_s": 1.0, **changes})

    @property
    def map_version(self) -> int:
        return int(self.worker.member.shards.version)

    def push(self, header: pb.PushHeader, layout_of: int, **commit: Any) -> list[bytes]:
        """The messages of a whole part. `layout_of`: by whose layout its segments are read."""
        layout = self.parts[layout_of].layout
        values = [
            [torch.ones(slot.shape) for slot in slots]
            for _, slots in layout.dense_segments(list(layout.slots))
        ]
        taken = BodyDigest(header.segments)
        frames = list(pack([[Piece(v, v.dtype) for v in pieces] for pieces in values], taken))
        return [
            pb.PushRequest(header=header).SerializeToString(),
            *frames,
            pb.PushRequest(commit=pb.PushCommit(digest=taken.value, **commit)).SerializeToString(),
        ]


@pytest.fixture(scope="module")
def owner(group: RankGroup) -> Session:
    session = group.leader.connect("m", "owner")
    session.create(START)
    other = group.leader.connect("other", "owner")
    other.create({"flat": np.ones(60_000, np.float32)})
    return session


@pytest.fixture
def raw(group: RankGroup, owner: Session) -> Iterator[Raw]:
    wires = [Wire(rank.grpc) for rank in group.ranks]
    worker = RawWorker(wires[0], "m", takeover=True)
    parts = [part for part in cut(worker.layout, RANKS) if part is not None]
    yield Raw(worker, wires, parts)
    for wire in wires:
        wire.close()


@pytest.fixture(autouse=True)
def _nothing_is_applied(group: RankGroup, owner: Session) -> Iterator[None]:
    """Every byte of values and state stays, and no rank keeps a part; the ranks go on together."""

    def bits() -> list[bytes]:
        state = owner.pull_state()
        return [bytes(str(state.header.version), "ascii"), *(v.numpy().tobytes() for *_, v in state.dense())]

    before = bits()
    yield
    assert bits() == before
    assert owner.push({"flat": np.ones(50_000, np.float32)}).outcome == "applied"


def of_another_rank(raw: Raw) -> pb.PushHeader:
    """As if rank 1 answered at the address of rank 2."""
    return raw.header(2)


def beyond(raw: Raw) -> pb.PushHeader:
    """A range that ends where this rank's ends in the whole model."""
    header = raw.header(1)
    header.segments[0].stop += 4096
    return header


def of_the_whole(raw: Raw) -> pb.PushHeader:
    """The whole gradient, with the part's hash."""
    whole = raw.worker.layout
    segments = [segment for segment, _ in whole.dense_segments(list(whole.slots))]
    return raw.header(1, segments=segments)


def of_another_model(raw: Raw) -> pb.PushHeader:
    """The part of this model, as one of another model of the same job."""
    return raw.header(1, model="other")


def of_another_map(raw: Raw) -> pb.PushHeader:
    """Cut for two ranks."""
    found = [part for part in cut(raw.worker.layout, 2) if part is not None]
    layout = found[1].layout
    segments = [segment for segment, _ in layout.dense_segments(list(layout.slots))]
    return raw.header(1, manifest_hash=layout.manifest_hash, segments=segments)


# what rank 1 is sent, and the name of the refusal
PARTS: dict[str, tuple[Callable[[Raw], pb.PushHeader], str]] = {
    "another rank's": (of_another_rank, "ranks_differ"),
    "of another number of ranks": (of_another_map, "manifest_changed"),
    "the whole": (
        lambda raw: raw.header(1, manifest_hash=raw.worker.layout.manifest_hash),
        "manifest_changed",
    ),
    "a range too long": (beyond, "malformed_frame"),
    "the range of the whole": (of_the_whole, "malformed_frame"),
    "of another model": (of_another_model, "model_lost"),
    "of no model": (lambda raw: raw.header(1, model="nobody"), "model_lost"),
    "of another timeline": (
        lambda raw: raw.header(1, identity=raw.worker.identity(timeline=9)),
        "superseded",
    ),
    "without a body that is held": (lambda raw: raw.header(1, held_digest=5, segments=[]), "not_held"),
}


@pytest.mark.parametrize("case", PARTS)
@pytest.mark.parametrize("method", ["Push", "Exchange", "TakeSteps"])
def test_a_part_that_does_not_fit(raw: Raw, case: str, method: str) -> None:
    make, code = PARTS[case]
    header = make(raw)
    if method == "Exchange":
        header.pull.SetInParent()
    messages = raw.push(header, 2 if case == "another rank's" else 1)
    assert raw.wires[1].refused(method, messages[: None if code == "ranks_differ" else 1]).code == code


def calls_of(raw: Raw) -> dict[str, tuple[str, Any, str]]:
    """Calls to rank 1, and what each is refused with."""
    model, identity, part = "m", raw.worker.identity(0), raw.parts[1].layout.manifest_hash
    upload = pb.UploadHeader(
        model="m",
        kind=pb.UPLOAD_KIND_PARAMETERS,
        identity=identity,
        manifest_hash=part,
        map_version=raw.map_version,
    )
    version = pb.PullOptions(version=raw.worker.member.version)
    about = {"model": model, "identity": identity}
    return {
        "join": ("Join", pb.JoinRequest(model=model, worker="w"), "not_the_coordinator"),
        "heartbeat": ("Heartbeat", pb.HeartbeatRequest(**about), "not_the_coordinator"),
        "leave": ("Leave", pb.LeaveRequest(**about), "not_the_coordinator"),
        "extras": ("PullExtras", pb.PullExtrasRequest(model=model), "not_the_coordinator"),
        "values": ("Upload", pb.UploadRequest(header=upload), "not_the_coordinator"),
        "the newest version": (
            "Pull",
            pb.PullRequest(model=model, manifest_hash=part),
            "not_the_coordinator",
        ),
        "the newest state": ("PullState", pb.PullStateRequest(model=model), "not_the_coordinator"),
        "another rank's version": (
            "Pull",
            pb.PullRequest(
                model=model, manifest_hash=raw.parts[2].layout.manifest_hash, timeline=1, options=version
            ),
            "ranks_differ",
        ),
        "another rank's state": (
            "PullState",
            pb.PullStateRequest(
                model=model,
                manifest_hash=raw.parts[2].layout.manifest_hash,
                version=raw.worker.member.version,
            ),
            "ranks_differ",
        ),
        "a version of another uid": (
            "Pull",
            pb.PullRequest(
                model=model, identity=Identity(model_uid=b"x" * 16), manifest_hash=part, options=version
            ),
            "model_lost",
        ),
        "a version that is gone": (
            "Pull",
            pb.PullRequest(model=model, manifest_hash=part, timeline=7, options=pb.PullOptions(version=0)),
            "version_gone",
        ),
    }


CALLS = (
    "join", "heartbeat", "leave", "extras", "values", "the newest version", "the newest state",
    "another rank's version", "another rank's state", "a version of another uid", "a version that is gone",
)  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_a_rank_does_not_answer(raw: Raw, case: str) -> None:
    method, request, code = calls_of(raw)[case]
    assert raw.wires[1].refused(method, [request.SerializeToString()]).code == code


def rows(raw: Raw, rank: int, **changes: Any) -> pb.PullRowsRequest:
    """A good call for rows of a rank's part, without the others' calls."""
    ids = np.array([0, 1]).tobytes()
    name = raw.parts[rank].layout.slots[0].name
    own = {
        "model": "m",
        "manifest_hash": raw.parts[rank].layout.manifest_hash,
        "map_version": raw.map_version,
        "read": 5,
        "selections": [pb.RowSelection(parameter=name, ids=ids)],
    }
    return pb.PullRowsRequest(**{**own, **changes})


def behind(raw: Raw, rank: int) -> list[pb.RowSelection]:
    """The row behind the last of a rank's part, which another rank has."""
    slot = raw.parts[rank].layout.slots[0]
    return [pb.RowSelection(parameter=slot.name, ids=np.array([slot.rows]).tobytes())]


# the rank that is called, with what, and the name of the refusal
ROWS: dict[str, tuple[int, Callable[[Raw], pb.PullRowsRequest], str]] = {
    "the newest": (1, lambda raw: rows(raw, 1, read=0), "not_the_coordinator"),
    "another rank's": (1, lambda raw: rows(raw, 2), "ranks_differ"),
    "by the whole manifest": (
        1,
        lambda raw: rows(raw, 1, manifest_hash=raw.worker.layout.manifest_hash),
        "manifest_changed",
    ),
    "of no model": (1, lambda raw: rows(raw, 1, model="nobody"), "unknown_model"),
    "behind a part": (1, lambda raw: rows(raw, 1, selections=behind(raw, 1)), "row_out_of_range"),
    "behind rank 0's part": (0, lambda raw: rows(raw, 0, selections=behind(raw, 0)), "row_out_of_range"),
    "of no parameter": (1, lambda raw: rows(raw, 1, selections=(), ids=[0]), "unknown_parameter"),
    "by no map": (0, lambda raw: rows(raw, 0, map_version=0), "map_changed"),
    "by another map": (0, lambda raw: rows(raw, 0, map_version=5), "map_changed"),
    "nothing by another map": (0, lambda raw: rows(raw, 0, map_version=5, selections=()), "map_changed"),
    "with a rank that there is not": (0, lambda raw: rows(raw, 0, ranks=[1, 3]), "malformed_frame"),
    "with rank 0 itself": (0, lambda raw: rows(raw, 0, ranks=[0]), "malformed_frame"),
    "with a rank twice": (0, lambda raw: rows(raw, 0, ranks=[1, 1]), "malformed_frame"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_do_not_fit(raw: Raw, case: str) -> None:
    rank, make, code = ROWS[case]
    assert raw.wires[rank].refused("PullRows", [make(raw).SerializeToString()]).code == code


def test_calls_of_one_read_wait_for_each_other(raw: Raw) -> None:
    """Whichever comes first; of two under the same number one is refused."""
    for first in (0, 1, 2):
        order = [first, *(rank for rank in range(RANKS) if rank != first)]
        calls = {}
        for rank in order:
            others = [1, 2] if rank == 0 else ()
            message = [rows(raw, rank, ranks=others).SerializeToString()]
            calls[rank] = raw.wires[rank].start("PullRows", message)
            if rank == first:
                both = [calls[rank], raw.wires[rank].start("PullRows", message)]
                wait_until(lambda both=both: any(call.done() for call in both))
                again, calls[rank] = sorted(both, key=lambda call: not call.done())
                with pytest.raises(grpc.RpcError) as raised:
                    next(again)
                assert named(raised.value).code == "malformed_frame"
        found = [pb.PullResponse.FromString(next(iter(calls[rank]))).header for rank in range(RANKS)]
        assert {header.version for header in found} == {found[0].version}
        for call in calls.values():
            list(call)


def test_a_call_for_nothing_brings_the_manifest_and_the_map(raw: Raw) -> None:
    (answer,) = raw.wires[0].answers("PullRows", [pb.PullRowsRequest(model="m").SerializeToString()])
    header = pb.PullResponse.FromString(answer).header
    assert header.manifest == raw.worker.layout.manifest
    assert header.shards.version == raw.map_version
    known = rows(raw, 0, selections=()).SerializeToString()
    (answer,) = raw.wires[0].answers("PullRows", [known])
    assert not pb.PullResponse.FromString(answer).header.HasField("manifest")


@pytest.mark.parametrize("map_version", [0, 5], ids=["none", "another"])
def test_an_old_map_is_refused_by_rank_0(raw: Raw, map_version: int) -> None:
    whole = raw.worker.layout
    header = raw.header(0, map_version=map_version)
    assert raw.wires[0].refused("Push", raw.push(header, 0)).code == "map_changed"
    upload = pb.UploadHeader(
        model="new", kind=pb.UPLOAD_KIND_CREATE, manifest=whole.manifest, map_version=map_version
    )
    ticket = pb.JoinRequest(model="new", worker="w", manifest=whole.manifest)
    (answer,) = raw.wires[0].answers("Join", [ticket.SerializeToString()])
    upload.ticket = pb.JoinResponse.FromString(answer).create.ticket
    assert (
        raw.wires[0].refused("Upload", [pb.UploadRequest(header=upload).SerializeToString()]).code
        == "map_changed"
    )
    if map_version:
        pull = pb.PullRequest(model="m", map_version=map_version, options=pb.PullOptions())
        assert raw.wires[0].refused("Pull", [pull.SerializeToString()]).code == "map_changed"


COMMITS: dict[str, tuple[list[tuple[int, int]], str]] = {
    "a rank that does not exist": ([(1, 5), (2, 5), (3, 5)], "malformed_frame"),
    "rank 0 itself": ([(0, 5), (1, 5), (2, 5)], "malformed_frame"),
    "a rank twice": ([(1, 5), (1, 5)], "malformed_frame"),
    "a part without a digest": ([(1, 0), (2, 5)], "malformed_frame"),
    "parts of other digests": ([(1, 5), (2, 5)], "digest_mismatch"),
}


@pytest.mark.parametrize("case", COMMITS)
def test_a_commit_that_names_other_parts(raw: Raw, case: str) -> None:
    digests, code = COMMITS[case]
    others = [raw.wires[rank].start("Push", raw.push(raw.header(rank), rank)) for rank in (1, 2)]
    parts = [pb.PartDigest(rank=rank, digest=digest) for rank, digest in digests]
    assert raw.wires[0].refused("Push", raw.push(raw.header(0), 0, parts=parts)).code == code
    for call in others:
        call.cancel()
