"""The night shift's drill: what docs/operators.md says to do, with both of its tools, while workers train."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from pushstep.client import Session
from pushstep.client.commands import app
from pushstep.proto.errors import Fenced, NonfiniteGradient, Quarantined
from tests.support.access.secured import Authority, TokenFile
from tests.support.servers.harness import RunningServer, running_server
from tests.support.servers.operators import take_snapshot
from tests.support.source_tree import ROOT

PAGE = (ROOT / "docs/operators.md").read_text()
PUSHSTEP = Path(sys.executable).with_name("pushstep")
START = {"weight": np.linspace(-1, 1, 6, dtype=np.float32)}


class Shift:
    """The commands of the page with one of its two tools, in order, each run once."""

    def __init__(self, server: RunningServer, folder: Path, model: str, tool: str) -> None:
        section = PAGE[PAGE.index("## A night shift") :]
        section = section[: section.index("\n## ", 5)]
        blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
        self._left = [line for block in blocks if block.startswith(tool) for line in block.splitlines()]
        self._server = server
        self._folder = folder
        self._model = model

    def next(self, part: str) -> Any:
        """Run the next command, which has this in it, and return the JSON that curl prints, or the text."""
        line = self._left.pop(0)
        assert part in line
        line = re.sub(r"\bnight\b", self._model, line.replace("localhost:7071", self._server.http))
        if line.startswith("pushstep "):
            return self._run_here(shlex.split(line))
        command = ["bash", "-ec", line]
        done = subprocess.run(
            command, cwd=self._folder, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, (line, done.stderr)
        return json.loads(done.stdout) if done.stdout.startswith("{") else done.stdout or None

    def _run_here(self, words: list[str]) -> str:
        """A `pushstep` command, without a process of its own."""
        words = [(self._folder / "id").read_text().strip() if word == "$(cat id)" else word for word in words]
        result = CliRunner().invoke(app, words[1:], env={"PUSHSTEP_SERVER": self._server.grpc})
        assert result.exit_code == 0, (words, result.output)
        return result.output

    def is_over(self) -> bool:
        return not self._left


def push(session: Session, fill: float = 1.0) -> int:
    return int(session.push({"weight": np.full(6, fill, np.float32)}).version)


class Training:
    """A model with a good, a bad and a dead worker, as the page has it."""

    def __init__(self, server: RunningServer, model: str) -> None:
        self.server, self.model = server, model
        self.good, self.bad, self.dead = (server.connect(model, worker) for worker in ("good", "bad", "dead"))
        self.good.create(START, [{"rule": "adagrad", "params": ["weight"], "lr": 0.1}])
        for session in (self.good, self.bad, self.dead):
            push(session)
        self.before = take_snapshot(server, model)
        self.then = self.good.pull()["weight"].tobytes()
        for _ in range(3):
            push(self.good)
            with pytest.raises(NonfiniteGradient):
                push(self.bad, np.nan)

    def rest(self, path: str = "") -> Any:
        return self.server.rest("GET", f"/v1/models/{self.model}{path}").json()

    def check_steps(self) -> None:
        """What each step of the drill has brought about."""
        assert self.rest()["timeline"] == 2
        assert self.rest()["version"] == self.before["version"]
        workers = {worker["name"]: worker for worker in self.rest("/workers")["workers"]}
        assert workers["bad"]["quarantined"]
        with pytest.raises(Fenced):
            push(self.dead)
        kinds = [event["kind"] for event in self.rest("/events")["events"] if event["actor"] == "local"]
        assert kinds[-5:] == [
            "worker_quarantined",
            "param_group_changed",
            "snapshot_taken",
            "restored",
            "worker_evicted",
        ]
        with pytest.warns(RuntimeWarning, match="restored"):
            push(self.good)
        assert push(self.good) > self.before["version"]


def test_the_drill_begins_on_a_server_with_tokens_and_tls(data: Path, tmp_path: Path) -> None:
    """What the page says to do first there has both tools let in, and believe the server."""
    secrets = tmp_path / "secrets"
    authority = Authority(secrets)
    tokens = TokenFile(secrets / "tokens")
    (secrets / "operator.token").write_text(tokens.tokens["operator"] + "\n")
    [first] = re.findall(r'```bash needs="certificates"\n(cd secrets\n.*?)```', PAGE, re.DOTALL)
    with running_server(data, *authority.server_options(), *tokens.options()) as server:
        asked = f"curl -fsS {server.http}/v1/models\necho\n{PUSHSTEP} models --json\n"
        done = subprocess.run(
            ["bash", "-ec", first.replace("localhost:7070", server.grpc) + asked],
            cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path), "no_proxy": "*"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert [json.loads(line)["models"] for line in done.stdout.splitlines()] == [[], []]
    assert stat.S_IMODE((secrets / ".curlrc").stat().st_mode) == 0o600


def test_the_drill_by_curl(server: RunningServer, model_name: str, tmp_path: Path) -> None:
    training = Training(server, model_name)
    shift = Shift(server, tmp_path, model_name, "curl")

    # the metrics lead to it: which model, and why
    refused = rf'code="(\w+)",model="{model_name}"\}} 3(?:\.0)?$'
    codes = re.findall(refused, shift.next("/metrics"), re.MULTILINE)
    assert codes == ["nonfinite_gradient"]
    rejected = shift.next("kind=push_rejected")["events"]
    assert {(event["by"], event["code"]) for event in rejected} == {("bad", codes[0])}
    shown = shift.next("/workers/bad")
    assert (shown["outcomes"], shown["refused_in_row"]) == ({"applied": 1, "rejected": 3}, 3)

    planned = shift.next("/workers/bad/quarantine?dry_run=true")
    assert (planned["before"]["quarantined"], planned["after"]["quarantined"]) == (False, True)
    shift.next("/workers/bad/quarantine")
    with pytest.raises(Quarantined):
        push(training.bad)

    assert shift.next("/param-groups/0")["lr"] == 0.1
    halved = shift.next("PATCH")
    receipt = training.good.push({"weight": np.ones(6, np.float32)})
    assert (receipt.version, receipt.effective_lr) == (halved["effective_version"], [0.05])

    taken = shift.next("/snapshots")
    assert taken["version"] == receipt.version
    listed = shift.next("/snapshots?limit=5")["snapshots"]
    assert [snapshot["id"] for snapshot in listed[:2]] == [taken["id"], training.before["id"]]
    assert shift.next("> id") is None
    assert (tmp_path / "id").read_text().strip() == training.before["id"]
    planned = shift.next("/restore?dry_run=true")
    assert planned["after"]["version"] == training.before["version"]
    restored = shift.next("/restore")
    assert (restored["timeline"], restored["effective_version"]) == (2, training.before["version"])

    workers = shift.next("/workers")["workers"]
    assert {worker["name"] for worker in workers} == {"good", "bad", "dead"}
    shift.next("/workers/dead")

    assert shift.next("/export?state=true") is None
    assert load_file(tmp_path / f"{model_name}.safetensors")["weight"].tobytes() == training.then
    assert shift.next("/events")["events"]
    assert shift.is_over()
    training.check_steps()


def test_the_drill_by_the_command(
    server: RunningServer, model_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(server, model_name)
    shift = Shift(server, tmp_path, model_name, "pushstep")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    assert "nonfinite_gradient" in shift.next("--kind push_rejected")
    assert "bad" in shift.next("workers")

    shift.next("--quarantine bad --dry-run")
    assert not training.rest("/workers/bad")["quarantined"]
    shift.next("--quarantine bad --yes")
    with pytest.raises(Quarantined):
        push(training.bad)

    shift.next("--set lr=0.05")
    assert training.good.push({"weight": np.ones(6, np.float32)}).effective_lr == [0.05]

    shift.next("--take")
    assert training.before["id"] in shift.next("snapshots")
    (tmp_path / "id").write_text(training.before["id"] + "\n")
    shift.next("--restore")
    assert training.rest()["timeline"] == 1
    shift.next("--restore")
    shift.next("--evict dead --yes")

    shift.next("export")
    assert load_file(tmp_path / f"{model_name}.safetensors")["weight"].tobytes() == training.then
    assert "worker_evicted" in shift.next("events")
    assert shift.is_over()
    training.check_steps()
