"""The house: which folder may import which, nothing in a circle, and no room too large to see."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import source_tree
from tests.support.source_tree import (
    MAY_IMPORT,
    OUTSIDE,
    PACKAGES,
    ROOT,
    imports,
    module_of,
    name_of,
    python_files,
)

# Inside of a package, who may import whom. A file at the top of a package goes by its own name; a folder within a folder goes by the outer one's.
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
        "__main__": {"service", "access", "config", "process", "links"},
        "service": {
            "worker_door", "operator_door", "capacity", "shared_memory", "metrics", "models", "devices", "traces",
            "access", "process", "config", "service_manager", "ranks", "links",
        },
        "service_manager": set[str](),
        "commands": {"models", "journal", "storage", "arenas", "process", "config"},
        "worker_door": {
            "requests", "shared_memory", "models", "streams", "arenas", "counters", "traces", "access", "process", "staging",
        },
        "ranks": {
            "worker_door", "requests", "shared_memory", "models", "journal", "storage", "pacing", "coordinator", "parts", "arenas", "streams",
            "staging", "traces", "process", "config", "reports", "links",
        },
        "links": {"parts", "streams", "process"},
        "reports": {"capacity", "models", "arenas"},
        "operator_door": {
            "capacity", "imports", "metrics", "models", "observers", "page", "remote", "journal", "storage", "coordinator", "arenas",
            "streams", "staging", "counters", "access", "process", "config", "parts", "reports",
        },
        "capacity": {"coordinator", "models", "captures", "process", "staging", "arenas"},
        "imports": {"models", "storage", "coordinator", "arenas", "staging", "process"},
        "requests": {
            "shared_memory", "models", "journal", "storage", "coordinator", "captures", "arenas", "devices", "streams", "staging",
            "access", "process", "parts",
        },
        "shared_memory": {"models", "arenas", "devices", "staging", "access", "process"},
        "page": set[str](),
        "metrics": {"models", "coordinator", "counters", "process", "reports"},
        "models": {
            "observers", "journal", "remote", "storage", "pacing", "coordinator", "captures", "arenas", "devices", "staging", "counters",
            "process", "config", "parts",
        },
        "parts": {"storage", "coordinator", "arenas", "staging", "process"},
        "remote": {"storage", "process"},
        "observers": {"coordinator", "traces"},
        "journal": {"storage", "coordinator", "arenas", "staging", "counters", "process"},
        "storage": {"pacing", "coordinator", "captures", "arenas", "process"},
        "pacing": {"process"},
        "coordinator": {"staging", "counters"},
        "arenas": {"captures", "devices", "staging", "process"},
        "captures": {"devices", "staging", "process"},
        "devices": {"staging", "process"},
        "streams": {"staging", "counters", "access", "process"},
        "staging": {"process"},
        "access": set[str](),
        "counters": set[str](),
        "traces": {"process"},
        "process": set[str](),
        "config": {"journal", "coordinator", "devices", "access"},
    },
    "client": {
        "__init__": {"connection", "session", "optimizer", "membership", "transport"},
        "commands": {"connection", "demo", "gradients", "session", "transport", "worker"},
        "demo": {"__init__"},
        "keras": {"session", "optimizer", "membership"},
        "connection": {"options", "session", "worker", "shards", "gradients", "transport"},
        "session": {
            "optimizer", "attachment", "worker", "shards", "shared_memory", "membership", "gradients", "transport",
            "notebook", "warn",
        },
        "optimizer": {
            "attachment", "worker", "shared_memory", "membership", "gradients", "transport", "notebook", "warn",
        },
        "attachment": {"membership", "gradients", "transport", "warn"},
        "worker": {"shards", "shared_memory", "membership", "gradients", "transport", "warn"},
        "shards": {"membership", "transport"},
        "shared_memory": {"membership", "gradients", "transport"},
        "membership": {"gradients", "transport", "notebook", "warn"},
        "gradients": {"transport"},
        "transport": set[str](),
        "options": {"gradients"},
        "notebook": set[str](),
        "warn": set[str](),
    },
}  # fmt: skip
MOST_FILES, MOST_LINES, MOST_LINES_OF_TESTS = 13, 400, 500
# What is pure has none of these, and imports nothing that a process could do.
NOT_PURE = {"asyncio", "threading", "time", "logging", "socket", "os"}


MODULES = {module_of(path): path for path in python_files(*PACKAGES)}


def imported_modules(path: Path) -> set[str]:
    """The modules of ours that a file imports."""
    found = set()
    for each in imports(path):
        module = each.module.removeprefix("pushstep.")
        inner = f"{module}.{each.name}"
        found.add(inner if inner in MODULES else module)
    return {name for name in found if name in MODULES}


@functools.cache
def graph() -> dict[str, set[str]]:
    """What each module imports of the others. Not made when this file is: each process that collects the tests would."""
    return {name: imported_modules(path) - {name} for name, path in MODULES.items()}


def room(module: str) -> str:
    return [*module.split("."), "__init__"][1]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_arrows(package: str) -> None:
    """Relative inside a package, absolute across, and only where the table allows."""
    wrong = []
    for path in python_files(package):
        for each in imports(path):
            first, _, rest = f"{each.module}.{each.name}".partition(".")
            inner = rest.split(".")[0]
            if first == "pushstep":
                allowed = inner == package if each.relative else inner in MAY_IMPORT[package]
            else:
                allowed = first not in (OUTSIDE, *PACKAGES) and not each.module.endswith("()")
            if not allowed:
                wrong.append(f"{name_of(path)}:{each.line}: {each.module}")
    assert python_files(package)
    assert wrong == []


def test_nothing_is_imported_by_its_folder_s_name() -> None:
    """`import server` would make a second copy of pushstep.server, `import harness` find another's."""
    bare = {*PACKAGES, *(path.stem for path in python_files("tests"))} - {"__init__", "__main__"}
    wrong = [
        f"{name_of(path)}:{each.line}: {each.module}"
        for path in python_files("tests", *PACKAGES)
        for each in imports(path)
        if each.module.split(".")[0] in bare
    ]
    assert wrong == []


def test_contributing_has_the_same_table() -> None:
    table = re.findall(
        r"^\| `(\w+)/` \| `pushstep\.\w+` \|[^|]*\| ([^|]*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M
    )
    found = {folder: set(re.findall(r"`(proto|optim|server|client)`", may)) for folder, may in table}
    assert found == MAY_IMPORT


@pytest.mark.parametrize("package", PACKAGES)
def test_folders_import_along_the_arrows(package: str) -> None:
    found: dict[str, set[str]] = {}
    for module in MODULES:
        if module.split(".")[0] == package:
            others = {room(other) for other in graph()[module] if other.split(".")[0] == package}
            found.setdefault(room(module), set()).update(others - {room(module)})
    assert found == ARROWS[package]


def test_no_circle_of_imports() -> None:
    """Between files, those for types only included."""
    left = {name: set(others) for name, others in graph().items()}
    while True:
        free = {name for name, others in left.items() if not others & left.keys()}
        if not free:
            break
        for name in free:
            del left[name]
    assert left == {}


def test_the_coordinator_is_pure() -> None:
    wrong = [
        f"{name_of(path)}: {each.module}"
        for path in python_files("server/coordinator")
        for each in imports(path)
        if each.module.split(".")[0] in NOT_PURE
    ]
    assert wrong == []


def test_rooms_can_be_seen_whole() -> None:
    folders = [path.parent for path in (*MODULES.values(), *python_files("tests/support"))]
    assert {str(folder) for folder in folders if folders.count(folder) > MOST_FILES} == set()
    bounds = dict.fromkeys(PACKAGES, MOST_LINES) | {"tests": MOST_LINES_OF_TESTS}
    lengths = {
        path: (len(path.read_text().splitlines()), bound)
        for f, bound in bounds.items()
        for path in python_files(f)
    }
    assert {str(path): lines for path, (lines, bound) in lengths.items() if lines > bound} == {}


def test_a_circle_and_a_wrong_arrow_would_be_found(tmp_path: Path) -> None:
    """These tests, on a copy of the tree with one import too many."""
    copied = tmp_path / "copy"
    needed = (Path(source_tree.__file__), Path(__file__), ROOT / "CONTRIBUTING.md")
    for path in (*python_files(*PACKAGES), *needed):
        target = copied / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    wrong = copied / "server" / "coordinator" / "decision.py"
    wrong.write_text(
        wrong.read_text()
        + "\nimport time\n\nfrom pushstep.client import connect\nfrom ..models.model import Model\n"
    )
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "arrows or circle_of or pure",
            "tests",
        ],
        cwd=copied,
        env={**os.environ, "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    failed = [line for line in ran.stdout.splitlines() if line.startswith("FAILED")]
    for name in (
        "imports_follow_the_arrows[server]",
        "folders_import_along_the_arrows[server]",
        "no_circle_of_imports",
        "the_coordinator_is_pure",
    ):
        assert any(f"test_{name}" in line for line in failed), ran.stdout
