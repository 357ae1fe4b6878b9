"""Run every benchmark, or those named; each prints its tables as markdown."""

from __future__ import annotations

import argparse
import importlib

NAMES = (
    "cuda",
    "durability",
    "edits",
    "embeddings",
    "health",
    "memory",
    "metrics",
    "optim",
    "page",
    "scale",
    "shards",
    "start",
    "tensors",
    "transport",
)


def size(text: str) -> int:
    """10K, 16M or a plain number."""
    unit = {"K": 1_000, "M": 1_000_000}.get(text[-1:].upper(), 1)
    return int(text.rstrip("KkMm")) * unit


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    made.add_argument("names", nargs="*", metavar="name", help=f"one of {', '.join(NAMES)} (default: all)")
    made.add_argument("--quick", action="store_true", help="small sizes: does it run, not how fast is it")
    only = made.add_argument_group("transport")
    only.add_argument(
        "--size", type=size, action="append", metavar="N", help="parameters: 10K, 16M; may repeat"
    )
    only.add_argument(
        "--only",
        action="append",
        metavar="TABLE",
        choices=["exchange", "small", "sync", "streams", "training", "workers", "pulls", "hostile"],
    )
    only.add_argument(
        "--sides", action="append", metavar="WORD", help="only sides whose name contains it; may repeat"
    )
    only.add_argument("--rule", action="append", choices=["adadelta", "adagrad"])
    only.add_argument(
        "--device", choices=["cpu", "cuda"], help="where this service's server holds its models"
    )
    return made


def main() -> None:
    """Parse arguments and run."""
    arguments = parser().parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser().error(f"unknown: {', '.join(sorted(unknown))}")
    for name in arguments.names or NAMES:
        module = importlib.import_module(f"{__package__}.{name}")
        if name != "transport":
            module.main(quick=arguments.quick)
            continue
        chosen = {
            "sizes": arguments.size,
            "only": arguments.only,
            "sides": arguments.sides,
            "rules": arguments.rule,
            "device": arguments.device,
        }
        module.main(quick=arguments.quick, **{key: value for key, value in chosen.items() if value})


if __name__ == "__main__":
    main()
