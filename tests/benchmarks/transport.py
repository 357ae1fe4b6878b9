"""This service against its peers, all as real processes on this machine.

Tables, one for each question: `exchange` (what a step costs), `small` (one of few parameters, and how many in a second),
`sync` (two workers, against gloo), `streams` (one direction, against a bare socket), `training` (a step with its compute:
overlap, prefetch, top_k, int8), `workers` (1 to 16 of them), `pulls` and `hostile` (what those cost pushes).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from .peer_local import Rule
from .peer_ray import installed as ray_installed
from .peers import Peers
from .transport_exchange import exchange, in_step
from .transport_hostile import hostile
from .transport_small import small
from .transport_streams import streams
from .transport_training import training
from .transport_workers import crowds, pulls

TABLES = ("exchange", "small", "sync", "streams", "training", "workers", "pulls", "hostile")
RULES: tuple[Rule, ...] = ("adadelta", "adagrad")
SIZES = (10_000, 1_000_000, 16_000_000, 64_000_000)
QUICK_SIZES = (10_000, 1_000_000)
BULK_SIZES = (1_000_000, 16_000_000)  # where bytes count


def main(
    quick: bool = False,
    sizes: Sequence[int] = (),
    only: Sequence[str] = (),
    sides: Sequence[str] = (),
    rules: Sequence[Rule] = RULES,
    device: str = "cpu",
) -> None:
    """Print every table, or those named in `only`, of every side or of those whose names contain one of `sides`."""
    signal.signal(signal.SIGTERM, end_orderly)
    print(f"\n## transport: torch {torch.__version__}, {torch.get_num_threads()} threads")
    if not ray_installed():
        print("\nNo Ray here, and so not in these tables: pip install -e '.[bench]' -c constraints.txt")
    own = sizes or (QUICK_SIZES if quick else SIZES)
    bulk = sizes or (QUICK_SIZES[1:] if quick else BULK_SIZES)
    with Peers(sides, device) as peers:
        for name in only or TABLES:
            if name == "small":
                small(peers, quick)
                continue
            for size in own if name == "exchange" else bulk:
                _print(name, peers, size, rules, quick)


def _print(name: str, peers: Peers, size: int, rules: Sequence[Rule], quick: bool) -> None:
    if name in ("exchange", "sync"):
        for rule in rules:
            (exchange if name == "exchange" else in_step)(peers, rule, size, quick)
    else:
        tables = {
            "streams": streams,
            "training": training,
            "workers": crowds,
            "pulls": pulls,
            "hostile": hostile,
        }
        tables[name](peers, size, quick)


def end_orderly(number: int, frame: object) -> NoReturn:
    """End as if interrupted, so that every process is ended on the way."""
    sys.exit(128 + number)
