"""Another durability of a model that lies in several ranks: all keep their parts in that way, whatever dies later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pushstep.server.process.exit_status import ExitStatus
from tests.support.ranks.group import RankGroup, running_ranks

LEVELS = ("applied", "everysec", "durable")


class Trainer:
    """A worker, and what it has been told."""

    def __init__(self, group: RankGroup) -> None:
        self.weight = torch.nn.Parameter(torch.arange(40_000, dtype=torch.float32))
        self._session = group.leader.connect("m", retry_for_s=60.0)
        self._attached = self._session.attach(torch.optim.Adagrad([self.weight], lr=0.1), names=["weight"])

    def step(self) -> tuple[int, str]:
        """The version that a step made, and the level that its receipt names."""
        self.weight.grad = torch.ones_like(self.weight)
        self._attached.step()
        receipt = self._attached.last_receipt
        return receipt.version, str(receipt.durability)

    def bits(self) -> bytes:
        return self.weight.detach().numpy().tobytes()


def set_durability(group: RankGroup, **changes: Any) -> Any:
    return group.leader.rest("PATCH", "/v1/models/m/durability", json=changes)


def durable_version(group: RankGroup) -> int:
    return int(group.leader.rest("GET", "/v1/models/m/durability").json()["durable_version"])


def journals(group: RankGroup) -> list[int]:
    """How many files each rank's journal has."""
    return [
        len(list(group.data.glob(f"rank-{rank}/models/m/journal/*.journal"))) for rank in range(group.world)
    ]


@pytest.mark.parametrize(("before", "after"), [(a, b) for a in LEVELS for b in LEVELS if a != b])
def test_another_level_holds_in_all_ranks(before: str, after: str, tmp_path: Path) -> None:
    with running_ranks(tmp_path, 3, "--durability", before, "--snapshot-every-s", "600") as group:
        trainer = Trainer(group)
        assert [trainer.step(), trainer.step()] == [(1, before), (2, before)]
        answer = set_durability(group, level=after)
        assert (answer.status_code, answer.json()["level"]) == (200, after), answer.text
        assert [trainer.step(), trainer.step()] == [(3, after), (4, after)]
        seen = trainer.bits()
        assert group.kill(1) == [ExitStatus.RANK_LOST] * 2
        group.start()
        shown = group.leader.rest("GET", "/v1/models/m").json()
        if after == "applied":  # a journal that is left from before leads no further than its end
            assert shown["version"] in (0, 2)
            return
        assert (shown["version"], shown["timeline"]) == (4, 1)
        assert group.leader.rest("GET", "/v1/models/m/durability").json()["level"] == after
        assert all(count >= 1 for count in journals(group))
        assert trainer.step() == (5, after)  # by itself, over the new connections
        again = Trainer(group)
        assert again.bits() == trainer.bits() != seen


def test_settings_beside_the_level_hold_in_all_ranks(tmp_path: Path) -> None:
    with running_ranks(tmp_path, 2, "--durability", "durable") as group:
        trainer = Trainer(group)
        assert set_durability(group, keep=1, snapshot_every_s=600.0).status_code == 200
        for _ in range(3):
            trainer.step()
            assert set_durability(group, level="applied").status_code == 200
            assert set_durability(group, level="durable").status_code == 200  # with an automatic snapshot
        kept = [len(list(tmp_path.glob(f"rank-{rank}/models/m/snapshots/*"))) for rank in range(2)]
        assert kept[0] == kept[1] <= 2, kept
        assert durable_version(group) == 3


def test_a_rank_whose_disk_takes_no_journal_keeps_the_old_level_in_force(tmp_path: Path) -> None:
    """The answer names the problem; pushes go on as before, in all ranks."""
    with running_ranks(tmp_path, 2, "--durability", "applied", "--snapshot-every-s", "600") as group:
        trainer = Trainer(group)
        trainer.step()
        folder = tmp_path / "rank-1" / "models" / "m" / "journal"
        if folder.exists():
            folder.rmdir()
        folder.write_bytes(b"in the way")
        answer = set_durability(group, level="durable")
        assert answer.json()["code"] == "storage_failed", answer.text
        assert trainer.step() == (2, "applied")
        folder.unlink()
        assert set_durability(group, level="durable").status_code == 200
        assert trainer.step() == (3, "durable")
