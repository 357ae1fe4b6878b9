"""What a quarantined worker that floods the server costs the others.

Four workers push, in turns: alone, beside a loop at nice 19 that only uses up CPU, and beside a hostile process at nice
19. The loop's share is what any process takes; what the hostile one takes beyond it is the server's work for it.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from . import floors
from .machine import Others, cpu_s
from .peers import Peers, taking_part
from .pushstep_side import Case
from .rounds import PAUSE_S
from .table import count, decided, table

WORKERS = 4
CONNECTIONS = 4
HOSTILE = "tests.support.workers.hostile"
BUSY = [sys.executable, "-c", "import os; os.nice(19)\nwhile True: pass"]
# norms that vary as little as a benchmark's: what the hostile one pushes before it is quarantined must be outlying
GATE = {"norm_outlier": 20.0, "norm_warmup": 5}


@contextlib.contextmanager
def paused(command: list[str], lines: int) -> Iterator[subprocess.Popen[str]]:
    """A process that has said so many lines and is stopped."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(lines):
            if process.stdout is None or not process.stdout.readline():
                raise RuntimeError(f"{command[1]} ended")
        threading.Thread(target=process.communicate, daemon=True).start()  # what else it says is not read
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.wait()


def hostile(peers: Peers, elements: int, quick: bool) -> None:
    """Pushes per second of four workers beside nobody, beside a busy loop, and beside a flood of refused headers."""
    rounds, seconds = (2, 0.2) if quick else (15, 0.7)
    rows, others_share = [], 0.0
    with contextlib.ExitStack() as stack:
        (side,) = stack.enter_context(
            taking_part(iter([peers.pushstep(Case("tcp"), "adagrad", elements, WORKERS)]))
        )
        side.turn("push", 0, 20)
        side.patch("gate", GATE)
        side.turn("push", 0, 20)
        flood = [sys.executable, "-m", HOSTILE, side.address, side.model, str(CONNECTIONS)]
        beside: dict[str, subprocess.Popen[str] | None] = {"alone": None}
        beside["a busy loop at nice 19"] = stack.enter_context(paused(BUSY, 0))
        beside["a flood of refused headers at nice 19"] = stack.enter_context(paused(flood, 2))
        rates: dict[str, list[float]] = {name: [] for name in beside}
        server_s: dict[str, list[float]] = {name: [] for name in beside}
        others = Others()
        for _ in range(rounds):
            for name, process in beside.items():
                if process is not None:
                    process.send_signal(signal.SIGCONT)
                time.sleep(PAUSE_S)
                before_s, begun_s = sum(map(cpu_s, side.servers)), time.perf_counter()
                turn = side.turn("push", 0, 1, seconds)
                rates[name].append(turn.count / turn.wall_s)
                used_s = sum(map(cpu_s, side.servers)) - before_s
                server_s[name].append(used_s / (time.perf_counter() - begun_s))
                if process is not None:
                    process.send_signal(signal.SIGSTOP)
        others_share = others.share()
    for name, measured in rates.items():
        ratios = [one / alone for one, alone in zip(measured, rates["alone"], strict=True)]
        ratio = statistics.median(measured) / statistics.median(rates["alone"])
        asked = decided(ratio, floors.PUSHES_BESIDE_HOSTILE) if name != "alone" else ("", "")
        rows.append(
            (
                name,
                *(f"{rate:.1f}" for rate in (statistics.median(measured), max(measured))),
                *(f"{one:.2f}" for one in (ratio, statistics.median(ratios))),
                *asked,
                f"{statistics.median(server_s[name]):.2f}",
            )
        )
    columns = ("beside", "pushes/s", "most", "of those alone", "paired", "asked", "met", "server's CPUs")
    table(
        f"Pushes of {count(elements)} float32 by {WORKERS} workers, Adagrad, async",
        columns,
        rows,
        others_share,
    )
