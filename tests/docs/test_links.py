"""Links between the repository's Markdown files: each leads to a file that is there, and to a heading in it."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.support.source_tree import ROOT, name_of, tracked

DOCUMENTS = {name_of(path): path for path in tracked() if path.suffix == ".md" and not path.is_symlink()}
_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")
_FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them, and those that are written."""
    found = set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    for heading in re.findall(r"^#+ +(.+?)(?: +#+)?$", _FENCED.sub("", text), re.MULTILINE):
        own = re.search(r"\{:? *#([\w-]+) *\}$", heading)
        if own is not None:
            found.add(own[1])
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name: str) -> None:
    page = DOCUMENTS[name]
    wrong = []
    for target, anchor in _LINK.findall(_FENCED.sub("", page.read_text())):
        file = Path(page.parent, unquote(target)).resolve() if target else page
        if not file.exists():
            wrong.append(f"{target}: there is no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text()):
            wrong.append(f"{target}#{anchor}: there is no such heading")
    assert wrong == []


def test_a_reader_of_several_pages_meets_no_model_of_another_network() -> None:
    """Each page trains models of its own names. README.md and the site's first page have one and the same network."""
    pages: dict[str, set[str]] = {}
    for name, page in DOCUMENTS.items():
        for model in re.findall(r'\bconnect\([^)]*\bmodel="(\w[\w-]*)"', page.read_text()):
            pages.setdefault(model, set()).add(name)
    assert pages.pop("first") == {"README.md", "docs/index.md"}
    assert {model: names for model, names in pages.items() if len(names) > 1} == {}
    made = {
        re.search(r"^model = .*$", (ROOT / name).read_text(), re.M)[0]
        for name in ("README.md", "docs/index.md")
    }  # type: ignore[index]
    assert len(made) == 1


def test_anchors_are_those_of_headings() -> None:
    page = '# Who may *do* what?\n```\n# no heading\n```\n## `keep` and [more](x.md)\n<a id="here"></a>\n### too_old\n'
    assert anchors(page) == {"who-may-do-what", "keep-and-more", "here", "too_old"}
