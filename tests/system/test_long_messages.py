"""Models whose manifest fits no message, and headers that come in parts: the same as the short ones, and bounded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import grpc
import numpy as np
import pytest
import torch

from pushstep.client import Outcome
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import MalformedFrame, MessageTooLarge, OverBudget, StreamStalled, TooLong
from pushstep.proto.wire import parts
from pushstep.proto.wire.frames import MAX_MESSAGE_BYTES
from pushstep.server.staging.budget import Budget
from pushstep.server.streams import counted_parts
from pushstep.server.streams.counted_parts import PARSED_BYTES_PER_BYTE, CountedParts
from tests.support.servers.harness import RunningServer
from tests.support.workers.wire import PARAMETERS, RawWorker, Wire, created, named, state_of

# 5.5 MB of names.
COUNT, NAME_BYTES = 6_000, 900
LONG = {f"{index:x}".rjust(NAME_BYTES, "n"): np.full(2, index, np.float32) for index in range(COUNT)}


@pytest.fixture
def wire(server: RunningServer) -> Iterator[Wire]:
    with contextlib.closing(Wire(server.grpc)) as made:
        yield made


@pytest.mark.parametrize("shared_memory", [False, True])
def test_a_model_whose_manifest_fits_no_message(
    server: RunningServer, model_name: str, shared_memory: bool
) -> None:
    """Made, joined with the manifest and without, stepped, given a group, given its state, and read."""
    first = server.connect(model_name, "a", shared_memory=shared_memory)
    first.create(LONG, [{"rule": "adagrad", "params": list(LONG), "lr": 0.5}])
    gradients = {name: np.ones(2, np.float32) for name in list(LONG)[::2]}
    assert first.push(gradients).outcome is Outcome.APPLIED
    second = server.connect(model_name, "b", shared_memory=shared_memory)
    second.create(LONG, [{"rule": "adagrad", "params": list(LONG), "lr": 0.5}])
    third = server.connect(model_name, "c", shared_memory=shared_memory)
    assert third.push(gradients).version == 2  # joined by name only
    for session in (first, second, third):
        pulled = session.pull()
        assert pulled.keys() == LONG.keys()
    names = list(LONG)
    stepped, kept = pulled[names[2]], pulled[names[3]]
    alone = torch.nn.Parameter(torch.full((2,), 2.0))
    local = torch.optim.Adagrad([alone], lr=0.5)
    for _ in range(2):
        alone.grad = torch.ones(2)
        local.step()
    assert np.array_equal(stepped, alone.detach().numpy())
    assert np.array_equal(kept, LONG[names[3]])


def test_a_long_manifest_goes_through_an_attached_optimizer(server: RunningServer, model_name: str) -> None:
    """Attach, step, state_dict, load_state_dict, another group, and a second attach."""
    parameters = {name: torch.nn.Parameter(torch.from_numpy(value).clone()) for name, value in LONG.items()}
    local = torch.optim.Adagrad([{"params": list(parameters.items())}], lr=0.5)
    session = server.connect(model_name)
    optimizer = session.attach(local)
    for parameter in parameters.values():
        parameter.grad = torch.ones(2)
    optimizer.step()
    state = optimizer.state_dict()
    assert all(entry["step"] == 1 for entry in state["state"].values())
    optimizer.load_state_dict(state)
    added = torch.nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [("added", added)]})
    added.grad = torch.ones(3)
    optimizer.step()
    assert added.detach().ne(0).all()
    assert session.pull().keys() == {*LONG, "added"}


def test_join_itself_says_that_it_does_not_fit(server: RunningServer, wire: Wire, model_name: str) -> None:
    server.connect(model_name).create(LONG, [{"rule": "adagrad", "params": list(LONG)}])
    request = pb.JoinRequest(model=model_name, worker="stock", attempt=7).SerializeToString()
    assert isinstance(wire.refused("Join", [request]), MessageTooLarge)
    answers = wire.answers(
        "JoinInParts", [pb.JoinPart(part=part).SerializeToString() for part in (request[:3], request[3:])]
    )
    assert max(map(len, answers)) <= MAX_MESSAGE_BYTES
    whole = b"".join(pb.JoinPart.FromString(answer).part for answer in answers)
    member = pb.JoinResponse.FromString(whole).member
    assert len(member.manifest.parameters) == COUNT
    assert member.identity.epoch == 1  # the join that did not fit and this one are the same


def cut(header: pb.PushHeader, size: int) -> list[bytes]:
    whole = header.SerializeToString()
    return [
        pb.PushRequest(header_part=whole[start : start + size]).SerializeToString()
        for start in range(0, len(whole), size)
    ]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_header_in_parts_is_the_header(
    server: RunningServer, wire: Wire, model_name: str, size: int
) -> None:
    created(server, model_name)
    raw = RawWorker(wire, model_name)
    slot = raw.slot("bias")
    whole = raw.good()
    header = pb.PushRequest.FromString(whole[0]).header
    rest = pb.PushRequest()
    rest.header.metrics["loss"] = 2.0  # what the message with the header holds is read behind the parts
    answer = raw.push([*cut(header, size), rest.SerializeToString(), *whole[1:]])
    assert answer.receipt.version == raw.member.version + 1
    assert slot.stop - slot.start == 4


def empty() -> bytes:
    message = pb.PushRequest()
    message.header.SetInParent()
    return message.SerializeToString()


def bad_streams(raw: RawWorker) -> list[tuple[type[Exception], Sequence[bytes]]]:
    header = pb.PushRequest.FromString(raw.good()[0]).header
    part = pb.PushRequest(header_part=b"\xff" * 10).SerializeToString()
    body = raw.good()[1:]
    return [
        (MalformedFrame, [part, empty(), *body]),
        (MalformedFrame, [part]),
        (MalformedFrame, cut(header, 10)),
        (MalformedFrame, [*cut(header, 10), *body]),
        (MalformedFrame, [raw.good()[0], *cut(header, 1000), *body]),
        (TooLong, [pb.PushRequest(header_part=b"\x0a" * ((4 << 20) + 1)).SerializeToString()]),
        # a text over its limit, which only the whole shows
        (TooLong, [*cut(raw.header([], model="m" * 101), 50), empty()]),
    ]


def test_bad_parts_are_refused_and_nothing_is_kept(
    server: RunningServer, wire: Wire, model_name: str
) -> None:
    created(server, model_name)
    raw = RawWorker(wire, model_name)
    before = state_of(server, model_name)
    for kind, messages in bad_streams(raw):
        assert isinstance(wire.refused("Push", messages), kind)
    assert state_of(server, model_name) == before
    assert raw.push(raw.good()).receipt.version == before["version"] + 1
    assert PARAMETERS.keys() == before["export"].keys()


@pytest.mark.parametrize("method", ["Push", "Exchange", "TakeSteps", "Upload", "JoinInParts"])
def test_parts_without_end_are_counted_before_they_are_kept(
    server: RunningServer, wire: Wire, method: str
) -> None:
    """A caller who sends parts for ever gets no more than the budget, and gives it back."""
    kind = {"Upload": pb.UploadRequest, "JoinInParts": pb.JoinPart}.get(method, pb.PushRequest)
    field = "part" if method == "JoinInParts" else "header_part"
    message = kind(**{field: bytes(1 << 20)}).SerializeToString()
    for _ in range(3):
        with pytest.raises(grpc.RpcError) as refused:
            wire.answers(method, (message for _ in range(400)))
        assert isinstance(named(refused.value), (OverBudget, TooLong))


def test_counted_parts_give_their_room_back(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(400 * PARSED_BYTES_PER_BYTE)
    counted = CountedParts("a header", budget)
    counted.add(bytes(60))
    with pytest.raises(OverBudget):
        counted.add(bytes(60))
    assert budget.used_bytes == 60 * PARSED_BYTES_PER_BYTE
    counted.release()
    counted.release()
    assert budget.used_bytes == 0
    with pytest.raises(TooLong):
        parts.Parts("a header", 50).add(bytes(60))
    monkeypatch.setattr(counted_parts, "PARTS_S", -1.0)  # one that crawls has had its time
    with pytest.raises(StreamStalled):
        counted.add(bytes(1))


def test_parts_leave_pushes_their_room() -> None:
    """However many send them: three quarters of the budget are never theirs."""
    budget = Budget(1000 * PARSED_BYTES_PER_BYTE)
    held = [CountedParts("a join", budget) for _ in range(30)]
    refused = 0
    for each in held:
        try:
            each.add(bytes(10))
        except OverBudget:
            refused += 1
    assert refused == 5
    budget.reserve(750 * PARSED_BYTES_PER_BYTE)
    for each in held:
        each.release()
    assert budget.used_bytes == 750 * PARSED_BYTES_PER_BYTE
