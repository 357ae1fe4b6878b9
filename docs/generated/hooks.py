"""What mkdocs runs while it builds the site: pages made of what the code says, and links to files beside the docs.

A page that is made here lies in no folder and is never committed, so it cannot be other than what it was made of.
"""

from __future__ import annotations

import atexit
import re
import tempfile
from pathlib import Path
from posixpath import normpath, relpath

import errors_reference
import grpc_reference
import rest_reference
import settings_reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("proto", "optim", "server", "client")
# What is made of code, and by what.
MADE = {
    "reference/rest.md": rest_reference.page,
    "reference/grpc.md": grpc_reference.page,
    "reference/settings.md": settings_reference.page,
    "reference/errors.md": errors_reference.page,
}
# What they are made of: in a checkout, where there are no such pages, links lead there.
MADE_OF = {
    "server/operator_door/openapi.json": "reference/rest.md",
    "proto/training.proto": "reference/grpc.md",
    "server/config.py": "reference/settings.md",
    "proto/errors": "reference/errors.md",
}
# Files outside of docs/ that are pages of the site.
TAKEN_IN = {
    "deploy/METRICS.md": "reference/metrics.md",
    "deploy/README.md": "deploying.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
# What a block needs is for the test that runs the blocks.
_NEEDS = re.compile(r'^( *```\w+)(?: needs="[^"]*")', re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#\s]*)(#[^)\s]*)?\)")


@event_priority(100)  # before mkdocstrings reads its own
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give mkdocstrings the packages by their names: the folders have others."""
    folder = tempfile.TemporaryDirectory(prefix="pushstep-docs-")
    atexit.register(folder.cleanup)
    package = Path(folder.name) / "pushstep"
    package.mkdir()
    (package / "__init__.py").symlink_to(ROOT / "package" / "__init__.py")
    for name in PACKAGES:
        (package / name).symlink_to(ROOT / name)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [folder.name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of docs/."""
    for where, make in MADE.items():
        files.append(File.generated(config, where, content=make()))
    for source, where in TAKEN_IN.items():
        files.append(File.generated(config, where, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have links to the repository's files lead to their pages; one to a file that is no page becomes its name."""
    here = page.file.src_uri
    beside = next((source for source, where in TAKEN_IN.items() if where == here), f"docs/{here}")

    def replaced(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if not target:
            return link[0]
        file = normpath(f"{Path(beside).parent.as_posix()}/{target}")
        site = TAKEN_IN.get(file) or MADE_OF.get(file)
        if site is None and file.startswith("docs/"):
            site = file.removeprefix("docs/")
        if site is not None:
            return f"[{text}]({relpath(site, Path(here).parent.as_posix())}{anchor})"
        if not (ROOT / file).exists():
            return link[0]  # mkdocs reports it
        return text if file in text or text.startswith("`") else f"{text} (`{file}`)"

    return _LINK.sub(replaced, _NEEDS.sub(r"\1", markdown))
