"""What make installs, and when: run with programs in place of pip and of what is started, which note how they were called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.source_tree import ROOT

EVERYTHING, DEMO = "--editable .[demo,test,examples,docs]", "--editable .[demo]"


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    for name in ("python", "pip", "pushstep"):
        program = tmp_path / "venv" / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> "{tmp_path}/calls"\n')
        program.chmod(0o755)
    return tmp_path / "venv"


def made(venv: Path, target: str) -> tuple[list[str], str]:
    """What a target called, and what it said."""
    calls = venv.parent / "calls"
    calls.write_text("")
    # not as a part of the make that has started these tests: it would say which directory it enters
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", target, f"VENV={venv}"],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return calls.read_text().splitlines(), done.stdout


def test_the_demo_installs_what_it_needs_says_so_and_does_it_once(venv: Path) -> None:
    calls, said = made(venv, "demo")
    [installing, running] = calls
    assert installing.endswith(DEMO) and "--quiet" not in installing
    assert running == "pushstep demo"
    assert said.startswith("Installing pushstep[demo] into ")
    assert made(venv, "demo")[0] == ["pushstep demo"]
    [rest] = made(venv, "setup")[0]
    assert rest.endswith(EVERYTHING) and "--quiet" not in rest
    assert made(venv, "setup")[0] == []


def test_who_has_everything_has_what_the_demo_needs(venv: Path) -> None:
    [everything] = made(venv, "setup")[0]
    assert everything.endswith(EVERYTHING)
    assert made(venv, "demo")[0] == ["pushstep demo"]


def test_a_look_again_is_quiet(venv: Path) -> None:
    made(venv, "setup")
    os.utime(venv / "ready", (0, 0))
    [again] = made(venv, "setup")[0]
    assert "--quiet" in again
