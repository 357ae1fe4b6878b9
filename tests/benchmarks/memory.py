"""What a server holds in memory: for each byte of parameters, for each connection and worker, and at most while it works.

The server's own memory is counted (VmRSS, and VmHWM for the most), as growth over a server that holds nothing. Beside each is
what the budgets say (docs/capacity.md, docs/limits.md).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import grpc
import httpx
import numpy as np

from pushstep.optim import RULES
from pushstep.proto import training_pb2 as pb
from pushstep.server.capacity.idle_memory import LOOK_S
from pushstep.server.staging.budget import charge
from tests.support.servers.harness import RunningServer, forget_peak, memory_bytes, running_server

from .machine import Others
from .table import table

# at rest, of parameters and state; of a connection that says nothing
MOST_AT_REST: Final = 1.1
MOST_OF_A_CONNECTION_BYTES: Final = 256 << 10
ELEMENTS, QUICK_ELEMENTS = 32_000_000, 1_000_000
CONNECTIONS, QUICK_CONNECTIONS = 400, 20
JOIN: Final = "/pushstep.v1.TrainingService/Join"


def main(*, quick: bool = False) -> None:
    """Print the tables."""
    print("\n## memory")
    others = Others()
    elements = QUICK_ELEMENTS if quick else ELEMENTS
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for rule in RULES:
            with running_server(Path(folder) / rule) as server:
                rows += _model(server, rule, elements)
    table(
        f"a model of {elements / 1e6:g} M float32",
        ("", "bytes for each of its parameters' bytes", "the budget's", "times it", "met"),
        rows,
        others.share(),
    )
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder) / "data") as server:
        rows = _callers(server, QUICK_CONNECTIONS if quick else CONNECTIONS)
    table("callers", ("each", "KiB", "at most", "met"), rows, others.share())


def _model(server: RunningServer, rule: str, elements: int) -> list[tuple[str, ...]]:
    """At rest, and the most while a push comes, a snapshot is written, an export is read."""
    values = {"p": np.zeros(elements, dtype=np.float32)}
    held = 4 * elements
    states = len(RULES[rule].state_names)
    empty_bytes = memory_bytes(server.process.pid)
    session = server.connect("m", "w0")
    session.create(values, [{"rule": rule, "params": ["p"]}])
    session.push(values)
    session.push(values)
    _rested()
    rest_bytes = memory_bytes(server.process.pid)

    def at_most(work: Callable[[], None]) -> float:
        _rested()
        before_bytes = memory_bytes(server.process.pid)
        forget_peak(server.process.pid)
        work()
        return (memory_bytes(server.process.pid, "VmHWM") - before_bytes) / held

    def snapshot() -> None:
        server.rest("POST", "/v1/models/m/snapshots", timeout=300).raise_for_status()

    def export() -> None:
        url = f"http://{server.http}/v1/models/m/export?state=true"
        with httpx.stream("GET", url, timeout=300, trust_env=False) as answer:
            for _ in answer.iter_raw(1 << 20):
                pass

    def pushed() -> None:
        session.push(values)

    found = [
        _row(f"{rule}, at rest", (rest_bytes - empty_bytes) / held, 1 + states, MOST_AT_REST),
        _row(f"{rule}, a push, more", at_most(pushed), charge(held) / held, 1.1),
        _row(f"{rule}, a snapshot, more", at_most(snapshot), 1.0 + states, 1.0),
        _row(f"{rule}, an export, more", at_most(export), 1.0 + states, 1.1),
    ]
    session.close()
    return found


def _rested() -> None:
    """Have the server give back what it keeps for the next push."""
    time.sleep(3 * LOOK_S)


def _row(name: str, got: float, budget: float, most: float) -> tuple[str, ...]:
    return (
        name,
        f"{got:.2f}",
        f"{budget:.2f}",
        f"{got / budget:.2f}",
        "yes" if got <= most * budget else "**no**",
    )


def _callers(server: RunningServer, count: int) -> list[tuple[str, ...]]:
    """What a connection takes that has made a call, and a worker that has pushed."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    gradient = {"p": np.ones(10_000, dtype=np.float32)}
    rows = []
    with ExitStack() as stack:

        def connection(number: int) -> None:
            channel = stack.enter_context(grpc.insecure_channel(server.grpc, options=options))
            channel.unary_unary("/pushstep.v1.TrainingService/Describe")(b"", timeout=60)

        def joined(number: int) -> None:
            request = pb.JoinRequest(model="m", worker=f"w{number + 1}")
            with grpc.insecure_channel(server.grpc, options=options) as channel:
                channel.unary_unary(JOIN)(request.SerializeToString(), timeout=60)

        def pushed(number: int) -> None:
            session = server.connect("m", f"p{number}")
            session.push(gradient)

        for number in range(8):
            connection(number)
        session = server.connect("m", "w0")
        session.create(gradient, [{"rule": "adagrad", "params": ["p"]}])
        session.push(gradient)
        for name, make, most in (
            ("idle connection", connection, MOST_OF_A_CONNECTION_BYTES),
            ("worker that has joined and hung up", joined, 0),
            ("worker that has pushed 10 K, and its connection", pushed, 0),
        ):
            before_bytes = memory_bytes(server.process.pid)
            for number in range(count):
                make(number)
            each = (memory_bytes(server.process.pid) - before_bytes) / count
            asked = (f"{most >> 10}", "yes" if each <= most else "**no**") if most else ("", "")
            rows.append((name, f"{each / 1024:.0f}", *asked))
    return rows
