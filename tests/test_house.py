"""The house: which folder may import which, nothing in a circle, and no room too large to see."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("proto", "optim", "server", "client")
# Who may import whom. A file at the top of a package goes by its own name; a folder within a folder goes by the outer one's.
ARROWS = {
    "proto": {
        "__init__": set[str](),
        "errors": set[str](),
        "wire": {"errors"},
        "shared_memory": {"errors", "wire"},
        "layout": {"wire"},
        "status": {"errors"},
        "process": set[str](),
        "environment": set[str](),
        "generate": set[str](),
    },
    "optim": {
        "__init__": {"keras", "mlx", "optimizers", "rules"},
        "keras": {"ops", "optimizers", "rules", "step"},
        "mlx": {"optimizers", "rules", "step"},
        "conversion": {"keras", "optimizers", "step"},
        "state_dict": {"rules"},
        "optimizers": {"rules", "backends", "step"},
        "rules": {"backends", "step"},
        "ops": {"backends", "cpu", "cuda", "kernels", "step"},
        "backends": {"cpu", "cuda", "step"},
        "cpu": {"kernels", "step"},
        "cuda": {"step"},
        "kernels": set[str](),
        "step": set[str](),
    },
    "server": {
        "__init__": set[str](),
        "__main__": {"service", "config", "process"},
        "service": {
            "worker_door", "operator_door", "shared_memory", "models", "devices", "staging", "process", "config",
        },
        "worker_door": {"requests", "shared_memory", "models", "streams", "arenas", "process"},
        "operator_door": {
            "models", "storage", "coordinator", "arenas", "streams", "staging", "process", "config",
        },
        "requests": {
            "shared_memory", "models", "storage", "coordinator", "arenas", "devices", "streams", "staging", "process",
        },
        "shared_memory": {"models", "arenas", "devices", "staging", "process"},
        "models": {"journal", "storage", "coordinator", "arenas", "devices", "staging", "process", "config"},
        "journal": {"storage", "coordinator", "arenas", "staging", "process"},
        "storage": {"coordinator", "arenas", "process"},
        "coordinator": {"staging"},
        "arenas": {"devices", "staging", "process"},
        "devices": {"staging", "process"},
        "streams": {"staging", "process"},
        "staging": {"process"},
        "process": set[str](),
        "config": {"coordinator", "devices"},
    },
    "client": {
        "__init__": {"session", "optimizer", "membership"},
        "commands": {"demo", "gradients", "transport"},
        "demo": {"__init__"},
        "session": {
            "options", "optimizer", "attachment", "worker", "shared_memory", "membership", "gradients", "transport",
            "warn",
        },
        "optimizer": {
            "attachment", "worker", "shared_memory", "membership", "gradients", "transport", "warn",
        },
        "attachment": {"membership", "gradients", "transport", "warn"},
        "worker": {"shared_memory", "membership", "gradients", "transport", "warn"},
        "shared_memory": {"membership", "gradients", "transport"},
        "membership": {"gradients", "transport", "warn"},
        "gradients": {"transport"},
        "transport": set[str](),
        "options": {"gradients"},
        "warn": set[str](),
    },
}  # fmt: skip
MOST_FILES, MOST_LINES, MOST_LINES_OF_TESTS = 13, 400, 500
# What is pure has none of these, and imports nothing that a process could do.
NOT_PURE = {"asyncio", "threading", "time", "logging", "socket", "os"}


def files(folder: str) -> list[Path]:
    return [path for path in sorted((ROOT / folder).rglob("*.py")) if "_pb2" not in path.name]


def name_of(path: Path) -> str:
    """server.arenas.writer"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for package in PACKAGES for path in files(package)}


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, wherever in it, and for types only, too."""
    package = path.parent.relative_to(ROOT).parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            origin = [*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]
        elif (node.module or "").split(".")[0] == "pushstep":
            origin = (node.module or "").split(".")[1:]
        else:
            continue
        module = ".".join(part for part in origin if part)
        for alias in node.names:
            inner = f"{module}.{alias.name}" if module else alias.name
            found.add(inner if inner in MODULES else module)
    return {name for name in found if name in MODULES}


GRAPH = {name: imports(path) - {name} for name, path in MODULES.items()}


def room(module: str) -> str:
    return [*module.split("."), "__init__"][1]


@pytest.mark.parametrize("package", PACKAGES)
def test_folders_import_along_the_arrows(package: str) -> None:
    found: dict[str, set[str]] = {}
    for module in MODULES:
        if module.split(".")[0] == package:
            others = {room(other) for other in GRAPH[module] if other.split(".")[0] == package}
            found.setdefault(room(module), set()).update(others - {room(module)})
    assert found == ARROWS[package]


def test_no_circle_of_imports() -> None:
    """Between files, those for types only included."""
    left = {name: set(others) for name, others in GRAPH.items()}
    while True:
        free = {name for name, others in left.items() if not others & left.keys()}
        if not free:
            break
        for name in free:
            del left[name]
    assert left == {}


def test_the_coordinator_is_pure() -> None:
    wrong = []
    for path in files("server/coordinator"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            wrong += [f"{name_of(path)}: {name}" for name in names if name.split(".")[0] in NOT_PURE]
    assert wrong == []


def test_rooms_can_be_seen_whole() -> None:
    folders = [path.parent for path in MODULES.values()]
    assert {str(folder) for folder in folders if folders.count(folder) > MOST_FILES} == set()
    bounds = dict.fromkeys(PACKAGES, MOST_LINES) | {"tests": MOST_LINES_OF_TESTS}
    lengths = {
        path: (len(path.read_text().splitlines()), bound) for f, bound in bounds.items() for path in files(f)
    }
    assert {str(path): lines for path, (lines, bound) in lengths.items() if lines > bound} == {}


def test_a_circle_and_a_wrong_arrow_would_be_found(tmp_path: Path) -> None:
    """These tests, on a copy of the tree with one import too many."""
    copied = tmp_path / "copy"
    for folder in PACKAGES:
        for path in files(folder):
            target = copied / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (copied / "tests").mkdir()
    (copied / "tests" / "test_house.py").write_bytes(Path(__file__).read_bytes())
    wrong = copied / "server" / "coordinator" / "decision.py"
    wrong.write_text(wrong.read_text() + "\nimport time\n\nfrom ..models.model import Model\n")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not would_be_found", "tests"],
        cwd=copied,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=100,
    )
    failed = [line for line in ran.stdout.splitlines() if line.startswith("FAILED")]
    for name in (
        "folders_import_along_the_arrows[server]",
        "no_circle_of_imports",
        "the_coordinator_is_pure",
    ):
        assert any(f"test_{name}" in line for line in failed), ran.stdout
