"""The transport benchmark runs: each of our own cases, and the peers that need nothing beyond the test extra."""

from __future__ import annotations

import pytest

from .printed import printed

TIMEOUT_S = 240  # 28 s on a quiet machine of 2 cores, more than 100 s on one with a load of 8
CASES = [
    f"pushstep {transport} {wire}"
    for transport in ("tcp", "unix")
    for wire in ("float32", "bfloat16", "float16", "int8")
]
CASES += ["pushstep shm float32"]


@pytest.mark.timeout(TIMEOUT_S + 20)
@pytest.mark.soak
def test_each_side_takes_part_in_its_tables() -> None:
    """Takes about half a minute."""
    words = ("pushstep", "rpc default", "socket tcp")
    tables = ("exchange", "streams", "sync", "pulls")
    found = printed(
        TIMEOUT_S,
        *("transport", "--size", "1K"),
        "--rule",
        "adagrad",
        *(option for word in words for option in ("--sides", word)),
        *(option for table in tables for option in ("--only", table)),
    )
    exchange, push, pull, sync, pulls = found.values()
    assert {cells[0] for cells in exchange} >= {*CASES, "socket tcp"}
    streamed = {case for case in CASES if case.endswith(("float32", "bfloat16"))}
    for table in (push, pull):
        assert {cells[0] for cells in table} >= {*streamed, "socket tcp"}
    assert "rpc default" in {cells[0] for cells in exchange}
    assert {"pushstep tcp float32, sync", "pushstep tcp float32"} <= {cells[0] for cells in sync}
    for table in (exchange, push, pull, sync):
        assert all(0 < float(cells[1]) <= float(cells[2]) for cells in table), table
    assert all(float(cells[1]) > 0 for cells in pulls), pulls
