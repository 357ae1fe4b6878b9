"""The transport benchmark runs: each of our own cases, and the peers that need nothing beyond the test extra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = [f"pushstep {transport} {wire}" for transport in ("tcp", "unix") for wire in ("float32", "bfloat16")]


def rows(*options: str) -> dict[str, list[list[str]]]:
    """What the benchmark printed: each table's rows by its title."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "transport", "--quick", "--size", "1K", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[str, list[list[str]]] = {}
    for part in ran.stdout.split("### ")[1:]:
        title, *lines = part.splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
        found[title] = cells[2:]
    return found


def test_every_case_exchanges_and_streams() -> None:
    sides = [option for word in ("pushstep", "rpc uv", "socket", "local") for option in ("--sides", word)]
    found = rows("--only", "exchange", "--only", "streams", "--rule", "adagrad", *sides)
    assert len(found) == 3
    for title, table in found.items():
        names = {cells[0] for cells in table}
        assert names >= {*CASES, "socket tcp", "socket unix"}, title
        assert all(0 < float(cells[1]) <= float(cells[2]) for cells in table), table
    exchanges = next(table for title, table in found.items() if title.startswith("Exchange"))
    assert {"rpc uv", "local torch.optim"} <= {cells[0] for cells in exchanges}


@pytest.mark.parametrize(("table", "tables", "lines"), [("sync", 1, 1), ("pulls", 1, 3)])
def test_workers_beside_one_another(table: str, tables: int, lines: int) -> None:
    found = rows("--only", table, "--rule", "adagrad", "--sides", "pushstep tcp")
    assert [len(cells) for cells in found.values()] == [lines] * tables
