"""A rank whose disk takes no snapshots: the others keep what they need and no more, and all go on once it is well."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.ranks import faulty_rank
from tests.support.ranks.group import RankGroup
from tests.support.servers.harness import wait_until

FAULTY = Path(faulty_rank.__file__)
RANKS = 3
ELEMENTS = 40_000
# two automatic ones that are kept, the one that rank 0 has not committed, and one that is being written
MOST = 4
FAILURES = 8


def failures(group: RankGroup) -> int:
    return group.leader.log.read_text().count("its snapshot failed")


def snapshots(group: RankGroup, rank: int) -> list[str]:
    """Their folders, also those that are being written or removed."""
    folder = group.data / f"rank-{rank}" / "models" / "m" / "snapshots"
    return [path.name for path in folder.iterdir() if path.is_dir()]


@pytest.mark.parametrize("rank", [0, 2])
def test_snapshots_that_one_rank_cannot_write_do_not_fill_the_others_disks(tmp_path: Path, rank: int) -> None:
    group = RankGroup(tmp_path, RANKS, "--snapshot-every-s", "0.1")
    try:
        for each in group.ranks:
            each.kill()
        group.start({rank: (sys.executable, FAULTY, "fsync:manifest.json", "ENOSPC")})
        armed, gradient = tmp_path / "armed", {"w": np.ones(ELEMENTS, np.float32)}
        with group.leader.connect("m") as session:
            session.create({"w": np.zeros(ELEMENTS, np.float32)})
            armed.touch()
            while failures(group) < FAILURES:
                session.push(gradient)
            for other in range(RANKS):
                wait_until(lambda other=other: len(snapshots(group, other)) <= MOST)
            version = session.push(gradient).version
            armed.unlink()

            def is_saved() -> bool:
                taken: list[dict[str, Any]] = group.leader.rest("GET", "/v1/models/m/snapshots").json()[
                    "snapshots"
                ]
                return max(snapshot["version"] for snapshot in taken) >= version

            wait_until(is_saved)
            values = session.pull()["w"].tobytes()
        for each in group.ranks:
            each.kill()
        group.start()
        with group.leader.connect("m", "reader") as session:
            assert session.pull()["w"].tobytes() == values
        assert group.stop() == [0] * RANKS
    finally:
        for each in group.ranks:
            each.kill()
