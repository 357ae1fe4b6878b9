"""The page of a server that has tokens: it asks for one, and shows what its role may do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
from playwright.sync_api import Page, expect

from pushstep.server.access.roles import Role
from tests.support.access.secured import TokenFile, reload
from tests.support.browser.chromium import Watched
from tests.support.browser.pushing import Pushing
from tests.support.servers.harness import RunningServer, running_server

pytestmark = pytest.mark.chromium
MODEL = "flights"
Watching = Callable[[RunningServer], AbstractContextManager[Watched]]
# all that would be refused to a viewer
CONTROLS = ("Quarantine", "Evict", "Apply", "Try (dry run)", "Add", "Take a snapshot", "Restore", "Delete")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    made = TokenFile(tmp_path_factory.mktemp("tokens") / "tokens")
    made.add("elsewhere", Role.VIEWER, "other-*")
    made.add("leaver", Role.OPERATOR)
    return made


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, tokens: TokenFile) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("page") / "data", *tokens.options()) as running:
        running.headers = tokens.headers("operator")
        yield running


@pytest.fixture(scope="module")
def pushing(guarded: RunningServer, tokens: TokenFile) -> Iterator[Pushing]:
    with Pushing(guarded, MODEL, tokens.tokens["worker"]) as training:
        guarded.rest("POST", f"/v1/models/{MODEL}/snapshots")
        yield training


@pytest.fixture
def watched(watching: Watching, guarded: RunningServer, pushing: Pushing) -> Iterator[Watched]:
    with watching(guarded) as shown:
        yield shown
        shown.expected |= {
            "401",
            "403",
            "ERR_INCOMPLETE_CHUNKED_ENCODING",
        }  # each stream that is cut is one, too


def sign_in(page: Page, token: str) -> None:
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Sign in").click()


def test_it_asks_for_a_token_and_keeps_it_in_this_tab(watched: Watched, tokens: TokenFile) -> None:
    page = watched.show(f"models/{MODEL}/workers")
    assert watched.violations() == []
    sign_in(page, "pst_wrong")
    expect(page.get_by_role("alert")).to_contain_text("unauthenticated")
    sign_in(page, tokens.tokens["operator"])
    expect(page.locator(".who")).to_have_text("operator operator")
    expect(page.get_by_role("button", name="Quarantine w0")).to_be_visible()
    secret = tokens.tokens["operator"]
    assert not any(secret in url for url in (*watched.requested, page.url))
    assert secret not in page.evaluate("JSON.stringify([localStorage, document.cookie])")
    page.reload()
    expect(page.locator(".who")).to_have_text("operator operator")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Token")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_a_viewer_sees_all_and_changes_nothing(watched: Watched, tokens: TokenFile) -> None:
    page = watched.show(f"models/{MODEL}/training")
    sign_in(page, tokens.tokens["viewer"])
    page.locator(".chart").first.wait_for()
    shown = {}
    for name in ("workers", "groups", "hooks", "policy", "snapshots", "events"):
        watched.show(f"models/{MODEL}/{name}")
        page.locator(".panel, .lead").first.wait_for()
        expect(page.get_by_text("Loading…")).to_have_count(0)
        texts = page.locator("main button").all_inner_texts()
        shown[name] = [text for text in texts if text in CONTROLS]
    assert [name for name, controls in shown.items() if controls] == []
    watched.show(f"models/{MODEL}/groups")
    expect(page.locator("section").first).to_contain_text("0.1")
    watched.show(f"models/{MODEL}/snapshots")
    # with a token the page fetches the file itself
    with page.expect_download() as download:
        page.evaluate("delete window.showSaveFilePicker")
        page.get_by_role("button", name="Checkpoint for torch.load").click()
    assert download.value.suggested_filename.endswith(".pt")


def test_a_refusal_is_shown_by_its_name(watched: Watched, tokens: TokenFile) -> None:
    """Of a token that became a viewer's while an operator's page was open."""
    page = watched.show(f"models/{MODEL}/workers")
    sign_in(page, tokens.tokens["operator"])
    page.get_by_role("button", name="Quarantine w0").click()
    viewer = json.dumps(tokens.tokens["viewer"])
    page.evaluate(f"sessionStorage.setItem('pushstep-token', {viewer})")
    page.get_by_role("dialog").get_by_role("button", name="Quarantine").click()
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("permission_denied")


def test_a_worker_s_token_is_for_no_page(watched: Watched, tokens: TokenFile) -> None:
    page = watched.show()
    sign_in(page, tokens.tokens["worker"])
    expect(page.get_by_role("alert")).to_contain_text("This page is for viewers and operators")


def test_a_token_for_other_models_sees_none_of_these(watched: Watched, tokens: TokenFile) -> None:
    page = watched.show()
    sign_in(page, tokens.tokens["elsewhere"])
    expect(page.get_by_role("heading", name="No model yet")).to_be_visible()
    watched.show(f"models/{MODEL}")
    expect(page.get_by_role("alert").first).to_contain_text("permission_denied")


def test_a_token_that_is_taken_back_signs_out(
    watched: Watched, tokens: TokenFile, guarded: RunningServer
) -> None:
    page = watched.show(f"models/{MODEL}/training")
    sign_in(page, tokens.tokens["leaver"])
    page.locator(".chart").first.wait_for()
    tokens.take_back("leaver")
    reload(guarded)
    expect(page.get_by_label("Token")).to_be_visible()
