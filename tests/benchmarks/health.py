"""How fast health is answered while a model of 1 GB is stepped, snapshotted, restored, imported and exported.

`/healthz` runs in the event loop, so its latency is that of everything that the loop does: a wait of it is a wait of every worker.
The bound is on the 95th percentile.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import httpx
import torch

from pushstep.client import connect
from pushstep.optim import Adagrad
from tests.support.servers.harness import RunningServer, running_server

from .machine import Others
from .table import table

# parameters and one state, in float32: 1 GB
ELEMENTS, QUICK_ELEMENTS = 125_000_000, 1_000_000
MOST_P95_MS: Final = 250.0
PAUSE_S: Final = 0.01
MODEL: Final = "m"
ROOT: Final = f"/v1/models/{MODEL}"


class Prober:
    """Asks /healthz again and again, on a connection of its own, and keeps how long each answer took."""

    def __init__(self, server: RunningServer) -> None:
        self._url = f"http://{server.http}/healthz"
        self._over = threading.Event()
        self.took_ms: list[float] = []

    def run(self, work: Callable[[], None]) -> float:
        """Do the work while health is asked; the seconds that it took."""
        asking = threading.Thread(target=self._ask)
        asking.start()
        begun_s = time.perf_counter()
        try:
            work()
        finally:
            took_s = time.perf_counter() - begun_s
            self._over.set()
            asking.join()
        return took_s

    def _ask(self) -> None:
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not self._over.is_set() or not self.took_ms:
                begun_s = time.perf_counter()
                client.get(self._url).raise_for_status()
                self.took_ms.append((time.perf_counter() - begun_s) * 1e3)
                self._over.wait(PAUSE_S)


def main(*, quick: bool) -> None:
    """Measure and print."""
    elements = QUICK_ELEMENTS if quick else ELEMENTS
    rows: list[tuple[str, ...]] = []
    others = Others()
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder) / "data") as server:
        parameter = torch.nn.Parameter(torch.zeros(elements))
        session = connect(f"unix:{server.unix}", model=MODEL, worker="w0", timeout_s=120)
        remote = session.attach(Adagrad([parameter], lr=0.01))
        gradient = torch.full((elements,), 0.01)
        file = Path(folder) / "export.safetensors"

        def step() -> None:
            for _ in range(3):
                parameter.grad = gradient
                remote.step()

        def snapshot() -> None:
            _ask(server, "POST", f"{ROOT}/snapshots").raise_for_status()

        def restore() -> None:
            found = _ask(server, "GET", f"{ROOT}/snapshots").json()["snapshots"][0]["id"]
            _ask(server, "POST", f"{ROOT}/snapshots/{found}/restore").raise_for_status()

        def export() -> None:
            url = f"http://{server.http}{ROOT}/export?state=true"
            with file.open("wb") as out, httpx.stream("GET", url, timeout=600, trust_env=False) as answer:
                for part in answer.iter_bytes(1 << 20):
                    out.write(part)

        def bring_in() -> None:
            length = {"content-length": str(file.stat().st_size)}
            with file.open("rb") as content:
                _ask(server, "PUT", f"{ROOT}/state-dict", content=content, headers=length).raise_for_status()

        step()
        for name, work in (
            ("3 steps", step),
            ("snapshot", snapshot),
            ("restore", restore),
            ("export", export),
            ("import", bring_in),
        ):
            prober = Prober(server)
            took_s = prober.run(work)
            rows.append(_row(name, took_s, prober.took_ms))
        session.close()
    columns = ("beside", "took", "asked", "median", "p95", "longest", f"p95 up to {MOST_P95_MS:.0f} ms")
    table(f"health beside a model of {elements * 8 / 1e9:.2f} GB", columns, rows, others.share())


def _row(name: str, took_s: float, took_ms: list[float]) -> tuple[str, ...]:
    p95 = sorted(took_ms)[math.ceil(0.95 * len(took_ms)) - 1]
    held = "yes" if p95 <= MOST_P95_MS else "NO"
    numbers = (statistics.median(took_ms), p95, max(took_ms))
    return (name, f"{took_s:.1f} s", str(len(took_ms)), *(f"{each:.1f} ms" for each in numbers), held)


def _ask(server: RunningServer, method: str, path: str, **options: object) -> httpx.Response:
    return httpx.request(method, f"http://{server.http}{path}", timeout=600, trust_env=False, **options)  # type: ignore[arg-type]
