"""The built site: its pages, what they ask for, and where their links lead."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.support.source_tree import ROOT

# What a browser fetches by itself, by tag; a link that somebody has to click is `a`.
_FETCHED = {
    "script": ("src",),
    "link": ("href",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "object": ("data",),
    "embed": ("src",),
    "video": ("src", "poster"),
    "audio": ("src",),
    "use": ("href", "xlink:href"),
    "image": ("href", "xlink:href"),
}
_OF_NO_FETCH = {"canonical", "alternate", "next", "prev"}


@dataclass
class BuiltPage(HTMLParser):
    """One page: its anchors, its links, what it fetches, and its text, paragraph by paragraph."""

    path: Path
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    paragraphs: list[str] = field(default_factory=list)
    _in_paragraph: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors.update(given[name] for name in ("id", "name") if name in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag != "link" or not _OF_NO_FETCH & set(given.get("rel", "").split()):
            self.fetched += [given[name] for name in _FETCHED.get(tag, ()) if name in given]
        if tag == "p":
            self.paragraphs.append("")
        self._in_paragraph = tag == "p" or (self._in_paragraph and tag in ("em", "strong", "a", "br"))

    def handle_endtag(self, tag: str) -> None:
        self._in_paragraph = self._in_paragraph and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._in_paragraph:
            self.paragraphs[-1] += data


class Site:
    """The site, built into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        built = subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)],
            cwd=ROOT,
            env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if built.returncode != 0 or "WARNING" in built.stdout:
            raise AssertionError(f"the site was not built:\n{built.stdout}")
        self.pages = {
            path.relative_to(folder).as_posix(): BuiltPage(path) for path in sorted(folder.rglob("*.html"))
        }

    def problem(self, page: BuiltPage, link: str) -> str:
        """What is wrong with a link; nothing if it holds, or leads to another site."""
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            return "" if parts.scheme in ("http", "https", "mailto") else "of no kind that is known"
        target = page.path
        if parts.path:
            root = self.folder if parts.path.startswith("/") else page.path.parent
            target = (root / unquote(parts.path).lstrip("/")).resolve()
            target = target / "index.html" if target.is_dir() else target
        if not target.is_file():
            return "there is no such file"
        if parts.fragment and target.suffix == ".html":
            found = self.pages[target.relative_to(self.folder.resolve()).as_posix()]
            if unquote(parts.fragment) not in found.anchors | {"__skip"}:
                return "there is no such anchor"
        return ""
