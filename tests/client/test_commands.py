"""The `pushstep` command as a user runs it: a process, its output, its exit status."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pushstep.client.commands import app
from pushstep.proto.errors import CATALOGUE
from tests.support.servers.harness import RunningServer
from tests.support.terminals.command import pushstep

ROOT = Path(__file__).parents[2]
COMMANDS = [
    *(
        "bench",
        "capacity",
        "check",
        "demo",
        "durability",
        "events",
        "explain",
        "export",
        "gate",
        "groups",
        "hooks",
        "import",
        "models",
    ),
    *("policy", "replay", "snapshots", "status", "top", "workers"),
]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture
def nobody() -> str:
    """An address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("arguments", [["--help"], []], ids=["--help", "nothing"])
def test_help_lists_the_subcommands(arguments: list[str]) -> None:
    done = pushstep(*arguments)
    assert done.returncode == (0 if arguments else 2)
    text = done.stdout + done.stderr
    for name in COMMANDS:
        assert re.search(rf"^\W*{name}\b +\w", text, re.MULTILINE), text


@pytest.mark.parametrize("name", COMMANDS)
def test_each_subcommand_has_help_and_json(name: str) -> None:
    done = CliRunner().invoke(app, [name, "--help"])
    assert done.exit_code == 0
    assert "--json" in done.stdout


def test_help_loads_nothing_of_the_demo() -> None:
    code = (
        "import sys; sys.argv = ['pushstep', '--help']\n"
        "from pushstep.client.commands import main\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "assert 'matplotlib' not in sys.modules and 'pandas' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_commands_of_other_packages_load_nothing_until_they_run() -> None:
    """The server's are found by their entry points, and its other modules stay away."""
    code = (
        "import sys\n"
        "from importlib.metadata import entry_points\n"
        "found = {entry.name: entry.load() for entry in entry_points(group='pushstep.commands')}\n"
        "assert set(found) == {'check', 'replay'}\n"
        "assert not {'torch', 'grpc', 'numpy', 'fastapi', 'pushstep.client'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_an_error_means_is_told_without_torch_or_a_server() -> None:
    code = (
        "import sys\n"
        "from pushstep.client.commands import main\n"
        "sys.argv = ['pushstep', 'explain', 'nonfinite_gradient']\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "from pushstep.proto.errors.status import from_problem\n"  # what a refused command reads
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "GradScaler" in done.stdout


def test_every_error_is_explained() -> None:
    done = CliRunner().invoke(app, ["explain", "--json"])
    assert {entry["code"] for entry in json.loads(done.stdout)} == set(CATALOGUE)
    assert all(entry["meaning"] and entry["do"] for entry in json.loads(done.stdout))
    assert "](" not in done.stdout
    listed = CliRunner().invoke(app, ["explain"])
    assert all(code in listed.stdout for code in CATALOGUE)


def test_an_unknown_subcommand_is_refused() -> None:
    done = pushstep("stauts")
    assert done.returncode == 2
    assert "stauts" in done.stderr


@pytest.mark.parametrize("over", ["tcp", "unix"])
def test_status_as_json(server: RunningServer, model_name: str, over: str) -> None:
    server.connect(model_name).create({"w": np.zeros(2, np.float32)})
    address = server.grpc if over == "tcp" else f"unix:{server.unix}"
    done = pushstep("status", address, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)  # one line and nothing else
    assert done.stdout.count("\n") == 1
    assert facts["server"] == address
    assert facts["version"] == VERSION
    assert facts["http"] == f"http://{server.http}"
    assert model_name in facts["models"]


def test_status_for_people(server: RunningServer, model_name: str) -> None:
    server.connect(model_name).create({"w": np.zeros(2, np.float32)})
    done = pushstep("status", server.grpc)
    assert done.returncode == 0
    shown = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert shown["version"] == VERSION
    assert shown["http"] == f"http://{server.http}"
    assert model_name in shown["models"].split(", ")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_status_without_a_server(nobody: str, options: list[str]) -> None:
    done = pushstep("status", nobody, *options)
    assert done.returncode == 3
    assert done.stdout == ""
    assert f"no pushstep server answers at {nobody}" in done.stderr
    assert "start one with: pushstep-server" in done.stderr
    assert "Traceback" not in done.stderr
