"""A rank is killed at each named point of the ranks' snapshots: all go on at one version, bit for bit.

Every rank writes its part first; then rank 0 writes its own and its manifest, which decides; only then do older ones go. So at
`applied` the newest snapshot of rank 0 is in force after a crash, and at `durable` the last push that was acknowledged.
One folder goes through all points of a level. Most snapshots are links: of the table, the rows that changed.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pushstep.client import connect
from pushstep.optim import Adagrad
from pushstep.proto.errors import NoAnswer
from pushstep.server.process.exit_status import ExitStatus
from tests.support.ranks import faulty_rank
from tests.support.ranks.faulty_rank import MESSAGES
from tests.support.ranks.group import RankGroup
from tests.system.test_crash_points import PLACES

FAULTY = Path(faulty_rank.__file__)
RANKS = 2
ROWS, WIDTH, ELEMENTS = 3000, 16, 5000
# both ranks have rows of the table
START = {"table": np.zeros((ROWS, WIDTH), np.float32), "flat": np.zeros(ELEMENTS, np.float32)}
GROUPS = [{"rule": "adagrad", "params": ["table", "flat"], "lr": 0.1}]
BEFORE = 3
STRIKES_S = 60.0
OF_SNAPSHOTS = (
    "a snapshot's folder",
    "an arena",
    "a manifest",
    "a snapshot's names",
    "a snapshot's name",
    "the names of snapshots",
    "an old snapshot",
    "a link's rows",
    "the mark of a hidden base",
)
# in both ranks; what a start does is killed at once, and the group then started again
CALLS = {
    **{f"before {name}": (PLACES[name], "kill") for name in OF_SNAPSHOTS},
    **{f"after {name}": (PLACES[name], "kill-after") for name in OF_SNAPSHOTS},
    "before a slice of an arena": ("pwrite:arena-0000.safetensors", "kill"),
    "while a snapshot is loaded": ("readv:!arena-0000.safetensors", "kill"),
    "before the identity of a start": ("replace:!m/identity.json", "kill"),
    "after the identity of a start": ("replace:!m/identity.json", "kill-after"),
}
ORDERS_OF_0 = ("snapshot ordered", "answer taken", "pruning ordered")
POINTS = {
    **{f"rank {rank} {name}": (rank, *how) for rank in range(RANKS) for name, how in CALLS.items()},
    **{
        f"rank {int(name not in ORDERS_OF_0)} {when} {name}": (
            int(name not in ORDERS_OF_0),
            f"message:{name}",
            deed,
        )
        for name in MESSAGES
        for when, deed in (("before", "kill"), ("after", "kill-after"))
    },
}
# by level; all others in `make soak`
SOME = {
    "applied": (
        "rank 1 before the names of snapshots",
        "rank 0 before a snapshot's name",
        "rank 0 after a snapshot's name",
        "rank 1 after an old snapshot",
    ),
    "durable": ("rank 1 after snapshot answered", "rank 0 after the identity of a start"),
}


def gradient(number: int) -> dict[str, Any]:
    """Of the vector, and of a row of each rank."""
    drawn = np.random.default_rng(number)
    ids = np.array([number % (ROWS // 3), ROWS - 1 - number % (ROWS // 3)])
    return {
        "flat": drawn.standard_normal(ELEMENTS, dtype=np.float32),
        "table": (ids, drawn.standard_normal((2, WIDTH), dtype=np.float32)),
    }


class Local:
    """What the gradients make of the same model here, at each version."""

    def __init__(self) -> None:
        self.gradients: list[int] = []
        self._anew()

    def _anew(self) -> None:
        self._parameters = [torch.zeros(ELEMENTS), torch.zeros(ROWS, WIDTH)]
        self._optimizer = Adagrad(self._parameters, lr=0.1)
        for number in self.gradients:
            self._step(number)

    def _step(self, number: int) -> None:
        given = gradient(number)
        ids, rows = map(torch.from_numpy, given["table"])
        self._parameters[0].grad = torch.from_numpy(given["flat"])
        self._parameters[1].grad = torch.sparse_coo_tensor(
            ids[None], rows, (ROWS, WIDTH), check_invariants=True
        )
        self._optimizer.step()

    def step(self, number: int) -> None:
        """Take one more step."""
        self.gradients.append(number)
        self._step(number)

    def go_back(self, version: int) -> None:
        """To what it was then."""
        if version < len(self.gradients):
            del self.gradients[version:]
            self._anew()

    def bits(self) -> dict[tuple[str, str], bytes]:
        """Parameters and state."""
        found = {}
        for name, parameter in zip(("flat", "table"), self._parameters, strict=True):
            state = self._optimizer.state[parameter]
            found[name, ""] = parameter.detach().numpy().tobytes()
            found[name, "sum"] = state["sum"].numpy().tobytes()
        return found


class Run:
    """A group that is killed at one point after the other, and a worker that begins anew each time."""

    def __init__(self, data: Path, level: str) -> None:
        self.data = data
        self.level = level
        self.group = RankGroup(data, RANKS, "--durability", level, "--snapshot-every-s", "0.1")
        self.local = Local()
        self.acknowledged = 0
        self._pushes = 0
        with self._session() as session:
            session.create(START, GROUPS)
            self._push(session)

    def _session(self) -> Any:
        return connect(
            self.group.leader.grpc,
            model="m",
            worker="w0",
            retry_for_s=0.5,
            timeout_s=20.0,
            shared_memory=False,
        )

    def _push(self, session: Any) -> None:
        self._pushes += 1
        self.local.step(self._pushes)
        receipt = session.push(gradient(self._pushes))
        assert receipt.version == len(self.local.gradients)
        self.acknowledged = receipt.version

    def at(self, rank: int, calls: str, deed: str) -> None:
        """Kill a rank at a point, and start all again."""
        self.kill()
        self._settle()
        command = {rank: (sys.executable, FAULTY, calls, deed)}
        if ":!" in calls:
            with pytest.raises(ExceptionGroup, match="not all ranks"):
                self.group.start(command)
            self.group.start()
            self.go_on()
            return
        self.group.start(command)
        session = self._session()
        self.go_on(session)
        armed = self.data / "armed"
        armed.touch()
        until_s = time.monotonic() + STRIKES_S
        while self.group.ranks[rank].process.poll() is None:
            assert time.monotonic() < until_s, "it is not struck"
            try:
                self._push(session)
            except NoAnswer:
                break
        assert self.group.ranks[rank].process.wait(STRIKES_S) == -signal.SIGKILL
        assert self.group.ended(rank) == [ExitStatus.RANK_LOST] * (RANKS - 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # it could not leave
            session.close()
        armed.unlink()

    def kill(self) -> None:
        """SIGKILL to all that run."""
        for rank in self.group.ranks:
            rank.kill()

    def _settle(self) -> None:
        """What the next start has to come to, from what is on the disks."""
        newest = self._newest(0)
        for part in newest.get("ranks", ()):
            assert (self._snapshots(part["rank"]) / part["snapshot"]).is_dir(), newest["id"]
        if self.level == "applied":
            self.local.go_back(newest["version"])
            self.acknowledged = newest["version"]

    def _snapshots(self, rank: int) -> Path:
        return self.data / f"rank-{rank}" / "models" / "m" / "snapshots"

    def _newest(self, rank: int) -> Mapping[str, Any]:
        named = [path for path in self._snapshots(rank).iterdir() if re.fullmatch(r"t\d+-v.*", path.name)]
        found: list[dict[str, Any]] = [json.loads((path / "manifest.json").read_text()) for path in named]
        return max(found, key=lambda manifest: (manifest["timeline"], manifest["version"]))

    def go_on(self, session: Any = None) -> None:
        """All ranks are at the one version that counts, and train on from there."""
        own = session or self._session()
        state = own.pull_state()
        # at `durable` a push that nobody was told of may count, or not
        assert state.header.version >= self.acknowledged
        assert state.header.version <= len(self.local.gradients)
        self.local.go_back(state.header.version)
        found = {(slot.name, kind): values.numpy().tobytes() for slot, kind, values in state.dense()}
        assert found == self.local.bits()
        own.create(START, GROUPS)
        for _ in range(BEFORE):
            self._push(own)
        if session is None:
            own.close()

    def end(self) -> None:
        """It ends in order, and has lost nothing."""
        self.kill()
        self._settle()
        self.group.start()
        self.go_on()
        assert self.group.stop() == [0] * RANKS
        self.group.start()
        self.go_on()
        assert self.group.stop() == [0] * RANKS


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.soak)])
@pytest.mark.parametrize("level", SOME)
def test_all_ranks_go_on_at_one_version_wherever_one_is_killed(
    tmp_path: Path, level: str, all_of_them: bool
) -> None:
    """All of them: 5 minutes for both levels on two cores that others use, too."""
    run = Run(tmp_path, level)
    try:
        for name in POINTS if all_of_them else SOME[level]:
            try:
                run.at(*POINTS[name])
            except BaseException as problem:
                problem.add_note(f"{name}\n{run.group.logs()}")
                raise
        run.end()
    finally:
        run.kill()
