"""What a benchmark prints, for the tests of whether it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def printed(timeout_s: float, *arguments: str) -> dict[str, list[list[str]]]:
    """Run `python -m tests.benchmarks` with small sizes: each table's rows by its title."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "--quick", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[str, list[list[str]]] = {}
    for part in ran.stdout.split("### ")[1:]:
        title, *lines = part.splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
        found[title] = cells[2:]
    return found
