"""The commands that show and steer a server: their text, their JSON, and what a refusal looks like."""

from __future__ import annotations

import json
import os
import pty
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from pushstep.client.commands import app
from pushstep.client.commands.door import pairs, plain
from pushstep.client.commands.operate.screen import MODELS, WORKERS, fitting, screen
from pushstep.client.commands.operate.top import Rates
from tests.support.processes.forked import workers
from tests.support.servers.harness import RunningServer, start_server
from tests.support.terminals.command import COMMAND
from tests.support.terminals.terminal import read_some, read_until

HYPERPARAMETERS = {"rule": "adagrad", "params": ["w"], "lr": 0.5}


@pytest.fixture
def run(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """A command line for the server, which the environment names."""
    monkeypatch.setenv("PUSHSTEP_SERVER", server.grpc)
    monkeypatch.setenv("COLUMNS", "240")
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.fixture
def model(server: RunningServer, model_name: str) -> Iterator[str]:
    """A model with a worker and three steps."""
    session = server.connect(model_name)
    session.create({"w": np.zeros(4, np.float32)}, [HYPERPARAMETERS])
    for _ in range(3):
        session.push({"w": np.ones(4, np.float32)})
    yield model_name


def done(result: Result) -> str:
    assert (result.exit_code, result.stderr) == (0, ""), result.stderr
    return result.stdout


# what is shown: command line, words of the text, key of the JSON
SHOWN: dict[str, tuple[list[str], list[str], str]] = {
    "models": (["models"], ["MODEL", "async"], "models"),
    "one model": (["models", "MODEL"], ["version", "3"], "uid"),
    "groups": (["groups", "MODEL"], ["adagrad", "lr=0.5"], "param_groups"),
    "one group": (["groups", "MODEL", "0"], ["adagrad"], "rule"),
    "hooks": (["hooks", "MODEL"], ["hook"], "hooks"),
    "the catalogue": (["hooks", "MODEL", "--catalogue"], ["clip_grad_norm", "step_pre"], "hooks"),
    "policy": (["policy", "MODEL"], ["async"], "policy"),
    "gate": (["gate", "MODEL"], ["nonfinite", "reject"], "nonfinite"),
    "durability": (["durability", "MODEL"], ["applied"], "level"),
    "workers": (["workers", "MODEL"], ["w0", "live, lead"], "workers"),
    "snapshots": (["snapshots", "MODEL"], ["the server"], "snapshots"),
    "events": (["events", "MODEL"], ["created"], "events"),
    "capacity": (["capacity"], ["bytes"], "bytes"),
    "capacity for a model": (["capacity", "MODEL", "--push-every-s", "1"], ["workers"], "rates"),
    "top": (["top", "--looks", "1"], ["MODEL", "live workers"], "models"),
    "top of a model": (["top", "MODEL", "--looks", "1"], ["w0"], "workers"),
}


@pytest.mark.parametrize("case", SHOWN)
def test_what_is_shown(run: Callable[..., Result], model: str, case: str) -> None:
    line, words, key = SHOWN[case]
    line = [model if word == "MODEL" else word for word in line]
    text = done(run(*line))
    for word in words:
        assert (model if word == "MODEL" else word) in text, text
    assert "{" not in text and "[" not in text, text
    as_json = done(run(*line, "--json"))
    assert as_json.count("\n") == 1 and key in json.loads(as_json)


# what is done: command line, words of the text, and the place and value that REST then shows
DONE: dict[str, tuple[list[str], str, tuple[str, Callable[[Any], bool]]]] = {
    "an lr": (
        ["groups", "MODEL", "0", "--set", "lr=0.25"],
        "from version 4 on",
        ("param-groups/0", lambda group: group["lr"] == 0.25 and group["held"] == ["lr"]),
    ),
    "an lr that is not held": (
        ["groups", "MODEL", "0", "--set", "lr=0.25", "--no-hold"],
        "lr=0.25",
        ("param-groups/0", lambda group: group["lr"] == 0.25 and group["held"] == []),
    ),
    "frozen": (
        ["groups", "MODEL", "0", "--freeze"],
        "frozen=True",
        ("param-groups/0", lambda group: group["frozen"]),
    ),
    "a hook": (
        ["hooks", "MODEL", "--add", "clip_grad_norm", "--set", "max_norm=1.5"],
        "clip_grad_norm-1 was added",
        ("hooks", lambda shown: shown["hooks"][0]["settings"]["max_norm"] == 1.5),
    ),
    "a policy": (
        ["policy", "MODEL", "--set", "policy=sync", "--set", "min_workers=1"],
        "policy of",
        ("policy", lambda policy: policy["policy"] == "sync"),
    ),
    "the gate": (
        ["gate", "MODEL", "--set", "nonfinite=skip"],
        "gate of",
        ("gate", lambda gate: gate["nonfinite"] == "skip"),
    ),
    "durability": (
        ["durability", "MODEL", "--set", "keep=5"],
        "durability of",
        ("durability", lambda kept: kept["keep"] == 5),
    ),
    "a quarantine": (
        ["workers", "MODEL", "--quarantine", "w0"],
        "quarantine",
        ("workers/w0", lambda worker: worker["quarantined"]),
    ),
    "an eviction": (
        ["workers", "MODEL", "--evict", "w0", "--yes"],
        "was evicted",
        ("workers/w0", lambda worker: worker["state"] == "evicted"),
    ),
    "a snapshot": (
        ["snapshots", "MODEL", "--take"],
        "at version 3",
        ("snapshots", lambda shown: shown["snapshots"][0]["version"] == 3),
    ),
}


@pytest.mark.parametrize("case", DONE)
def test_what_is_done_and_what_would_be(
    server: RunningServer, run: Callable[..., Result], model: str, case: str
) -> None:
    line, words, (place, holds) = DONE[case]
    line = [model if word == "MODEL" else word for word in line]
    look = lambda: server.rest("GET", f"/v1/models/{model}/{place}").json()  # noqa: E731
    before = look()
    said = done(run(*line, "--dry-run"))
    assert "nothing was changed" in said and "{" not in said
    assert json.loads(done(run(*line, "--dry-run", "--json")))["dry_run"] is True
    assert {**look(), "last_seen_s": 0, "lease_left_s": 0} == {**before, "last_seen_s": 0, "lease_left_s": 0}
    assert words in done(run(*line))
    assert holds(look())


def test_a_dry_run_shows_what_would_change_and_nothing_else(run: Callable[..., Result], model: str) -> None:
    line = ["groups", model, "0", "--set", "lr=0.25", "--dry-run"]
    rows = [row.split() for row in done(run(*line)).splitlines() if row.strip()]
    assert [row for row in rows if row[0] == "lr"] == [["lr", "0.5", "0.25"]]
    assert "rule" not in [row[0] for row in rows]
    assert " ".join(rows[-1]).endswith("it would hold from version 4 on")
    same = done(run("policy", model, "--set", "policy=async", "--dry-run"))
    assert same == "nothing was changed: this was a dry run; it would hold from version 4 on\n"


def test_a_hook_is_changed_and_removed(run: Callable[..., Result], model: str) -> None:
    made = json.loads(done(run("hooks", model, "--add", "clip_grad_norm", "--set", "max_norm=1", "--json")))
    assert "was changed" in done(run("hooks", model, "--change", made["id"], "--set", "max_norm=2"))
    (shown,) = json.loads(done(run("hooks", model, "--json")))["hooks"]
    assert shown["settings"]["max_norm"] == 2.0
    assert "was removed" in done(run("hooks", model, "--remove", made["id"]))


def test_a_snapshot_is_restored_and_deleted_and_a_model_too(
    server: RunningServer, run: Callable[..., Result], model: str
) -> None:
    kept = json.loads(done(run("snapshots", model, "--take", "--json")))["id"]
    assert kept in done(run("snapshots", model))
    assert "is what" in done(run("snapshots", model, "--restore", kept, "--yes"))
    assert server.rest("GET", f"/v1/models/{model}").json()["timeline"] == 2
    assert "was deleted" in done(run("snapshots", model, "--delete", kept, "--yes"))
    assert "was deleted" in done(run("models", model, "--delete", "--yes"))
    assert server.rest("GET", f"/v1/models/{model}").status_code == 404


REFUSED: dict[str, tuple[list[str], int, str]] = {
    "no such model": (["groups", "nobody"], 1, "no model is named 'nobody'"),
    "no such group": (["groups", "MODEL", "9", "--set", "lr=1"], 1, "9"),
    "a value out of range": (["groups", "MODEL", "0", "--set", "lr=-1"], 1, "learning rate"),
    "no pair": (["groups", "MODEL", "0", "--set", "lr"], 2, "is not NAME=VALUE"),
    "which group": (["groups", "MODEL", "--set", "lr=1"], 2, "which group?"),
    "no such hook": (["hooks", "MODEL", "--add", "nothing"], 1, "no hook 'nothing'"),
    "settings of nothing": (["hooks", "MODEL", "--set", "a=1"], 2, "of which hook?"),
    "two deeds": (["hooks", "MODEL", "--remove", "a", "--catalogue"], 2, "give only one of"),
    "two deeds with a worker": (
        ["workers", "MODEL", "--evict", "a", "--release", "b"],
        2,
        "give only one of",
    ),
    "no such worker": (["workers", "MODEL", "--quarantine", "w9"], 1, "w9"),
    "nobody to ask": (["models", "MODEL", "--delete"], 2, "pass --yes"),
    "nobody to ask about a restore": (["snapshots", "MODEL", "--restore", "x"], 2, "pass --yes"),
    "no such snapshot": (["snapshots", "MODEL", "--restore", "t1-v1-e1-1", "--yes"], 1, "t1-v1-e1-1"),
    "which model": (["models", "--delete", "--yes"], 2, "which model?"),
    "no such setting": (["policy", "MODEL", "--set", "pace=1"], 1, "pace"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(run: Callable[..., Result], model: str, case: str) -> None:
    line, status, words = REFUSED[case]
    result = run(*[model if word == "MODEL" else word for word in line])
    assert (result.exit_code, result.stdout) == (status, "")
    assert words in " ".join(result.stderr.replace("│", " ").split()), result.stderr


def test_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["models", "--server", "127.0.0.1:1"])
    assert (result.exit_code, result.stdout) == (3, "")
    assert "no pushstep server answers at 127.0.0.1:1" in result.stderr


def test_events_are_followed_as_they_come(server: RunningServer, model: str) -> None:
    command = ["events", model, "--follow", "--json", "--server", server.grpc]
    ours, theirs = os.pipe()
    follower = workers().start(COMMAND, command, theirs)
    os.close(theirs)
    with open(ours) as said:
        kinds = [json.loads(said.readline())["kind"]]  # of what was before: it is there now
        server.rest("PATCH", f"/v1/models/{model}/param-groups/0", json={"lr": 0.125})
        server.rest("DELETE", f"/v1/models/{model}")  # which ends the stream
        kinds += [json.loads(line).get("kind") for line in said]
    assert follower.wait(60) == 0
    assert kinds[0] == "created" and "param_group_changed" in kinds


def test_a_list_of_several_pages_is_whole(
    run: Callable[..., Result], server: RunningServer, model: str
) -> None:
    for _ in range(3):
        server.rest("POST", f"/v1/models/{model}/snapshots")
    from pushstep.client.commands.door import Door
    from pushstep.client.transport.security import Security

    door = Door(server.grpc, Security(server.grpc), as_json=True)
    paged = door.all_of(f"/v1/models/{model}/snapshots", "snapshots", limit=2)
    assert len(paged["snapshots"]) >= 4 and paged["next"] is None


def test_what_a_name_holds_does_not_act_on_a_terminal() -> None:
    assert plain("a\x1b[31mb\nc") == "a\\x1b[31mb\\nc"
    assert plain({"a": "\x07"}) == '{"a": "\\u0007"}'
    assert (plain(None), plain(True), plain(0.1234567891)) == ("-", "yes", "0.123457")
    assert (plain([]), plain(["lr", "eps\x07"]), plain([{"a": 1}])) == ("-", "lr, eps\\x07", '[{"a": 1}]')


def test_pairs_are_json_or_text() -> None:
    assert pairs(["lr=0.5", "policy=sync", "on=true", 'text="1"', "a=b=c"]) == {
        "lr": 0.5,
        "policy": "sync",
        "on": True,
        "text": "1",
        "a": "b=c",
    }


def test_rates_are_of_two_looks_on_one_timeline() -> None:
    rates = Rates()
    assert rates.of("m", 10, 0.0) is None
    assert rates.of("m", 30, 2.0) == 10.0
    assert rates.of("m", 5, 3.0) is None


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_screen_is_as_wide_as_the_terminal(server: RunningServer, model: str, width: int) -> None:
    """No line is wider or broken, the names are whole, and the wider the more columns."""
    found = {
        "models": [{**server.rest("GET", f"/v1/models/{model}").json(), "versions_per_s": 12.0}],
        "workers": server.rest("GET", f"/v1/models/{model}/workers").json()["workers"],
    }
    console = Console(width=width, height=24)
    with console.capture() as captured:
        console.print(screen(found, "127.0.0.1:7070", width, 24))
    lines = captured.get().splitlines()
    assert len(lines) < 15 and max(map(len, lines)) <= width
    assert "12.0 versions/s" in lines[0] or width == 60
    assert any(line.split()[:1] == [model] for line in lines), lines
    assert any(line.split()[:1] == ["w0"] for line in lines), lines
    assert width == 80 or ("gradient norm" in captured.get()) == (width >= 120)


def test_the_columns_that_matter_stay() -> None:
    for columns in (MODELS, WORKERS):
        kept = fitting(columns, [["x" * 30] * len(columns)], 10)
        assert {columns[n].goes for n in kept} == {0}
        assert fitting(columns, [["x"] * len(columns)], 1000) == list(range(len(columns)))


def test_top_goes_on_when_the_server_comes_again(tmp_path: Path) -> None:
    """In a terminal: what was seen last stays, with the reason beside it."""
    server = start_server(tmp_path)
    server.connect("kept").create({"w": np.zeros(4, np.float32)})
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "30"}
    command = ["top", "--server", server.grpc, "--every-s", "0.1"]
    with open(os.devnull, "w") as nothing:
        process = workers().start(COMMAND, command, theirs, nothing.fileno(), environment=environment)
    os.close(theirs)
    try:
        read_until(ours, "kept")
        server.stop()
        read_until(ours, "no pushstep server answers")
        again = start_server(tmp_path, "--grpc", server.grpc)
        again.connect("another").create({"w": np.zeros(4, np.float32)})
        read_until(ours, "another")
        process.send_signal(signal.SIGINT)
        while read_some(ours):
            pass
    except BaseException:
        process.kill()  # it waits for somebody to read
        raise
    os.close(ours)
    assert process.wait(60) == 0
    assert again.stop() == 0
