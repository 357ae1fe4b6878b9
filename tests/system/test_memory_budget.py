"""What a server takes of the machine's memory is what docs/capacity.md says: at rest, at most while it works, per caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest

from pushstep.proto import training_pb2 as pb
from pushstep.server.staging.budget import READING_BYTES
from tests.support.servers.harness import (
    RunningServer,
    forget_peak,
    memory_bytes,
    running_server,
    wait_until,
)

ELEMENTS = 12_000_000
PARAMETERS_BYTES = 4 * ELEMENTS
GRADIENT = {"p": np.full(ELEMENTS, 0.5, np.float32)}
# by rule: parameters and states
BUFFERS = {"adagrad": 2, "adadelta": 3}
# Code and tables that a server needs once, whatever it holds: of the 1 GiB that the page leaves to the process.
PROCESS_BYTES = 64 << 20
MOST_AT_REST = 1.1
MOST_OF_A_CONNECTION_BYTES = 256 << 10
CONNECTIONS = 100
DESCRIBE = "/pushstep.v1.TrainingService/Describe"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("memory") / "data") as running:
        yield running


def most_bytes(server: RunningServer, work: Callable[[], object]) -> int:
    """The most that the server takes meanwhile, beside what it takes now."""
    before = memory_bytes(server.process.pid)
    forget_peak(server.process.pid)
    work()
    return memory_bytes(server.process.pid, "VmHWM") - before


@pytest.mark.timeout(300)
@pytest.mark.parametrize("rule", BUFFERS)
def test_a_model(rule: str, server: RunningServer, tmp_path: Path) -> None:
    """At rest, what is kept for the next push and answer is given back. A copy is the most that saving it takes."""
    pid, root = server.process.pid, f"/v1/models/{rule}"
    empty = memory_bytes(pid)
    held = BUFFERS[rule] * PARAMETERS_BYTES
    session = server.connect(rule)
    session.create(GRADIENT, [{"rule": rule, "params": ["p"]}])
    session.exchange(GRADIENT)
    wait_until(lambda: memory_bytes(pid) - empty < MOST_AT_REST * held + PROCESS_BYTES, timeout_s=120)

    def snapshot() -> None:
        assert server.rest("POST", f"{root}/snapshots", timeout=120).status_code < 300

    def export() -> None:
        url = f"http://{server.http}{root}/export?state=true"
        with httpx.stream("GET", url, timeout=120, trust_env=False) as answer:
            assert sum(map(len, answer.iter_raw(1 << 20))) > held

    for work, most in (
        (lambda: session.push(GRADIENT), PARAMETERS_BYTES + READING_BYTES),
        (snapshot, held),
        (export, held),
    ):
        assert most_bytes(server, work) < most + PROCESS_BYTES


def test_connections(server: RunningServer) -> None:
    """Some that say nothing, behind one call each."""
    with ExitStack() as stack:

        def connect() -> None:
            own = [("grpc.use_local_subchannel_pool", 1)]
            channel = stack.enter_context(grpc.insecure_channel(server.grpc, options=own))
            channel.unary_unary(DESCRIBE)(pb.DescribeRequest().SerializeToString(), timeout=60)

        for _ in range(4):
            connect()
        before = memory_bytes(server.process.pid)
        for _ in range(CONNECTIONS):
            connect()
        each = (memory_bytes(server.process.pid) - before) / CONNECTIONS
        assert each < MOST_OF_A_CONNECTION_BYTES
