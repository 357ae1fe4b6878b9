"""How long a program waits before its first step: for imports, for a server, for `attach`.

Each is a process of its own, started in turns with the others. `import torch` is what none of them can do without.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

import torch

from pushstep.client import connect
from tests.support.servers.harness import RunningServer, running_server

from .machine import Others
from .table import table

# what `import pushstep.client` may add to `import torch`; how many times that a server may take to be ready
MOST_IMPORT_S: Final = 0.15
MOST_READY: Final = 1.5
SERVER: Final = str(Path(sys.executable).with_name("pushstep-server"))
CLIENT: Final = "import torch; from pushstep.client import connect"
LARGE, MANY = 16_000_000, 20_000


def main(*, quick: bool = False) -> None:
    """Print the tables."""
    print("\n## start")
    others, rounds = Others(), 1 if quick else 7
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / "warm"
        _ready(Path(folder) / "first", warm)
        numbers = iter(range(1_000_000))
        makes: dict[str, Callable[[], None]] = {
            "import torch": lambda: _python("import torch"),
            "import torch, pushstep.client": lambda: _python(CLIENT),
            "server ready": lambda: _ready(Path(folder) / f"{next(numbers)}", warm),
        }
        times = {name: [0.0] * 0 for name in makes}
        for _ in range(rounds):
            for name, make in makes.items():
                times[name].append(_took_s(make))
        cold_s = [
            _took_s(lambda: _ready(Path(folder) / f"{next(numbers)}", Path(folder) / f"cold{next(numbers)}"))
            for _ in range(1 if quick else 2)
        ]
    medians = {name: statistics.median(found) for name, found in times.items()}
    torch_s, client_s, ready_s = medians.values()
    rows = [
        ("import torch", f"{torch_s:.2f}", "", "", ""),
        _judged(
            "import torch, pushstep.client",
            client_s,
            f"{client_s - torch_s:+.2f} s",
            MOST_IMPORT_S,
            client_s - torch_s,
        ),
        _judged(
            "server ready, kernels in the cache",
            ready_s,
            f"{ready_s / torch_s:.2f} x",
            MOST_READY,
            ready_s / torch_s,
        ),
        (
            "server ready, no kernels",
            f"{statistics.median(cold_s):.2f}",
            f"{statistics.median(cold_s) / torch_s:.2f} x",
            "",
            "",
        ),
    ]
    table(
        "Imports and the server", ("", "median s", "of import torch", "at most", "met"), rows, others.share()
    )
    _attach(quick)


def _judged(name: str, seconds: float, shown: str, most: float, got: float) -> tuple[str, ...]:
    return name, f"{seconds:.2f}", shown, f"{most:g}", "yes" if got <= most else "**no**"


def _took_s(make: Callable[[], None]) -> float:
    begun_s = time.perf_counter()
    make()
    return time.perf_counter() - begun_s


def _python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def _ready(data: Path, kernels: Path) -> None:
    """A server from its start until it says that it is ready. It is ended outside of what is measured only by SIGKILL."""
    options = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", str(data)]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(kernels)}
    with subprocess.Popen(
        [SERVER, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    ) as process:
        line = process.stdout.readline() if process.stdout is not None else ""
        process.kill()
    if not line.startswith("ready "):
        raise RuntimeError(f"the server did not start: {line!r}")


def _attach(quick: bool) -> None:
    """What `attach` takes that creates a model, and what one takes that finds it."""
    others, rows = Others(), []
    shapes = {"16 M in one tensor": [LARGE], "20,000 tensors of 8": [8] * MANY}
    if quick:
        shapes = {"10 K in one tensor": [10_000], "200 tensors of 8": [8] * 200}
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder) / "data") as server:
        for title, sizes in shapes.items():
            for transport, shared in (("TCP", False), ("shared memory", True)):
                name = f"{title}, {transport}"
                rounds = [
                    _attached(server, f"m{len(rows)}-{k}", sizes, shared) for k in range(1 if quick else 3)
                ]
                created, joined = (statistics.median(column) for column in zip(*rounds, strict=True))
                rows.append((name, f"{created * 1e3:.0f}", f"{joined * 1e3:.0f}"))
    table("attach", ("", "ms, creates the model", "ms, finds it"), rows, others.share())


def _attached(server: RunningServer, model: str, sizes: list[int], shared: bool) -> tuple[float, float]:
    times = []
    for worker in ("w0", "w1"):
        parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
        with closing(connect(server.grpc, model=model, worker=worker, shared_memory=shared)) as session:
            times.append(_took_s(lambda: session.attach(torch.optim.Adagrad(parameters))))  # noqa: B023 - called at once
    server.rest("DELETE", f"/v1/models/{model}").raise_for_status()
    return times[0], times[1]
