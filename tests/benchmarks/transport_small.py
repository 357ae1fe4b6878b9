"""What does a push cost that has few parameters: latency and CPU time of one, and how many of many workers in a second."""

from __future__ import annotations

from . import floors
from .peers import FLOAT32_BYTES, Peers, taking_part
from .pushstep_side import Case
from .rounds import Found, Measured, Plan, best, interleave
from .side import Side
from .table import count, decided, table
from .transport_exchange import plan

SIZES = (1_000, 10_000, 64_000)
# the one that floors are for
JUDGED = 10_000
WORKERS = (1, 4, 16, 64)
TCP, SHARED = Case("tcp"), Case("shm")
RPC = ("default", "shm")


def small(peers: Peers, quick: bool) -> None:
    """Print a table of exchanges for each size, and one of pushes per second."""
    for elements in SIZES:
        _exchanges(peers, elements, quick)
    _rates(peers, JUDGED, quick)


def _exchanges(peers: Peers, elements: int, quick: bool) -> None:
    sides = (
        *((case.name, lambda case=case: peers.pushstep(case, "adagrad", elements)) for case in (TCP, SHARED)),
        *(
            (f"rpc {variant}", lambda variant=variant: peers.rpc(variant, "adagrad", elements))
            for variant in RPC
        ),
        ("gRPC tcp", lambda: peers.grpc(elements)),
        ("gRPC tcp, open call", lambda: peers.grpc(elements, "open call")),
        ("socket tcp", lambda: peers.socket("tcp", elements)),
    )
    with taking_part(make() for name, make in sides if peers.wants(name)) as made:
        found = interleave(made, "exchange", plan(elements, quick))
    columns = ("", "min ms", "median ms", "CPU ms", "times gRPC's speed", "times rpc's best", "asked", "met")
    rows = [_row(name, measured, found, elements) for name, measured in found.items()]
    table(f"Exchange of {count(elements)} float32, Adagrad, 1 worker", columns, rows, found.others_share)


def _row(name: str, measured: Measured, found: Found, elements: int) -> tuple[str, ...]:
    peers = found.get("gRPC tcp"), best(found, "rpc")
    ratios = [None if peer is None else peer.median_s / measured.median_s for peer in peers]
    asked: list[tuple[str, str]] = []
    for case, ratio, floor, whom in (
        (TCP, ratios[0], floors.SMALL_OF_GRPC, "gRPC"),
        (TCP, ratios[1], floors.SMALL_OF_RPC, "rpc"),
        (SHARED, ratios[1], floors.SMALL_SHARED_OF_RPC, "rpc"),
    ):
        if elements == JUDGED and name == case.name and ratio is not None:
            times, met = decided(ratio, floor)
            asked.append((f"{times} x {whom}", met))
    return (
        name,
        f"{measured.least_s * 1e3:.3f}",
        f"{measured.median_s * 1e3:.3f}",
        f"{measured.cpu_s_each * 1e3:.3f}",
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        ", ".join(times for times, _ in asked),
        ", ".join(met for _, met in asked),
    )


def _rates(peers: Peers, elements: int, quick: bool) -> None:
    """Pushes per second of 1 to 64 workers, held by at most two processes."""
    makes = [
        *(
            (case.name, lambda n, case=case: peers.pushstep(case, "adagrad", elements, n))
            for case in (TCP, SHARED)
        ),
        ("gRPC tcp", lambda n: peers.grpc(elements, workers=n)),
        ("gRPC tcp, open call", lambda n: peers.grpc(elements, "open call", n)),
    ]

    def sides():  # type: ignore[no-untyped-def]
        for name, make in makes:
            for n in WORKERS if peers.wants(name) else ():
                side: Side = make(n)
                side.name = f"{name}, {n}"
                yield side

    with taking_part(sides()) as made:
        found = interleave(made, "push", Plan(rounds=2 if quick else 5, seconds=0.2 if quick else 0.7))
    rows = []
    for name, measured in found.items():
        workers = name.rpartition(", ")[2]
        bare = found.get(f"gRPC tcp, {workers}")
        ratio = None if bare is None else measured.rate / bare.rate
        asked = ("", "")
        if name == f"{TCP.name}, {WORKERS[-1]}" and ratio is not None:
            asked = decided(ratio, floors.MANY_OF_GRPC)
        cpu_ms = f"{measured.cpu_s_each * 1e3:.3f}"
        rows.append((name, f"{measured.rate:.0f}", cpu_ms, "" if ratio is None else f"{ratio:.2f}", *asked))
    table(
        f"Pushes of {count(elements)} float32 ({elements * FLOAT32_BYTES / 1e3:.0f} KB), Adagrad, async",
        ("side, workers", "pushes/s", "CPU ms each", "of as many over gRPC", "asked", "met"),
        rows,
        found.others_share,
    )
