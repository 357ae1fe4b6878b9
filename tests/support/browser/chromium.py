"""Debian's Chromium without a window, driven by playwright; pages that note what they request and complain of."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

# It reaches nothing by itself, and needs neither a GPU nor rights of its own.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 60_000
expect.set_options(timeout=PATIENCE_MS)
SERIOUS = ("serious", "critical")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with an empty profile, for a block."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=[*FLAGS])
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watched:
    """A tab, with all that it has requested, and all errors that its console shows."""

    page: Page
    root: str
    requested: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    # words of errors that a test provokes: a browser reports every answer that is one, however often the page asks
    expected: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on("request", self._note)
        self.page.on("console", self._complain)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _note(self, request: Request) -> None:
        self.requested.append(request.url)

    def _complain(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def show(self, place: str = "") -> Page:
        """Go to a view, such as `models/flights/workers`."""
        self.page.goto(f"{self.root}/ui#/{place}")
        return self.page

    def unexpected(self) -> list[str]:
        """Errors in which none of the expected words is."""
        return [error for error in self.errors if not any(word in error for word in self.expected)]

    def outside(self) -> list[str]:
        """Requests that went anywhere but to the server."""
        return [url for url in self.requested if not url.startswith((f"{self.root}/", "blob:", "data:"))]

    def violations(self) -> list[str]:
        """What axe-core finds serious in what is shown now."""
        found = Axe().run(self.page).response["violations"]
        return [
            f"{each['id']}: {[node['html'][:200] for node in each['nodes'][:3]]}"
            for each in found
            if each["impact"] in SERIOUS
        ]


@contextlib.contextmanager
def tab(browser: Browser, root: str, *, width: int = 1440, theme: str = "light") -> Iterator[Watched]:
    """A tab in a profile of its own, for a block; `root`: HOST:PORT of the server."""
    is_dark = "dark" if theme == "dark" else "light"
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=is_dark, accept_downloads=True
    )
    try:
        yield Watched(context.new_page(), f"http://{root}")
    finally:
        context.close()
