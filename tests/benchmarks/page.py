"""What the page costs training: exchanges at a server that nobody looks at, and at one that five open pages look at.

Two servers, each with one worker, take turns in one process. At one of them five tabs of a real Chromium show the model's charts,
and ask once a second. The browser runs on the same cores as the server and the workers here, which an operator's does not, and
draws more than the server answers. So the same is measured with the GETs of five pages only, from a thread. It
takes about two minutes.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from pushstep.client import Session
from tests.support.browser.chromium import chromium, tab
from tests.support.servers.harness import RunningServer, running_server

from .machine import Others
from .table import table

PAGES = 5
MODEL = "m"
SETTLE_S = 3.0
SHARE_S = 10.0
# What a page on the view of a model's charts asks, with the seconds between two looks.
LOOKS = ((f"/v1/models/{MODEL}", 1.0), (f"/v1/models/{MODEL}/workers?limit=200", 2.0))
SIZES = (("10 K", 10_000, 200), ("16 M", 16_000_000, 3))


def main(*, quick: bool = False) -> None:
    """Print the table."""
    others = Others()
    print("\n## page")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, elements, calls in SIZES[:1] if quick else SIZES:
            for shared in (True, False):
                way = "shared memory" if shared else "TCP"
                place = Path(folder) / f"{elements}-{shared}"
                rows.append([name, way, *_measured(place, elements, calls, shared, 2 if quick else 12)])
    columns = [
        "exchange of",
        "by",
        "ms, no page",
        f"ms, {PAGES} pages",
        "ratio",
        f"ratio, GETs of {PAGES} pages only",
        "server's share of a core for the pages",
    ]
    table(f"an exchange beside {PAGES} open pages", columns, rows, others.share())


def _measured(folder: Path, elements: int, calls: int, shared: bool, rounds: int) -> list[str]:
    gradient = {"p": np.ones(elements, dtype=np.float32)}
    with ExitStack() as stack:
        servers: list[RunningServer] = []
        sessions: list[Session] = []
        for side in ("alone", "looked-at"):
            server = stack.enter_context(running_server(folder / side))
            session = server.connect(MODEL, "w0", shared_memory=shared)
            session.create(gradient, [{"rule": "adagrad", "params": ["p"]}])
            servers.append(server)
            sessions.append(session)
        turns = [lambda session=session: _turn(session, gradient, calls) for session in sessions]
        with _asking(servers[1]):
            asked = _interleaved(turns, rounds)
        with _open_pages(servers[1]):
            share = _share_of_a_core(servers[1])
            shown = _interleaved(turns, rounds)
    alone, looked_at = shown
    return [
        f"{statistics.median(alone) * 1e3:.3f}",
        f"{statistics.median(looked_at) * 1e3:.3f}",
        f"{_ratio(*shown):.3f}",
        f"{_ratio(*asked):.3f}",
        f"{share:.1%}",
    ]


def _cpu_s(pid: int) -> float:
    """CPU seconds that a process has taken, by all of its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _share_of_a_core(server: RunningServer) -> float:
    """What the server takes of a core while nobody pushes."""
    begun_s, begun_cpu_s = time.monotonic(), _cpu_s(server.process.pid)
    time.sleep(SHARE_S)
    return (_cpu_s(server.process.pid) - begun_cpu_s) / (time.monotonic() - begun_s)


def _ratio(alone: list[float], looked_at: list[float]) -> float:
    """The median of the rounds' ratios: both sides of a round meet the same other work of the machine."""
    return statistics.median(after / before for before, after in zip(alone, looked_at, strict=True))


def _interleaved(turns: list[Callable[[], float]], rounds: int) -> tuple[list[float], list[float]]:
    found: tuple[list[float], list[float]] = ([], [])
    for turn in turns:
        turn()
    for number in range(rounds):
        for side in (0, 1) if number % 2 else (1, 0):
            found[side].append(turns[side]())
    return found


def _turn(session: Session, gradient: dict[str, Any], calls: int) -> float:
    """The mean seconds of an exchange: what the pages take now and then counts with its share."""
    begun_s = time.perf_counter()
    for _ in range(calls):
        session.exchange(gradient)
    return (time.perf_counter() - begun_s) / calls


@contextmanager
def _open_pages(server: RunningServer) -> Iterator[None]:
    with chromium() as browser, ExitStack() as stack:
        pages = [stack.enter_context(tab(browser, server.http)) for _ in range(PAGES)]
        for shown in pages:
            shown.show(f"models/{MODEL}/training").locator(".chart").first.wait_for()
        time.sleep(SETTLE_S)
        yield


@contextmanager
def _asking(server: RunningServer) -> Iterator[None]:
    """The requests of as many pages, without a browser."""
    over = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=f"http://{server.http}", trust_env=False) as client:
            due = [(path, every_s / PAGES, 0.0) for path, every_s in LOOKS]
            while not over.wait(0.02):
                now_s = time.monotonic()
                for number, (path, every_s, at_s) in enumerate(due):
                    if now_s >= at_s:
                        client.get(path)
                        due[number] = (path, every_s, now_s + every_s)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
