"""What each of four ranks holds in memory: its quarter of the parameters and of their state, and little beside it."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from pushstep.server.capacity.idle_memory import LOOK_S
from pushstep.server.ranks.leader import GATHER_S
from tests.support.ranks.group import RankGroup, running_ranks
from tests.support.servers.harness import forget_peak, memory_bytes

RANKS = 4
ROWS, WIDTH = 1_000_000, 32
# parameters, and Adadelta's two states
HELD_BYTES = 3 * 4 * (ROWS * WIDTH + ROWS * WIDTH)
QUARTER_BYTES = HELD_BYTES // RANKS
# What else a rank has grown by once it has taken large pushes: code, buffers of connections, what malloc keeps.
OVERHEAD_BYTES = 40 << 20
# While steps are taken, beside it: a part of a push and one of an answer, and what is kept of each for the next.
UNDER_WAY_BYTES = QUARTER_BYTES


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_each_rank_holds_a_quarter(tmp_path: Path) -> None:
    """A minute on two quiet cores."""
    with running_ranks(tmp_path, RANKS, "--snapshot-every-s", "3600") as group:
        with group.leader.connect(
            "small"
        ) as session:  # what is loaded for the first model and the first push counts for none
            session.create({"w": np.zeros(50_000, np.float32)})
            session.exchange({"w": np.ones(50_000, np.float32)})
        before = memory(group)
        with group.leader.connect("large") as session:
            session.create(
                {
                    "table": np.zeros((ROWS, WIDTH), np.float32),
                    "flat": np.zeros(ROWS * WIDTH, np.float32),
                }
            )
            gradient = {
                "table": np.ones((ROWS, WIDTH), np.float32),
                "flat": np.ones(ROWS * WIDTH, np.float32),
            }
            for rank in group.ranks:
                forget_peak(rank.process.pid)
            for _ in range(3):
                session.exchange(gradient)
            peaks = [now - then for now, then in zip(memory(group, "VmHWM"), before, strict=True)]

            def grown() -> list[int]:
                return [now - then for now, then in zip(memory(group), before, strict=True)]

            # what is kept for the next push goes when none has come for a while; a part that a call left behind takes a minute
            until_s = time.monotonic() + GATHER_S + 3 * LOOK_S
            while max(at_rest := grown()) > QUARTER_BYTES + OVERHEAD_BYTES and time.monotonic() < until_s:
                time.sleep(LOOK_S)
            held = group.leader.rest("GET", "/v1/shards").json()["models"]
    for name, found in (("at rest", at_rest), ("at most", peaks)):
        shown = ", ".join(f"{own / QUARTER_BYTES:.3f}" for own in found)
        print(f"{name}, in quarters of {HELD_BYTES / 1e6:.0f} MB: {shown}")
    (large,) = [model for model in held if model["name"] == "large"]
    elements = [shard["elements"] for shard in large["shards"]]
    assert max(elements) <= 1.01 * sum(elements) / RANKS
    assert min(at_rest) >= 0.9 * QUARTER_BYTES
    assert max(at_rest) <= QUARTER_BYTES + OVERHEAD_BYTES
    assert max(peaks) <= QUARTER_BYTES + UNDER_WAY_BYTES + OVERHEAD_BYTES


def memory(group: RankGroup, line: str = "VmRSS") -> list[int]:
    return [memory_bytes(rank.process.pid, line) for rank in group.ranks]
