"""The page in a real browser, beside a training: what it shows, and what an operator does with it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.browser.chromium import PATIENCE_MS, Watched, tab
from tests.support.browser.pushing import STRANGE, Pushing
from tests.support.servers.harness import RunningServer, running_server, start_server, wait_until
from tests.support.servers.operators import all_models, show_model, show_worker

pytestmark = pytest.mark.chromium
MODEL = "flights"
Watching = Callable[[RunningServer], AbstractContextManager[Watched]]
TABS = ("training", "workers", "groups", "hooks", "policy", "snapshots", "events")
# Buttons that reach into the padding of their panel, or beyond it.
BEYOND = """() => [...document.querySelectorAll(".panel .button")].filter((each) => {
  const panel = each.closest(".panel");
  const edge = panel.getBoundingClientRect().right - parseFloat(getComputedStyle(panel).paddingRight);
  return each.getBoundingClientRect().right > edge + 1;
}).map((each) => each.textContent)"""
# for whatever takes the server, a worker or the browser its time
LONG_S = PATIENCE_MS / 1000


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("page") / "data") as running:
        yield running


@pytest.fixture(scope="module")
def pushing(served: RunningServer) -> Iterator[Pushing]:
    with Pushing(served, MODEL) as training:
        yield training


@pytest.fixture
def watched(watching: Watching, served: RunningServer, pushing: Pushing) -> Iterator[Watched]:
    with watching(served) as shown:
        yield shown


def figure(page: Page, name: str) -> str:
    """The text of one of a model's figures."""
    return (
        page.locator(".figures > div")
        .filter(has=page.get_by_text(name, exact=True))
        .locator("dd")
        .inner_text()
        .split("\n")[0]
    )


def agree(page: Page, word: str) -> None:
    """Press the button of the dialog that asks."""
    page.get_by_role("dialog").get_by_role("button", name=word, exact=True).click()


# --- as files


def test_what_a_browser_gets(served: RunningServer) -> None:
    answer = served.rest("GET", "/ui")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = served.rest("GET", "/ui", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "name", ["missing.js", "..%2f__init__.py", "../route.py", "vendor/README.md", "vendor", "%00"]
)
def test_nothing_else_is_served(served: RunningServer, name: str) -> None:
    answer = served.rest("GET", httpx.URL(f"/ui/{name}").raw_path.decode())
    assert answer.status_code == 404
    assert answer.json()["code"] == "unknown_route"


def test_a_slash_too_many_leads_to_the_page(served: RunningServer) -> None:
    answer = served.rest("GET", "/ui/")
    assert (answer.status_code, answer.headers["location"]) == (307, "../ui")


# --- what it shows


def test_one_look_tells_how_it_goes(watched: Watched) -> None:
    page = watched.show()
    card = page.get_by_role("listitem").filter(has=page.get_by_role("link", name=MODEL, exact=True))
    expect(card.locator(".badge")).to_have_text("Training")
    expect(page.locator(".verdict")).to_have_text("All is well.")
    expect(card).to_contain_text("2 workers at work.")


def test_a_server_alone_shows_no_ranks_and_is_not_asked_for_them(watched: Watched) -> None:
    page = watched.show()
    expect(page.locator(".card")).to_have_count(1)
    expect(page.get_by_text("Rank")).to_have_count(0)
    assert not [url for url in watched.requested if "/shards" in url]


def test_figures_and_charts_move_while_it_trains(watched: Watched) -> None:
    page = watched.show(f"models/{MODEL}")
    seen = set[str]()

    def moves() -> bool:
        page.wait_for_timeout(200)
        seen.add(figure(page, "Version"))
        return len(seen) > 2

    page.locator(".figures").wait_for()
    wait_until(moves, LONG_S)
    for chart in (
        "Pushes: applied",
        "Step time by room: receive",
        "Loss: of the last push",
        "Gradient norm: norm",
    ):
        expect(page.locator(f'[role="img"][aria-label^="{chart}"]')).not_to_have_attribute(
            "aria-label", f"{chart} unknown"
        )
    assert page.locator(".plot canvas").count() == 6
    rates = page.locator('[aria-label^="Learning rate"]').get_attribute("aria-label")
    assert rates == "Learning rate: group 0 0.1, group 1 1"


def test_each_worker_is_there_with_its_state(watched: Watched) -> None:
    page = watched.show(f"models/{MODEL}/workers")
    for name in ("w0", "w1"):
        expect(page.locator(f'[data-worker="{name}"]')).to_contain_text("live")
    expect(page.locator('[data-worker="w0"]')).to_contain_text("lead")
    expect(page.locator('[data-worker="w0"]')).to_contain_text("loss")


def test_a_strange_name_is_text(watched: Watched) -> None:
    page = watched.show(f"models/{MODEL}/groups")
    page.get_by_text("Parameters", exact=True).last.click()
    expect(page.locator("details code").last).to_have_text(STRANGE, use_inner_text=False)
    assert page.locator("main img").count() == 0


def test_a_model_that_is_not_there(watched: Watched) -> None:
    page = watched.show("models/no%20such%20%3Cb%3E")
    expect(page.get_by_role("heading", level=1)).to_have_text("No model no such <b>")
    watched.expected.add("404")


# --- what an operator does


def test_a_learning_rate_is_tried_changed_and_stepped_with(
    watched: Watched, pushing: Pushing, served: RunningServer
) -> None:
    page = watched.show(f"models/{MODEL}/groups")
    group = page.locator("section").filter(has_text="Group 0")
    group.get_by_label("lr", exact=True).fill("0.03125")
    group.get_by_role("button", name="Try (dry run)").click()
    expect(group.locator("[data-preview]")).to_contain_text("0.1 → 0.0313")
    expect(group.locator("[data-preview]")).to_contain_text("none → lr")
    assert served.rest("GET", f"/v1/models/{MODEL}/param-groups/0").json()["lr"] == 0.1
    group.get_by_role("button", name="Apply").click()
    expect(group.locator("[data-done]")).to_contain_text("It holds from version")
    version = int(group.locator("[data-done] b").inner_text())
    wait_until(lambda: pushing.receipts[-1].version > version, LONG_S)
    receipt = pushing.receipts[-1]
    assert list(receipt.effective_lr) == [0.03125, 1.0]
    expect(group).to_contain_text("lr is held by an operator")


def test_a_refusal_is_told_by_its_name_and_in_words(watched: Watched) -> None:
    page = watched.show(f"models/{MODEL}/groups")
    group = page.locator("section").filter(has_text="Group 1")
    group.get_by_label("rho", exact=True).fill("7")
    group.get_by_role("button", name="Apply").click()
    expect(group.get_by_role("alert")).to_contain_text("invalid_hyperparameter")
    group.get_by_label("rho", exact=True).fill("0,9")
    group.get_by_role("button", name="Apply").click()
    expect(group.get_by_role("alert")).to_contain_text("rho: a number is needed")
    watched.expected.add("422")


def test_an_edit_of_what_somebody_else_has_changed_is_not_made(
    watched: Watched, served: RunningServer
) -> None:
    page = watched.show(f"models/{MODEL}/policy")
    page.get_by_label("max staleness", exact=True).fill("50")
    # the answers to the page's next looks are held back: it does not know yet. None is on its way once one was
    with page.expect_event("requestfailed", lambda request: request.url.endswith("/v1/models/flights")):
        page.route("**/v1/models/flights", lambda route: route.abort("aborted"))
    served.rest("PATCH", f"/v1/models/{MODEL}/policy", json={"scale": True})
    panel = page.locator("section").filter(has=page.get_by_role("heading", name="Policy"))
    panel.get_by_role("button", name="Apply").click()
    expect(panel.get_by_role("alert")).to_contain_text("stale_etag")
    page.unroute_all()
    panel.get_by_role("button", name="Apply").click()
    expect(panel.locator("[data-done]")).to_contain_text("The policy was changed")
    policy = served.rest("GET", f"/v1/models/{MODEL}/policy").json()
    assert (policy["scale"], policy["max_staleness"]) == (True, 50)
    served.rest("PATCH", f"/v1/models/{MODEL}/policy", json={"scale": False, "max_staleness": None})
    watched.expected |= {"412", "net::ERR_"}


def test_hooks_are_added_set_ordered_and_removed(watched: Watched, served: RunningServer) -> None:
    page = watched.show(f"models/{MODEL}/hooks")

    def installed() -> list[tuple[str, dict[str, object]]]:
        hooks = served.rest("GET", f"/v1/models/{MODEL}/hooks").json()["hooks"]
        return [(hook["name"], hook["settings"]) for hook in hooks]

    adding = page.locator("section").filter(has=page.get_by_role("heading", name="Add a hook"))
    adding.get_by_label("max norm").fill("500")
    adding.get_by_role("button", name="Add").click()
    expect(adding.locator("[data-done]")).to_contain_text("clip_grad_norm was added")
    adding.get_by_label("Hook", exact=True).select_option("lr_scheduler")
    adding.get_by_label("scheduler", exact=True).select_option("ExponentialLR")
    adding.get_by_label("arguments").fill('{"gamma": 1}')
    adding.get_by_role("button", name="Add").click()
    expect(adding.locator("[data-done]")).to_contain_text("lr_scheduler was added")
    page.get_by_role("button", name="Move lr_scheduler", exact=False).first.click()
    wait_until(lambda: [name for name, _ in installed()] == ["lr_scheduler", "clip_grad_norm"], LONG_S)
    first = page.locator("section").filter(has_text="2. clip_grad_norm")
    first.get_by_label("max norm").fill("400")
    first.get_by_role("button", name="Apply").click()
    wait_until(lambda: installed()[1][1]["max_norm"] == 400.0, LONG_S)
    for _ in range(2):
        page.get_by_role("button", name="Remove").first.click()
        agree(page, "Remove")
        expect(page.get_by_role("dialog")).to_have_count(0)
    assert installed() == []


def test_a_snapshot_is_taken_and_restored_and_deleted(watched: Watched, served: RunningServer) -> None:
    page = watched.show(f"models/{MODEL}/snapshots")
    before = show_model(served, MODEL)
    page.get_by_role("button", name="Take a snapshot").click()
    agree(page, "Take it")
    taken = page.locator("[data-done] b").inner_text()
    row = page.locator(f'[data-snapshot="{taken}"]')
    with page.expect_download() as download:
        row.get_by_role("link", name=f"Download {taken}").click()
    assert download.value.suggested_filename == f"{MODEL}-{taken}.safetensors"
    row.get_by_role("button", name=f"Restore {taken}").click()
    expect(page.get_by_role("dialog")).to_contain_text("2 live workers will be told")
    agree(page, "Restore")
    expect(page.locator("[data-done]")).to_contain_text("Restored: the model is at version")
    after = show_model(served, MODEL)
    assert after["timeline"] == before["timeline"] + 1
    row.get_by_role("button", name=f"Delete {taken}").click()
    agree(page, "Cancel")
    assert row.count() == 1
    row.get_by_role("button", name=f"Delete {taken}").click()
    agree(page, "Delete")
    expect(row).to_have_count(0)
    listed = served.rest("GET", f"/v1/models/{MODEL}/snapshots").json()["snapshots"]
    assert taken not in [each["id"] for each in listed]


def test_a_worker_is_quarantined_and_released(
    watched: Watched, served: RunningServer, pushing: Pushing
) -> None:
    page = watched.show(f"models/{MODEL}/workers")
    row = page.locator('[data-worker="w1"]')
    row.get_by_role("button", name="Quarantine w1").click()
    agree(page, "Quarantine")
    expect(row.locator(".badge")).to_have_text("quarantined")
    expect(page.locator(".title .badge")).to_have_text("Attention")
    wait_until(lambda: pushing.refused.get("w1") == "quarantined", LONG_S)
    watched.show()
    expect(page.locator(".card .badge")).to_have_text("Attention")
    expect(page.locator(".verdict")).to_have_text("Something needs a look.")
    expect(page.locator(".card .why")).to_have_text("1 worker in quarantine.")
    watched.show(f"models/{MODEL}/workers")
    row.get_by_role("button", name="Release w1").click()
    agree(page, "Release")
    expect(row.locator(".badge")).to_have_text("live")
    wait_until(lambda: "w1" not in pushing.refused, LONG_S)
    assert show_worker(served, MODEL, "w1")["quarantined"] is False


def test_events_come_by_themselves(watched: Watched, served: RunningServer) -> None:
    page = watched.show(f"models/{MODEL}/events")
    page.locator(".events li").first.wait_for()
    served.rest("PATCH", f"/v1/models/{MODEL}/param-groups/1", json={"weight_decay": 0.0})
    expect(page.locator(".events li").first).to_contain_text(
        "Group 1: weight decay = 0".replace(" decay", "_decay")
    )


def test_it_is_worked_by_keyboard(watched: Watched, served: RunningServer) -> None:
    page = watched.show(f"models/{MODEL}/workers")
    button = page.get_by_role("button", name="Quarantine w0")
    button.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(button).to_be_focused()
    assert show_worker(served, MODEL, "w0")["quarantined"] is False


# --- for all who look


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(
    browser: Browser, served: RunningServer, pushing: Pushing, theme: str
) -> None:
    with tab(browser, served.http, theme=theme) as shown:
        page = shown.show()
        page.locator(".card").first.wait_for()
        found = {"overview": shown.violations()}
        for name in TABS:
            shown.show(f"models/{MODEL}/{name}")
            page.locator(".panel, .chart").first.wait_for()
            found[name] = shown.violations()
        shown.show(f"models/{MODEL}/workers")
        page.get_by_role("button", name="Evict w0").click()
        page.get_by_role("dialog").wait_for()
        found["dialog"] = shown.violations()
        assert found == {name: [] for name in found}


def test_nothing_is_wider_than_a_phone(browser: Browser, served: RunningServer, pushing: Pushing) -> None:
    with tab(browser, served.http, width=390) as shown:
        page = shown.show()
        page.locator(".card").first.wait_for()
        wider = {}
        for name in ("", *(f"models/{MODEL}/{each}" for each in TABS)):
            shown.show(name)
            page.locator(".card, .panel, .chart").first.wait_for()
            wider[name] = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            wider[name] += len(page.evaluate(BEYOND))
        assert {name: px for name, px in wider.items() if px > 0} == {}


def test_the_theme_is_the_system_s_until_one_is_chosen_and_stays(watched: Watched) -> None:
    page = watched.show()
    for system, other in (("dark", "Light"), ("light", "Dark")):
        page.emulate_media(color_scheme=system)  # type: ignore[arg-type]
        expect(page.get_by_role("button", name=f"{other} theme")).to_be_visible()
    page.get_by_role("button", name="Dark theme").click()
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    assert page.evaluate("getComputedStyle(document.body.parentElement).backgroundColor") == "rgb(14, 17, 22)"


# --- when the server goes; the last one, since the server of all these tests is started anew


def test_it_outlives_the_server(browser: Browser, served: RunningServer, pushing: Pushing) -> None:
    with tab(browser, served.http) as shown:
        page = shown.show(f"models/{MODEL}/events")
        page.locator(".figures").wait_for()
        served.process.send_signal(signal.SIGTERM)
        served.process.wait(LONG_S)
        served.close_pipe()
        expect(page.locator(".lost")).to_contain_text("The server does not answer")
        again = start_server(served.data, "--grpc", served.grpc, "--http", served.http)
        served.process = again.process
        expect(page.locator(".lost")).to_have_count(0)
        version = show_model(served, MODEL)["version"]
        wait_until(lambda: show_model(served, MODEL)["version"] > version, LONG_S)
        expect(page.locator(".title .badge")).to_have_text("Training")
        expect(page.locator(".events")).to_contain_text("The server was started anew")
        assert shown.outside() == []
        assert json.dumps(all_models(served)).count(MODEL) >= 1
