"""Tickets to create models: they hold a name for a while, and nothing else."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import BeingCreated, NoCreationTicket
from pushstep.proto.training_pb2 import Process
from pushstep.proto.types_pb2 import DType, Manifest, Parameter, ParamGroup
from pushstep.proto.wire.layout import Layout
from pushstep.server.models.creations import (
    CREATION_S,
    TICKET_BYTES,
    TICKETS_BYTES,
    TICKETS_PER_CONNECTION,
    Creation,
    Creations,
)
from tests.support.servers.harness import running_server
from tests.support.workers.wire import Wire

MANIFEST = Manifest(
    parameters=[Parameter(name="w", shape=[4], dtype=DType.DTYPE_FLOAT32)],
    groups=[ParamGroup(rule="adagrad")],
).SerializeToString()
_attempts = itertools.count(1)


def begin(
    creations: Creations, name: str, now_s: float, worker: str = "w", attempt: int = 0, peer: str = "p"
) -> Creation:
    attempt = attempt or next(_attempts)
    return creations.begin(name, worker, MANIFEST, 16, now_s, attempt, peer, Process())


def test_a_ticket_holds_its_name_for_a_while_that_asking_again_does_not_extend() -> None:
    creations = Creations()
    first = begin(creations, "m", 0)
    with pytest.raises(BeingCreated):
        begin(creations, "m", 1, "other")
    assert begin(creations, "m", 1, attempt=first.attempt) is first
    for now_s in range(1, int(CREATION_S)):
        last = begin(creations, "m", now_s)
    assert last.ticket != first.ticket
    with pytest.raises(BeingCreated):
        begin(creations, "m", CREATION_S - 1, "other")
    with pytest.raises(NoCreationTicket):
        creations.begin_upload("m", last.ticket, CREATION_S + 1)
    assert begin(creations, "m", CREATION_S + 1, "other").worker == "other"


def test_an_upload_under_way_keeps_its_ticket_and_its_end_gives_it_back() -> None:
    creations = Creations()
    creation = begin(creations, "m", 0)
    assert creations.begin_upload("m", creation.ticket, 1) is creation
    with pytest.raises(BeingCreated):
        begin(creations, "m", 10 * CREATION_S, "other")
    creations.end_upload("m", creation, 10 * CREATION_S, had_place=False, comes_again=False)
    assert begin(creations, "m", 10 * CREATION_S, "other").worker == "other"


def test_an_upload_that_was_told_to_come_again_finds_its_ticket() -> None:
    creations = Creations()
    creation = begin(creations, "m", 0)
    now_s = 1.0
    for _ in range(3):
        assert creations.begin_upload("m", creation.ticket, now_s) is creation
        creations.end_upload("m", creation, now_s, had_place=False, comes_again=True)
        now_s += CREATION_S - 1
        with pytest.raises(BeingCreated):
            begin(creations, "m", now_s, "other")
    assert begin(creations, "m", now_s + CREATION_S, "other").worker == "other"


def test_what_is_about_to_be_a_model_is_not_given_up_for_another_upload() -> None:
    creations = Creations()
    creation = begin(creations, "m", 0)
    for _ in range(2):
        creations.begin_upload("m", creation.ticket, 1)
    creations.take_place("m", creation)
    assert list(creations.with_places()) == [creation]
    creations.end_upload("m", creation, 2, had_place=False, comes_again=False)
    with pytest.raises(BeingCreated):
        begin(creations, "m", 2)  # also to its own worker
    creations.end_upload("m", creation, 2, had_place=True, comes_again=False)
    assert list(creations.with_places()) == []
    assert begin(creations, "m", 2, "other")


def test_a_connection_has_so_many_tickets_and_keeps_those_of_others() -> None:
    creations = Creations()
    other = begin(creations, "other", 0, peer="q")
    used = begin(creations, "used", 0)
    creations.begin_upload("used", used.ticket, 0)
    for number in range(3 * TICKETS_PER_CONNECTION):
        begin(creations, f"m{number}", 1)
    kept = [number for number in range(3 * TICKETS_PER_CONNECTION) if creations.get(f"m{number}")]
    assert kept == list(range(2 * TICKETS_PER_CONNECTION, 3 * TICKETS_PER_CONNECTION))
    assert (creations.get("other"), creations.get("used")) == (other, used)


def test_all_tickets_together_have_a_bound_in_bytes() -> None:
    creations = Creations()
    large = Manifest(parameters=[Parameter(name="x" * 1000)] * 4000).SerializeToString()
    count = 2 * TICKETS_BYTES // len(large)
    for number in range(count):
        creations.begin(f"m{number}", "w", large, 16, 0, 0, f"p{number}", Process())
    kept = [found for number in range(count) if (found := creations.get(f"m{number}"))]
    assert TICKETS_BYTES // 2 < sum(len(creation.manifest) for creation in kept) <= TICKETS_BYTES
    assert creations.get(f"m{count - 1}")


def test_small_tickets_have_a_bound_too_and_the_last_costs_what_the_first_did() -> None:
    creations = Creations()
    most = TICKETS_BYTES // TICKET_BYTES
    for number in range(2 * most):  # of which each would look at all the others: for minutes
        begin(creations, f"m{number}", 0, peer=f"p{number // TICKETS_PER_CONNECTION}")
    assert 0 < sum(creations.get(f"m{number}") is not None for number in range(2 * most)) <= most


def test_tickets_keep_nobody_from_creating(data: Path) -> None:
    """As many as there may be models, of one that asks again and again, and of uploads that stop in their middle."""
    with running_server(data, "--max-models", "3", "--stall-s", "60") as server:
        wire = Wire(server.grpc)
        open_ended = []
        for number in range(6):
            request = pb.JoinRequest(model=f"x{number}", worker="w", manifest=Manifest.FromString(MANIFEST))
            (answer,) = wire.answers("Join", [request.SerializeToString()])
            ticket = pb.JoinResponse.FromString(answer).create
            segments = [segment for segment, _ in Layout(ticket.manifest).whole(None)]
            header = pb.UploadHeader(
                model=f"x{number}", kind=pb.UPLOAD_KIND_CREATE, ticket=ticket.ticket, segments=segments
            )
            if number % 2:
                open_ended.append(wire.hold("Upload", pb.UploadRequest(header=header).SerializeToString()))
        session = server.connect("honest")
        session.create({"w": np.zeros(4, np.float32)})
        assert session.push({"w": np.ones(4, np.float32)}).version == 1
        for end in open_ended:
            end()
        wire.close()
