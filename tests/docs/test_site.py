"""The documents' site, built strict: nothing from other hosts, no link that leads nowhere, an entry for everything there is."""

from __future__ import annotations

import json
import re
from urllib.parse import urlsplit

import pytest

from pushstep.proto.errors import CATALOGUE
from pushstep.proto.training_pb2 import DESCRIPTOR
from pushstep.server.access.table import ROUTES, RPCS
from pushstep.server.config import Config
from tests.support.documents.site import Site
from tests.support.source_tree import ROOT

# In every page, but the one for a path that does not exist: it is served at any depth.
MISSING = "404.html"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site").resolve())


@pytest.mark.timeout(600)
def test_it_builds_without_a_warning(site: Site) -> None:
    sources = {
        path.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        for path in (ROOT / "docs").rglob("*.md")
    }
    as_built = {re.sub(r"(^|/)README\.html$", r"\1index.html", name) for name in sources}
    assert as_built - site.pages.keys() == set()


def test_it_asks_no_other_host_for_anything(site: Site) -> None:
    asked = [
        f"{name}: {address}"
        for name, page in site.pages.items()
        for address in page.fetched
        if urlsplit(address).netloc
    ]
    assert asked == []
    styles = [
        path for path in site.folder.rglob("*.css") if re.search(r"url\(['\"]?(https?:)?//", path.read_text())
    ]
    assert styles == []


def test_what_it_fetches_is_there(site: Site) -> None:
    wrong = [
        f"{name}: {address}"
        for name, page in site.pages.items()
        for address in page.fetched
        if name != MISSING and not address.startswith("data:") and site.problem(page, address)
    ]
    assert wrong == []


def test_every_link_leads_somewhere(site: Site) -> None:
    wrong = [
        f"{name}: {link}: {problem}"
        for name, page in site.pages.items()
        for link in page.links
        if name != MISSING and (problem := site.problem(page, link))
    ]
    assert wrong == []


def test_the_reference_leads_to_its_pages(site: Site) -> None:
    """In a checkout the same links lead to what the pages are made of."""
    pages = {name for name in site.pages if name.startswith("reference/")} - {"reference/index.html"}
    text = (site.folder / "reference" / "index.html").read_text()
    [main] = re.findall(r"<article.*</article>", text, re.DOTALL)
    assert {f"reference/{name}" for name in re.findall(r'href="(\w+\.html)"', main)} == pages


def test_no_markdown_is_left_as_it_was_written(site: Site) -> None:
    """A list without an empty line before it, a table or a fence that is none."""
    left = re.compile(r"^\s*(?:[-*] |\d+\. |\||```|#+ )|\]\(", re.MULTILINE)
    wrong = [
        f"{name}: {text[:80]!r}"
        for name, page in site.pages.items()
        for text in page.paragraphs
        if left.search(text)
    ]
    assert wrong == []


def test_every_page_is_in_the_navigation(site: Site) -> None:
    index = site.pages["index.html"]
    led_to = {urlsplit(link).path.removeprefix("./") for link in index.links if not urlsplit(link).netloc}
    assert site.pages.keys() - led_to - {MISSING, "index.html"} == set()


def test_every_error_has_an_entry_and_every_entry_an_error(site: Site) -> None:
    entries = re.findall(r"^### (\S+)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert sorted(entries) == sorted(CATALOGUE)
    assert CATALOGUE.keys() - site.pages["troubleshooting.html"].anchors == set()
    assert CATALOGUE.keys() - site.pages["reference/errors.html"].anchors == set()


def test_each_entry_says_what_to_do() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    entries = re.findall(r"^### (\S+)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    wrong = [
        code
        for code, entry in entries
        if not re.fullmatch(r"\n(?:\S[^\n]*\n)+\n\*\*Do:\*\* (?:\S[^\n]*\n)+\n?", entry)
    ]
    assert wrong == []


def test_every_setting_has_its_entry(site: Site) -> None:
    assert Config.model_fields.keys() - site.pages["reference/settings.html"].anchors == set()


def test_every_route_has_its_entry(site: Site) -> None:
    described = json.loads((ROOT / "server" / "operator_door" / "openapi.json").read_text())["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
    anchors = site.pages["reference/rest.html"].anchors
    assert {
        route for route in routes if re.sub(r"\W+", "-", route.lower()).strip("-") not in anchors
    } == set()
    assert routes <= ROUTES.keys()


def test_every_rpc_and_message_has_its_entry(site: Site) -> None:
    anchors = site.pages["reference/grpc.html"].anchors
    [service] = DESCRIPTOR.services_by_name.values()
    names = {f"{method.name.lower()}-rpc" for method in service.methods}
    names |= {name.lower() for name in DESCRIPTOR.message_types_by_name}
    assert names - anchors == set()
    assert {f"/{service.full_name}/{method.name}" for method in service.methods} <= RPCS.keys()


def test_every_metric_has_its_entry(site: Site) -> None:
    """tests/server/test_metrics.py holds that file to what a server exposes."""
    named = set(
        re.findall(r"^\| `(pushstep_\w+)`", (ROOT / "deploy" / "METRICS.md").read_text(), re.MULTILINE)
    )
    built = (site.folder / "reference" / "metrics.html").read_text()
    assert named
    assert {name for name in named if f"<code>{name}</code>" not in built} == set()
