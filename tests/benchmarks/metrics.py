"""What counting costs a small push, and what a scrape of /metrics costs.

Each part of counting is timed by itself: the parts are some microseconds, less than two runs of a push differ by. Then pushes of 10,000
parameters are timed at two servers in turns, one of which counts nothing. A scrape is timed over models without a
server; and the pushes of one worker while Prometheus would scrape ten times a second, beside those without.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
import timeit
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import prometheus_client

from pushstep.client import Session
from pushstep.client.transport.spans import Spans
from pushstep.proto.types_pb2 import Receipt, ServerTimes
from pushstep.server.config import Config
from pushstep.server.coordinator.worker import Worker, WorkerState
from pushstep.server.counters.model_counts import ModelCounts
from pushstep.server.counters.server_counts import ServerCounts
from pushstep.server.metrics.exposition import Collector
from pushstep.server.models.catalog import Catalog
from pushstep.server.process.request_log import about
from tests.support.servers.driven import made
from tests.support.servers.harness import RunningServer, running_server

from .machine import Others
from .table import table

UNCOUNTED = (sys.executable, str(Path(__file__).with_name("uncounted_server.py")))
PARAMETERS = 10_000
CALLS = 200_000
AT_ONCE = 500


def main(*, quick: bool = False) -> None:
    """Print the tables."""
    others = Others()
    print("\n## metrics")
    parts = _parts(CALLS // 100 if quick else CALLS)
    table("the parts of counting a push", ["part", "us"], parts, others.share())
    few = 100 if quick else 10_000
    scrapes = [_scrape(1, 2), _scrape(10, 10), _scrape(100, few)]
    table("a scrape", ["models", "workers of each", "lines", "ms"], scrapes, others.share())
    with tempfile.TemporaryDirectory() as folder:
        ways = [("shared memory", True), ("TCP", False)]
        rounds = 2 if quick else 40
        rows = [_pushes(name, Path(folder) / str(shares), shares, rounds) for name, shares in ways]
    columns = [
        "exchange of 10 K",
        "counted, ms",
        "not counted, ms",
        "ratio",
        "scraped ten times a second, ratio",
    ]
    table("pushes", columns, rows, others.share())


def _parts(calls: int) -> list[list[str]]:
    times = ServerTimes(receive_s=1e-5, wait_s=1e-6, queue_s=1e-4, step_s=2e-4)
    receipt = Receipt(outcome=1, staleness=2, times=times)
    counts, server, spans = ModelCounts(), ServerCounts(), Spans()
    theirs = prometheus_client.Histogram("h", "h", ["model"], registry=None).labels("m")

    def traffic() -> None:
        server.shared_memory.received_bytes += 40_000
        server.shared_memory.sent_bytes += 40_000

    def untraced() -> None:
        with spans.span("step", model="m"), spans.span("exchange", model="m", worker="w"):
            pass

    parts: dict[str, Callable[[], object]] = {
        "server: outcome, staleness, four rooms": lambda: counts.decided(receipt),
        "server: publish": lambda: counts.publish.observe(1e-4),
        "server: bytes": traffic,
        "server: what the request is about": lambda: about("m", "w", 1),
        "client: spans that are off": untraced,
        "(prometheus-client: one value)": lambda: theirs.observe(1e-4),
    }
    nothing = _us(lambda: None, calls)
    return [[name, f"{_us(part, calls) - nothing:.2f}"] for name, part in parts.items()]


def _us(part: Callable[[], object], calls: int) -> float:
    # short repeats, of which some have a core to themselves also on a busy machine
    return min(timeit.repeat(part, number=AT_ONCE, repeat=calls // AT_ONCE)) / AT_ONCE * 1e6


def _pushes(name: str, folder: Path, shared: bool, rounds: int) -> list[str]:
    gradient = {"p": np.ones(PARAMETERS, dtype=np.float32)}
    with ExitStack() as stack:
        servers: list[RunningServer] = []
        sessions: list[Session] = []
        for sort, how in (("counted", {}), ("not", {"command": UNCOUNTED})):
            server = stack.enter_context(running_server(folder / sort, **how))
            session = server.connect("m", "w0", shared_memory=shared)
            session.create(gradient, [{"rule": "adagrad", "params": ["p"]}])
            servers.append(server)
            sessions.append(session)
        for session in sessions:
            _turn(session, gradient, 200)
        times: list[list[float]] = [[], []]
        for _ in range(rounds):
            for number, session in enumerate(sessions):
                times[number] += _turn(session, gradient, 100)
        counted, uncounted = map(_usual_s, times)
        scraped = _scraped(servers[0], sessions[0], gradient, rounds) / counted
    return [
        name,
        f"{counted * 1e3:.3f}",
        f"{uncounted * 1e3:.3f}",
        f"{counted / uncounted:.3f}",
        f"{scraped:.3f}",
    ]


def _usual_s(times_s: list[float]) -> float:
    """The first decile: of a push that nobody interrupts."""
    return statistics.quantiles(times_s, n=10)[0]


def _turn(session: Session, gradient: dict[str, Any], pushes: int) -> list[float]:
    found = []
    for _ in range(pushes):
        begun_s = time.perf_counter()
        session.exchange(gradient)
        found.append(time.perf_counter() - begun_s)
    return found


def _scraped(server: RunningServer, session: Session, gradient: dict[str, Any], rounds: int) -> float:
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(0.1):
            server.rest("GET", "/metrics")

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        return _usual_s(_turn(session, gradient, 100 * rounds))
    finally:
        over.set()
        thread.join()


def _scrape(models: int, workers: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        catalog = Catalog(Config(data=Path(folder)))
        for number in range(models):
            model = catalog.models[f"m{number}"] = made()
            for name in map(str, range(workers)):
                model.sessions.workers[name] = Worker(name, state=WorkerState.LIVE)
        collector = Collector(catalog)
        lines = prometheus_client.generate_latest(collector).count(b"\n")
        took_s = min(timeit.repeat(lambda: prometheus_client.generate_latest(collector), number=1, repeat=5))
    return [str(models), str(workers), str(lines), f"{took_s * 1e3:.0f}"]
