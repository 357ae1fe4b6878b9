"""The night shift's drill: what deploy/README.md says to do, run as it stands there, while workers train."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from pushstep.client import Session
from pushstep.client.commands import app
from pushstep.proto.errors import Fenced, NonfiniteGradient, Quarantined
from tests.support.servers.harness import RunningServer, running_server
from tests.support.servers.operators import take_snapshot
from tests.support.source_tree import ROOT

PAGE = (ROOT / "deploy/README.md").read_text()
SECTION = PAGE[PAGE.index("## A night shift") :]
SECTION = SECTION[: SECTION.index("\n## ", 5)]
START = {"weight": np.linspace(-1, 1, 6, dtype=np.float32)}


class Shift:
    """The commands of the page, in order, each run once."""

    def __init__(self, server: RunningServer, folder: Path) -> None:
        blocks = re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL)
        self._left = [line for block in blocks for line in block.splitlines()]
        self._address = server.http
        self._folder = folder
        self.names: dict[str, str] = {}

    def next(self, part: str) -> Any:
        """Run the next command, which has this in it, and return the JSON that it prints."""
        line = self._left.pop(0)
        assert part in line
        for name, value in self.names.items():
            line = line.replace(name, value)
        line = line.replace("127.0.0.1:7071", self._address)
        command = ["bash", "-ec", line]
        done = subprocess.run(
            command, cwd=self._folder, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, (line, done.stderr)
        return json.loads(done.stdout) if done.stdout.startswith("{") else done.stdout or None

    def is_over(self) -> bool:
        return not self._left


def push(session: Session, fill: float = 1.0) -> int:
    return int(session.push({"weight": np.full(6, fill, np.float32)}).version)


def test_the_drill(data: Path, tmp_path: Path) -> None:
    with running_server(data) as server:
        good, bad, dead = (server.connect("flights", worker) for worker in ("good", "bad", "dead"))
        good.create(START, [{"rule": "adagrad", "params": ["weight"], "lr": 0.1}])
        for session in (good, bad, dead):
            push(session)
        before = take_snapshot(server, "flights")
        then = good.pull()["weight"].tobytes()
        for _ in range(3):
            push(good)
            with pytest.raises(NonfiniteGradient):
                push(bad, np.nan)
        shift = Shift(server, tmp_path)

        # the metrics lead to it: which model, and why
        refused = r'code="(\w+)",model="flights"\} 3(?:\.0)?$'
        codes = re.findall(refused, shift.next("/metrics"), re.MULTILINE)
        assert codes == ["nonfinite_gradient"]
        rejected = shift.next("kind=push_rejected")["events"]
        assert {(event["by"], event["code"]) for event in rejected} == {("bad", codes[0])}
        shift.names["BAD"] = rejected[-1]["by"]
        shown = shift.next("/workers/BAD")
        assert (shown["outcomes"], shown["refused_in_row"]) == ({"applied": 1, "rejected": 3}, 3)

        planned = shift.next("/workers/BAD/quarantine?dry_run=true")
        assert (planned["before"]["quarantined"], planned["after"]["quarantined"]) == (False, True)
        shift.next("/workers/BAD/quarantine")
        with pytest.raises(Quarantined):
            push(bad)

        assert shift.next("/param-groups/0")["lr"] == 0.1
        halved = shift.next("PATCH")
        receipt = good.push({"weight": np.ones(6, np.float32)})
        assert (receipt.version, receipt.effective_lr) == (halved["effective_version"], [0.05])

        taken = shift.next("/snapshots")
        assert taken["version"] == receipt.version
        listed = shift.next("/snapshots?limit=5")["snapshots"]
        assert [snapshot["id"] for snapshot in listed[:2]] == [taken["id"], before["id"]]
        shift.names["ID"] = listed[1]["id"]
        planned = shift.next("/restore?dry_run=true")
        assert planned["after"]["version"] == before["version"]
        restored = shift.next("/restore")
        assert (restored["timeline"], restored["effective_version"]) == (2, before["version"])
        assert server.rest("GET", "/v1/models/flights").json()["version"] == before["version"]

        workers = {worker["name"]: worker for worker in shift.next("/workers")["workers"]}
        assert workers["bad"]["quarantined"]
        assert max(workers.values(), key=lambda worker: worker["last_seen_s"])["name"] == "dead"
        shift.names["DEAD"] = "dead"
        shift.next("DELETE")
        with pytest.raises(Fenced):
            push(dead)

        assert shift.next("/export?state=true") is None
        saved = load_file(tmp_path / "flights.safetensors")
        assert saved["weight"].tobytes() == then
        kinds = [event["kind"] for event in shift.next("/events")["events"] if event["actor"] == "local"]
        assert kinds[-5:] == [
            "worker_quarantined",
            "param_group_changed",
            "snapshot_taken",
            "restored",
            "worker_evicted",
        ]
        assert shift.is_over()
        with pytest.warns(RuntimeWarning, match="restored"):
            push(good)
        assert push(good) > before["version"]


def test_the_drill_by_pushstep(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command of the page's table, in order, does what its step is for."""
    with running_server(data) as server:
        good, bad, _ = (server.connect("flights", worker) for worker in ("good", "bad", "dead"))
        good.create(START, [{"rule": "adagrad", "params": ["weight"], "lr": 0.1}])
        names = {"BAD": "bad", "DEAD": "dead", "ID": take_snapshot(server, "flights")["id"]}
        push(server.sessions[-1])
        with pytest.raises(NonfiniteGradient):
            push(bad, np.nan)
        monkeypatch.setenv("PUSHSTEP_SERVER", server.grpc)
        monkeypatch.setenv("COLUMNS", "240")
        monkeypatch.chdir(tmp_path)
        told = {}
        for step, cell in re.findall(r"^\| (\w+) \| (`.*`) \|$", SECTION, re.MULTILINE):
            for line in re.findall("`pushstep (.*?)`", cell):
                words = [names.get(word, word) for word in line.split()]
                result = CliRunner().invoke(app, words)
                assert result.exit_code == 0, (line, result.output)
                told[step] = told.get(step, "") + result.output
        assert len(told) == 7
        assert "nonfinite_gradient" in told["find"]
        assert "bad" in told["find"]
        assert names["ID"] in told["restore"]
        assert (tmp_path / "flights.safetensors").stat().st_size > 0
        events = server.rest("GET", "/v1/models/flights/events").json()["events"]
        kinds = [event["kind"] for event in events if event["actor"] == "local"]
        assert kinds[1:] == [
            "worker_quarantined",
            "param_group_changed",
            "snapshot_taken",
            "restored",
            "worker_evicted",
        ]
