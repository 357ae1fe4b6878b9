"""The fenced blocks of the documents: which there are, and which of them are run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.support.source_tree import ROOT

_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>```+)(?P<language>[\w+-]*)(?P<rest>.*)$")
_OPTION = re.compile(r' +([a-z-]+)="([^"]*)"')
RUN = ("bash", "python")


@dataclass(frozen=True)
class Block:
    """One block, and the line of its fence."""

    page: Path
    line: int
    language: str
    text: str
    # why it is not run: what it needs and a test does not have
    needs: str

    @property
    def is_run(self) -> bool:
        """Whether the harness runs it."""
        return self.language in RUN and not self.needs

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """A page's blocks, in order. ValueError for a fence that has no end, or an option that nobody knows."""
    found: list[Block] = []
    lines = iter(enumerate(page.read_text().splitlines(), 1))
    for number, line in lines:
        fence = _FENCE.match(line)
        if fence is None:
            continue
        options = dict(_OPTION.findall(fence["rest"]))
        if _OPTION.sub("", fence["rest"]).strip() or options.keys() - {"needs", "title"}:
            raise ValueError(f"{page}:{number}: what does {fence['rest']!r} say?")
        text: list[str] = []
        for _, inside in lines:
            if inside.strip() == fence["ticks"]:
                break
            text.append(inside.removeprefix(fence["indent"]))
        else:
            raise ValueError(f"{page}:{number}: the block has no end")
        found.append(
            Block(page, number, fence["language"], "".join(f"{t}\n" for t in text), options.get("needs", ""))
        )
    return found


def pages() -> list[Path]:
    """Every page whose blocks are run."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
