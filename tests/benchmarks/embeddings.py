"""Embeddings: rows pushed and the next batch's rows pulled, and the exchange of tables that each worker holds.

26 tables of 100 K x 32 and one of 2 M x 64, batches of 2,048 and 8,192 ids of each, with a Zipf skew, stepped by sparse
Adagrad. A row here is an id of a batch: repeated ids count as often as the batch has them. The bare socket and gRPC move the
bytes of the batch as it is (an id and a row for each), there and back.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import torch

from . import embedding_peers, embedding_side, floors
from .embedding_load import Load
from .peer_ray import installed as ray_installed
from .peers import Peers, taking_part
from .rounds import Found, Plan, best, interleave
from .side import Side
from .table import decided, table
from .transport import end_orderly

BATCHES = (2048, 8192)
WORKERS = (1, 4, 16)
QUICK_ROWS = 2_000
RPC_VARIANTS = ("default", "uv", "uv mpt", "shm")


def main(quick: bool = False) -> None:
    """Print the tables."""
    signal.signal(signal.SIGTERM, end_orderly)
    print(f"\n## embeddings: torch {torch.__version__}, {torch.get_num_threads()} threads")
    for batch in BATCHES[:1] if quick else BATCHES:
        load = Load(64, rows=QUICK_ROWS) if quick else Load(batch)
        for workers in WORKERS[:2] if quick else WORKERS:
            with Peers() as peers:
                _push_and_pull(peers, load, workers, quick)
        with Peers() as peers:
            _exchange(peers, Load(load.batch, with_large=False, rows=load.rows), quick)


def _row_sides(peers: Peers, load: Load, workers: int) -> Iterator[Callable[[], Side]]:
    for transport in ("tcp", "shm"):
        yield lambda transport=transport: peers.of_pushstep(
            f"pushstep {transport}", embedding_side.row_workers, transport, workers, load, transport == "shm"
        )
    for variant in RPC_VARIANTS if workers == 1 else ("default", "uv"):
        yield lambda variant=variant: peers.of_rpc(variant, embedding_peers.rpc_workers, workers, load)
    if workers == 1:
        if ray_installed():
            yield lambda: peers.of_ray("ray actor", embedding_peers.ray_workers, load)
        yield lambda: peers.socket("tcp", load.payload_bytes // 4)
        yield lambda: peers.grpc(load.payload_bytes // 4)


def _push_and_pull(peers: Peers, load: Load, workers: int, quick: bool) -> None:
    plan = Plan(rounds=2, warm=1, repeats=2) if quick else Plan(rounds=5, warm=2, repeats=6)
    if workers > 1:
        plan = Plan(rounds=2 if quick else 4, seconds=0.3 if quick else 2.0)
    with taking_part(make() for make in _row_sides(peers, load, workers)) as sides:
        found = interleave(sides, "push_and_pull", plan)
    rows = []
    for name, measured in found.items():
        # rows pushed, and as many pulled
        rate = measured.rate * load.ids
        asked = _asked(found, name) if workers == 1 else ("", "")
        cpu_s = sum(measured.cpu_s) / len(measured.cpu_s) / (load.ids / 1e6)
        rows.append(
            (
                name,
                f"{measured.least_s * 1e3:.2f}",
                f"{measured.median_s * 1e3:.2f}",
                f"{rate / 1e6:.3f}",
                f"{cpu_s:.2f}",
                *asked,
            )
        )
    table(
        f"Push of {load.batch:,} rows of each of {len(load.tables)} tables, then pull of as many, workers: {workers}",
        ("", "min ms", "median ms", "M rows/s", "CPU s/M rows", "asked", "met"),
        rows,
        found.others_share,
    )


def _asked(found: Found, name: str) -> tuple[str, str]:
    asked, met = [], []
    for against, times in floors.ROWS if name == "pushstep tcp" else ():
        other = best(found, against)
        if other is not None:
            ratio = other.median_s / found[name].median_s
            floor, said = decided(ratio, times)
            asked.append(f"{floor} x {against}")
            met.append(f"{said} ({ratio:.2f})")
    return ", ".join(asked), ", ".join(met)


def _exchange(peers: Peers, load: Load, quick: bool) -> None:
    plan = Plan(rounds=2, warm=1, repeats=2) if quick else Plan(rounds=7, warm=2, repeats=6)
    sides: list[Callable[[], Side]] = [
        lambda transport=transport: peers.of_pushstep(  # type: ignore[misc]
            f"pushstep {transport}", embedding_side.table_workers, transport, 1, load, transport == "shm"
        )
        for transport in ("tcp", "shm")
    ]
    sides.append(lambda: peers.of_local("local torch.optim", embedding_peers.local_workers, load))
    with taking_part(make() for make in sides) as made:
        found = interleave(made, "exchange", plan)
    local = found["local torch.optim"]
    rows = []
    for name, measured in found.items():
        ratio = local.median_s / measured.median_s
        asked = decided(ratio, floors.ROWS_OF_LOCAL[name]) if name in floors.ROWS_OF_LOCAL else ("", "")
        cpu_s = sum(measured.cpu_s) / len(measured.cpu_s) / (load.ids / 1e6)
        rows.append(
            (
                name,
                f"{measured.least_s * 1e3:.2f}",
                f"{measured.median_s * 1e3:.2f}",
                f"{cpu_s:.2f}",
                f"{ratio:.2f}",
                *asked,
            )
        )
    table(
        f"Exchange of {len(load.tables)} tables that the worker holds, {load.batch:,} rows of each",
        ("", "min ms", "median ms", "CPU s/M rows", "times local speed", "asked", "met"),
        rows,
        found.others_share,
    )
