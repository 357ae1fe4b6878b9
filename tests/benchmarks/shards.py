"""What it costs that a model lies in several ranks: pushes and exchanges over TCP, with 1, 2 and 4 of them on this host.

All ranks share this machine's cores, so nothing here shows what several machines gain. It shows what each byte and each push
costs, of the worker and of all ranks together: that must not grow with their number. Beside it stands torch.distributed.rpc
with as many servers, each with torch's foreach Adadelta, which hold nothing together: no ticket, no round, no digest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

from .peer_local import Rule
from .peer_rpc import Rpc
from .pushstep_side import Case, Pushstep
from .rounds import Found, Measured, interleave
from .table import count, decided, table
from .transport_exchange import plan

RULE: Final[Rule] = "adadelta"
RANKS: Final = (1, 2, 4)
SIZES: Final = (10_000, 16_000_000, 64_000_000)
QUICK_SIZES: Final = (1_000, 100_000)
FLOAT32_BYTES: Final = 4
# From here on what counts is each byte's cost: at most this much of one server's. Below it the latency.
LARGE_ELEMENTS: Final = 1_000_000
CPU_OF_ONE, LATENCY_OF_ONE = 1.15, 1.5


def main(quick: bool) -> None:
    """Print a table for each size and task."""
    with contextlib.ExitStack() as all_sizes:
        servers = [Pushstep(ranks=ranks) for ranks in RANKS]
        for server in servers:
            all_sizes.callback(server.close)
        for elements in QUICK_SIZES if quick else SIZES:
            with contextlib.ExitStack() as this_size:
                # of one size, since they never give back what they held
                peers = [Rpc(_variant(elements), servers=ranks) for ranks in RANKS]
                for peer in peers:
                    this_size.callback(peer.close)
                ours = [server.side(Case("tcp"), RULE, elements) for server in servers]
                theirs = [peer.side(RULE, elements) for peer in peers]
                for side in (*ours, *theirs):
                    this_size.callback(side.close)
                for task in ("exchange", "push"):
                    found = interleave([*ours, *theirs], task, plan(elements, quick))
                    names = [(own.name, other.name) for own, other in zip(ours, theirs, strict=True)]
                    _print(task, found, names, elements)


def _variant(elements: int) -> str:
    """Which of rpc's ways over TCP is the fastest for this size, by the tables of `transport`."""
    return "uv mpt" if elements >= LARGE_ELEMENTS else "uv"


def _print(task: str, found: Found, names: Sequence[tuple[str, str]], elements: int) -> None:
    payload_bytes = elements * FLOAT32_BYTES * (2 if task == "exchange" else 1)
    pairs = [(found[own], found[other]) for own, other in names]
    ones = pairs[0]
    rows: list[tuple[object, ...]] = []
    for (name, _), (own, other) in zip(names, pairs, strict=True):
        judged = ("", "") if own is ones[0] else _judged(own, ones[0], elements)
        against = f"{other.median_s / own.median_s:.2f}", f"{own.cpu_s_each / other.cpu_s_each:.2f}"
        rows.append((*_row(name, own, ones[0], payload_bytes), *judged, *against))
    for (_, name), (_, other) in zip(names, pairs, strict=True):
        rows.append((*_row(name, other, ones[1], payload_bytes), "", "", "", ""))
    table(
        f"{task.capitalize()} of {count(elements)} float32, {RULE}, 1 worker, by ranks",
        (
            *("", "min ms", "median ms", "CPU ms", "CPU s/GB", "time of one's", "CPU of one's"),
            *("at most", "met", "times rpc's speed", "CPU of rpc's"),
        ),
        rows,
        found.others_share,
    )


def _row(name: str, measured: Measured, alone: Measured, payload_bytes: int) -> tuple[object, ...]:
    own = measured.cpu_s_per_gb(payload_bytes)
    return (
        name,
        f"{measured.least_s * 1e3:.2f}",
        f"{measured.median_s * 1e3:.2f}",
        f"{own * payload_bytes / 1e6:.2f}",
        f"{own:.2f}",
        f"{measured.median_s / alone.median_s:.2f}",
        f"{own / alone.cpu_s_per_gb(payload_bytes):.2f}",
    )


def _judged(measured: Measured, alone: Measured, elements: int) -> tuple[str, str]:
    """What is asked of several ranks, and whether it is met."""
    if elements >= LARGE_ELEMENTS:
        ratio, most, word = measured.cpu_s_per_gb(1) / alone.cpu_s_per_gb(1), CPU_OF_ONE, "CPU"
    else:
        ratio, most, word = measured.median_s / alone.median_s, LATENCY_OF_ONE, "time"
    _, met = decided(most / ratio, 1.0)
    return f"{most:g} {word}", met
