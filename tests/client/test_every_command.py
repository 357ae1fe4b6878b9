"""One table of all commands: each one's text, its JSON and its failure; and what a failure says to do."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from pushstep.client.commands import app
from pushstep.server.access.roles import Role
from tests.support.access.secured import Authority, TokenFile
from tests.support.processes.forked import workers
from tests.support.servers.harness import RunningServer, running_server, start_server
from tests.support.terminals.command import COMMAND
from tests.support.terminals.terminal import read_some

PUSHSTEP = Path(sys.executable).with_name("pushstep")
NOBODY = "127.0.0.1:1"


class Row(NamedTuple):
    """A command line that does its work, a word of its text, a key of its JSON; and one that fails, its status and words."""

    line: list[str]
    said: str
    key: str
    failing: list[str]
    status: int
    why: str


# MODEL, GONE (a model that is none), OUT and FILE (files), DATA (the folder of a server that was stopped)
COMMANDS = {
    "bench": Row(
        ["--sizes", "10", "--seconds", "0.01"], "times torch", "sizes", ["--sizes", "many"], 2, "is no size"
    ),
    "capacity": Row([], "bytes", "bytes", ["GONE"], 1, "`pushstep models` lists them"),
    "check": Row(["DATA"], "a start continues", "models", ["MISSING"], 2, "no data folder"),
    "durability": Row(["MODEL"], "level", "level", ["MODEL", "--set", "level=1"], 1, "level"),
    "events": Row(["MODEL"], "created", "events", ["GONE"], 1, "`pushstep models` lists them"),
    "explain": Row(
        ["manifest_mismatch"],
        "Do: run the same code",
        "do",
        ["manifest_mismatched"],
        2,
        "did you mean manifest_mismatch",
    ),
    "export": Row(
        ["--model", "MODEL", "OUT"],
        "at version 3",
        "bytes",
        ["--model", "GONE", "OUT"],
        1,
        "no model is named",
    ),
    "gate": Row(["MODEL"], "nonfinite", "nonfinite", ["MODEL", "--set", "nonfinite=1"], 1, "nonfinite"),
    "groups": Row(["MODEL"], "adagrad", "param_groups", ["MODEL", "9"], 1, "`pushstep groups"),
    "hooks": Row(["MODEL"], "hook", "hooks", ["MODEL", "--remove", "x"], 1, "`pushstep hooks"),
    "import": Row(
        ["--model", "MODEL", "--weights-only", "FILE"],
        "parameters replaced",
        "timeline",
        ["--model", "GONE", "FILE"],
        1,
        "no model is named",
    ),
    "models": Row([], "MODEL", "models", ["GONE"], 1, "no model is named"),
    "policy": Row(["MODEL"], "async", "policy", ["MODEL", "--set", "policy=x"], 1, "policy"),
    "replay": Row(["DATA"], "records_per_s", "digest", ["DATA", "--to", "99"], 1, "99"),
    "shards": Row([], "1 rank, ready", "ranks", ["--server", NOBODY], 3, "start one with: pushstep-server"),
    "snapshots": Row(
        ["MODEL"], "the server", "snapshots", ["MODEL", "--delete", "x", "--yes"], 1, "`pushstep snapshots"
    ),
    "status": Row([], "version", "models", [NOBODY], 3, "start one with: pushstep-server"),
    "top": Row(["MODEL", "--looks", "1"], "w0", "workers", ["GONE", "--looks", "1"], 1, "no model is named"),
    "workers": Row(
        ["MODEL"], "live, lead", "workers", ["MODEL", "--evict", "x", "--yes"], 1, "`pushstep workers"
    ),
}
# The demo takes half a minute: tests of its own run it. Here is its failure only.
ELSEWHERE = {"demo": Path(__file__).with_name("test_demo_end_to_end.py")}
EVENLY_FAILING = [name for name in COMMANDS if name not in ("check", "explain", "replay")]


def words_of(result: Result) -> str:
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of a server that held a model for a while."""
    server = start_server(tmp_path_factory.mktemp("stopped"), "--durability", "everysec")
    session = server.connect("kept")
    session.create({"w": np.zeros(4, np.float32)})
    for _ in range(3):
        session.push({"w": np.ones(4, np.float32)})
    assert server.stop() == 0
    return server.data


@pytest.fixture
def filled(
    server: RunningServer, model_name: str, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], list[str]]:
    """A command line with names in place of its words."""
    monkeypatch.setenv("PUSHSTEP_SERVER", server.grpc)
    monkeypatch.setenv("COLUMNS", "240")
    session = server.connect(model_name)
    session.create({"w": np.zeros(4, np.float32)}, [{"rule": "adagrad", "params": ["w"], "lr": 0.5}])
    for _ in range(3):
        session.push({"w": np.ones(4, np.float32)})
    file = tmp_path / "file.safetensors"
    file.write_bytes(server.rest("GET", f"/v1/models/{model_name}/export?format=safetensors").content)
    names = {
        "MODEL": model_name,
        "GONE": "nobody",
        "OUT": str(tmp_path / "out.safetensors"),
        "FILE": str(file),
        "DATA": str(stopped),
        "MISSING": str(tmp_path / "missing"),
    }
    return lambda line: [names.get(word, word) for word in line]


def test_every_command_is_in_the_table() -> None:
    click = typer.main.get_command(app)
    assert sorted([*COMMANDS, *ELSEWHERE]) == sorted(click.commands)  # type: ignore[attr-defined]
    assert all("--json" in path.read_text() for path in ELSEWHERE.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_each_has_text_json_and_a_failure(name: str, filled: Callable[[list[str]], list[str]]) -> None:
    row = COMMANDS[name]
    run = lambda line: CliRunner().invoke(app, [name, *filled(line)])  # noqa: E731
    text = run(row.line)
    assert (text.exit_code, text.stderr) == (0, ""), text.output
    assert filled([row.said])[0] in text.stdout
    as_json = run([*row.line, "--json"])
    assert (as_json.exit_code, as_json.stderr) == (0, "")
    assert as_json.stdout.count("\n") == 1 and row.key in json.loads(as_json.stdout)
    failed = run(row.failing)
    assert (failed.exit_code, failed.stdout) == (row.status, "")
    assert row.why in words_of(failed)
    told = run([*row.failing, "--json"])
    assert (told.exit_code, told.stdout) == (row.status, "")
    if row.status != 2 or name == "check":  # a wrong command line is told as text
        error = json.loads(told.stderr)["error"]
        assert error["exit"] == row.status and row.why in error["message"]
        assert error["code"] or name == "check"


@pytest.mark.parametrize("name", EVENLY_FAILING)
def test_each_tells_a_server_that_is_not_there(name: str, filled: Callable[[list[str]], list[str]]) -> None:
    failed = CliRunner().invoke(app, [name, *filled(COMMANDS[name].line), "--server", NOBODY, "--json"])
    assert (failed.exit_code, failed.stdout) == (3, "")
    error = json.loads(failed.stderr)["error"]
    assert (error["code"], error["exit"]) == ("server_unavailable", 3)
    assert "--server HOST:PORT" in error["message"] and "connect(" not in error["message"]


def test_a_demo_that_cannot_be() -> None:
    failed = CliRunner().invoke(app, ["demo", "--policy", "none"])
    assert (failed.exit_code, failed.stdout) == (2, "")
    assert "there are async" in words_of(failed)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, Authority, TokenFile]]:
    folder = tmp_path_factory.mktemp("secured")
    authority, tokens = Authority(folder / "ca"), TokenFile(folder / "tokens")
    with running_server(folder / "data", *authority.server_options(), *tokens.options()) as server:
        yield server, authority, tokens


# command line, exit status, and what it says to do; PLAIN and SECURED are servers, CA a file
FAULTS: dict[str, tuple[list[str], int, list[str]]] = {
    "the REST door's port": (
        ["PLAIN_REST"],
        3,
        ["REST door", "workers connect to PLAIN", "http://HOST:PORT"],
    ),
    "the workers' port as a URL": (["http://PLAIN"], 3, ["speaks no HTTP", "without http://"]),
    "no port": (["localhost"], 3, ["write localhost:7070"]),
    "no number": (["localhost:port"], 3, ["is no port"]),
    "no URL": (["http://:x"], 2, ["write http://HOST:PORT"]),
    "another scheme": (["ftp://localhost:1"], 3, ["without ftp://"]),
    "nobody": ([NOBODY], 3, ["start one with: pushstep-server", "PUSHSTEP_SERVER"]),
    "TLS is expected": (["SECURED"], 3, ["it speaks TLS", "--tls-ca FILE"]),
    "a URL without TLS": (["http://SECURED_REST"], 3, ["https://"]),
    "TLS of a plain server": (["PLAIN", "--tls-ca", "CA"], 3, ["no TLS"]),
    "a URL with TLS of a plain server": (["https://PLAIN_REST"], 3, ["http://"]),
    "no such CA": (["SECURED", "--tls-ca", "missing.pem"], 2, ["cannot read missing.pem"]),
    "a CA that is none": (["SECURED", "--tls-ca", "TOKEN"], 2, ["no certificates that can be used"]),
    "no token": (["SECURED", "--tls-ca", "CA"], 1, ["--token @FILE", "PUSHSTEP_TOKEN"]),
    "a wrong token": (["SECURED", "--tls-ca", "CA", "--token", "@WRONG"], 1, ["--token @FILE"]),
    "a token as an argument": (["SECURED", "--token", "abc"], 2, ["--token @FILE"]),
    "a token file that is missing": (["SECURED", "--token", "@missing"], 2, ["cannot read missing"]),
    "a token without TLS": (["192.0.2.1:7070", "--token", "@TOKEN"], 2, ["--tls-ca FILE", "--insecure"]),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_failure_says_what_to_do(
    server: RunningServer,
    secured: tuple[RunningServer, Authority, TokenFile],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    locked, authority, tokens = secured
    line, status, words = FAULTS[case]
    (tmp_path / "token").write_text(tokens.tokens[Role.VIEWER.value])
    (tmp_path / "wrong").write_text("wrong-token")
    names = {
        "PLAIN_REST": server.http,
        "SECURED_REST": locked.http,
        "PLAIN": server.grpc,
        "SECURED": locked.grpc,
        "CA": str(authority.ca),
        "TOKEN": str(tmp_path / "token"),
        "WRONG": str(tmp_path / "wrong"),
    }

    def named(text: str) -> str:
        for name, value in names.items():
            text = re.sub(rf"\b{name}\b", lambda _, value=value: value, text)  # type: ignore[misc]
        return text

    monkeypatch.setenv("COLUMNS", "400")
    where, *rest = map(named, line)
    failed = CliRunner().invoke(app, ["models", "--server", where, *rest])
    said = words_of(failed)
    assert (failed.exit_code, failed.stdout) == (status, ""), said
    assert all(named(each) in said for each in words), said
    assert "Traceback" not in said and tokens.tokens[Role.VIEWER.value] not in said


def test_a_viewer_is_told_who_may(
    secured: tuple[RunningServer, Authority, TokenFile], tmp_path: Path
) -> None:
    locked, authority, tokens = secured
    (tmp_path / "token").write_text(tokens.tokens[Role.VIEWER.value])
    access = ["--server", locked.grpc, "--tls-ca", str(authority.ca), "--token", f"@{tmp_path / 'token'}"]
    assert CliRunner().invoke(app, ["models", *access]).exit_code == 0
    failed = CliRunner().invoke(app, ["models", "m", "--delete", "--yes", *access, "--json"])
    assert failed.exit_code == 1
    error = json.loads(failed.stderr)["error"]
    assert error["code"] == "permission_denied" and "the token of someone who may" in error["message"]


def test_the_rest_door_s_url_is_enough(server: RunningServer, model_name: str) -> None:
    server.connect(model_name).create({"w": np.zeros(2, np.float32)})
    for line in (
        ["status", f"http://{server.http}"],
        ["models", model_name, "--server", f"http://{server.http}/"],
    ):
        done = CliRunner().invoke(app, [*line, "--json"])
        assert done.exit_code == 0, done.stderr
        assert model_name in done.stdout


LONG = {
    "export": (["--model", "MODEL", "OUT"], "out.safetensors"),
    "import": (["--model", "MODEL", "--weights-only", "FILE"], "file.safetensors"),
    "check": (["DATA"], "kept: "),
    "replay": (["DATA", "--to", "2"], "kept: version 2"),
}


@pytest.mark.parametrize("name", LONG)
def test_long_work_shows_its_progress_on_a_terminal(
    name: str, filled: Callable[[list[str]], list[str]]
) -> None:
    line, shown = LONG[name]
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    with open(os.devnull, "w") as nothing:
        process = workers().start(
            COMMAND, [name, *filled(line)], nothing.fileno(), theirs, environment=environment
        )
    os.close(theirs)
    seen = ""
    while some := read_some(ours):
        seen += some
    os.close(ours)
    assert process.wait(60) == 0, seen
    assert shown in seen, seen


def completed(line: str, environment: dict[str, Any]) -> list[str]:
    words = {"_PUSHSTEP_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    done = workers().call(COMMAND, environment={**os.environ, **environment, **words})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_tab_knows_the_server_s_models(server: RunningServer, model_name: str) -> None:
    server.connect(model_name).create({"w": np.zeros(2, np.float32)})
    here = {"PUSHSTEP_SERVER": server.grpc}
    assert model_name in completed("pushstep groups ", here)
    assert completed(f"pushstep export --model {model_name}", here) == [model_name]
    assert completed("pushstep groups ", {"PUSHSTEP_SERVER": NOBODY}) == []
    assert "status" in completed("pushstep stat", here)


def test_python_m_is_the_same() -> None:
    line = ["--help"]
    ran = [
        subprocess.run([*start, *line], capture_output=True, text=True, timeout=60)
        for start in ([PUSHSTEP], [sys.executable, "-m", "pushstep"])
    ]
    assert ran[0].stdout == ran[1].stdout and ran[0].returncode == ran[1].returncode == 0
