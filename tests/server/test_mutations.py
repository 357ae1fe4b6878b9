"""Requests with their bytes changed at random: each is answered, or refused by name, and an honest model never notices."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from pushstep.proto.errors import Broken
from pushstep.proto.errors.status import from_status
from pushstep.proto.shared_memory.local_socket import Method, Status
from tests.support.servers.harness import WATCHED, RunningServer, running_server
from tests.support.servers.watched_server import TOLD
from tests.support.workers.good_requests import requests
from tests.support.workers.wire import RawLocalSocket, RawWorker, Wire, created, named, state_of

SEED = 20_240
IN_A_TEST, IN_A_SOAK = 2_500, 100_000
# After so many the worker joins anew, under the next name: what was changed may have ended it.
ROUND = 250


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    options = ("--max-models", "1000")
    with running_server(tmp_path_factory.mktemp("mutations") / "data", *options, command=WATCHED) as running:
        yield running


def mutated(draw: random.Random, message: bytes, others: list[bytes]) -> bytes:
    """The message with a few of its bytes changed, cut, doubled, or taken from another's."""
    changed = bytearray(message)
    for _ in range(draw.choice([1, 1, 2, 4, 8])):
        at = draw.randrange(len(changed) + 1)
        match draw.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << draw.randrange(8)
            case 1 if at < len(changed):
                changed[at] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])
            case 2:
                changed[at:at] = draw.randbytes(draw.choice([1, 1, 2, 8, 40]))
            case 3:
                del changed[at : at + draw.choice([1, 1, 2, 8])]
            case 4:
                other = draw.choice(others)
                begin = draw.randrange(len(other) + 1)
                changed[at:at] = other[begin : begin + draw.choice([4, 16, 64])]
            case _:
                changed[at:at] = changed[at : at + draw.choice([4, 16, 64])]
    return bytes(changed)


def mutate(server: RunningServer, count: int) -> None:
    draw = random.Random(SEED)
    honest = created(server, "honest")
    reference = state_of(server, "honest")
    with contextlib.closing(Wire(server.grpc)) as wire:
        for first in range(0, count, ROUND):
            # names far apart: a mutated join must not ask for the next one
            model = f"target-{random.Random(first // (10 * ROUND)).getrandbits(64):016x}"
            if first % (10 * ROUND) == 0:
                created(server, model).close()
            raw = RawWorker(wire, model, f"raw-{first}")
            whole = [(method, base.SerializeToString()) for method, base in requests(raw).values()]
            others = [message for _, message in whole]
            with contextlib.closing(RawLocalSocket(raw)) as line:
                for number in range(first, min(first + ROUND, count)):
                    method, base = draw.choice(whole)
                    message = mutated(draw, base, others)
                    where = f"message {number} of seed {SEED}, to {method}: {message.hex()}"
                    try:
                        wire.answers(method, [message])
                    except grpc.RpcError as error:
                        assert not isinstance(named(error), Broken), where
                    if number % 10 == 0:
                        with contextlib.suppress(ConnectionError):  # its session may have ended
                            status, answer = line.call(draw.choice(list(Method)), message)
                            refused = status is Status.REFUSED
                            assert not (refused and isinstance(from_status(answer), Broken)), where
            assert server.rest("GET", f"/v1/models/{model}").json()["failed"] is None
            assert server.rest("GET", f"/v1/models/{model}/param-groups").status_code == 200
    assert state_of(server, "honest") == reference
    assert honest.push({"bias": np.zeros(4, np.float32)}).version == reference["version"] + 1
    log = server.log.read_text()
    assert "internal error" not in log
    assert "Traceback" not in log
    assert TOLD not in log


def test_mutated_messages(watched: RunningServer) -> None:
    mutate(watched, IN_A_TEST)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_mutated_messages(watched: RunningServer) -> None:
    """Takes about 4 minutes."""
    mutate(watched, IN_A_SOAK)
