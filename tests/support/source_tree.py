"""The project's own files, and what each of them imports."""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Which packages may import which. CONTRIBUTING.md has the same table.
MAY_IMPORT: dict[str, set[str]] = {
    "proto": set(),
    "optim": set(),
    "server": {"proto", "optim"},
    "client": {"proto", "optim"},
}
PACKAGES = tuple(MAY_IMPORT)
OUTSIDE = "a relative import out of the package"


def python_files(*folders: str) -> list[Path]:
    """Our Python files in these folders; what protoc wrote is not ours."""
    return [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "_pb2" not in path.name
    ]


def name_of(path: Path) -> str:
    """server/arenas/writer.py"""
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    """server.arenas.writer"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tracked() -> list[Path]:
    """Every file of the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@dataclass(frozen=True)
class Import:
    """One name that a file imports, wherever in it, and for types only, too.

    `module` is as absolute as it can be said: "pushstep.server.config", "torch.nn", "import_module()".
    """

    line: int
    module: str
    name: str = ""
    relative: bool = False


@functools.cache
def imports(path: Path) -> tuple[Import, ...]:
    """All imports of a file."""
    return tuple(_found_in(path))


def _found_in(path: Path) -> Iterator[Import]:
    package = path.parent.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level > len(package):
                module = OUTSIDE
            elif node.level:
                above = package[: len(package) + 1 - node.level]
                start = ("pushstep", *above) if package[0] in PACKAGES else above
                module = ".".join((*start, *filter(None, [module])))
            yield from (Import(node.lineno, module, alias.name, bool(node.level)) for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in ("__import__", "import_module"):
                yield Import(node.lineno, f"{called}()")
