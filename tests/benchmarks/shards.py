"""What it costs that a model lies in several ranks: pushes and exchanges over TCP, with 1, 2 and 4 of them on this host.

All ranks share this machine's cores, so nothing here shows what several machines gain. It shows what each byte and each push
costs, of the worker and of all ranks together: that must not grow with their number.
"""

from __future__ import annotations

from typing import Final

from .peer_local import Rule
from .pushstep_side import Case, Pushstep
from .rounds import Found, Measured, interleave
from .table import count, decided, table
from .transport_exchange import plan

RANKS: Final = (1, 2, 4)
SIZES: Final = (10_000, 16_000_000, 64_000_000)
QUICK_SIZES: Final = (1_000, 100_000)
FLOAT32_BYTES: Final = 4
# From here on what counts is each byte's cost: at most this much of one server's. Below it the latency.
LARGE_ELEMENTS: Final = 1_000_000
CPU_OF_ONE, LATENCY_OF_ONE = 1.15, 1.5


def main(quick: bool) -> None:
    """Print a table for each size and task."""
    servers = [Pushstep(ranks=ranks) for ranks in RANKS]
    try:
        for elements in QUICK_SIZES if quick else SIZES:
            sides = [server.side(Case("tcp"), "adadelta", elements) for server in servers]
            try:
                for task in ("exchange", "push"):
                    _print(task, interleave(sides, task, plan(elements, quick)), "adadelta", elements)
            finally:
                for side in sides:
                    side.close()
    finally:
        for server in servers:
            server.close()


def _print(task: str, found: Found, rule: Rule, elements: int) -> None:
    alone = next(iter(found.values()))
    payload_bytes = elements * FLOAT32_BYTES * (2 if task == "exchange" else 1)
    rows = [_row(name, measured, alone, payload_bytes, elements) for name, measured in found.items()]
    table(
        f"{task.capitalize()} of {count(elements)} float32, {rule}, 1 worker, by ranks",
        ("", "min ms", "median ms", "CPU ms", "CPU s/GB", "time of one's", "CPU of one's", "at most", "met"),
        rows,
        found.others_share,
    )


def _row(
    name: str, measured: Measured, alone: Measured, payload_bytes: int, elements: int
) -> tuple[object, ...]:
    own, one = measured.cpu_s_per_gb(payload_bytes), alone.cpu_s_per_gb(payload_bytes)
    time_ratio, cpu_ratio = measured.median_s / alone.median_s, own / one
    is_large = elements >= LARGE_ELEMENTS
    ratio, most = (cpu_ratio, CPU_OF_ONE) if is_large else (time_ratio, LATENCY_OF_ONE)
    _, met = decided(most / ratio, 1.0)
    return (
        name,
        f"{measured.least_s * 1e3:.2f}",
        f"{measured.median_s * 1e3:.2f}",
        f"{own * payload_bytes / 1e6:.2f}",
        f"{own:.2f}",
        f"{time_ratio:.2f}",
        f"{cpu_ratio:.2f}",
        "" if measured is alone else f"{most:g} {'CPU' if is_large else 'time'}",
        "" if measured is alone else met,
    )
