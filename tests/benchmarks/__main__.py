"""Run every benchmark, or those named; each module here has a `main(quick)` that prints its tables."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path


def main() -> None:
    """Parse arguments and run."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"one of {', '.join(names)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not how fast is it")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    for name in arguments.names or names:
        importlib.import_module(f"{__package__}.{name}").main(quick=arguments.quick)


if __name__ == "__main__":
    main()
