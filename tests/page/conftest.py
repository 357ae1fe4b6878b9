"""A browser for the tests of one file, and tabs whose errors and requests are looked at when they close."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
from playwright.sync_api import Browser

from tests.support.browser.chromium import Watched, chromium, tab
from tests.support.servers.harness import RunningServer


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def watching(browser: Browser) -> Callable[[RunningServer], AbstractContextManager[Watched]]:
    """A tab at a server for a block, in which nothing went elsewhere, and no error was seen that was not expected."""

    @contextlib.contextmanager
    def opened(server: RunningServer) -> Iterator[Watched]:
        with tab(browser, server.http) as shown:
            yield shown
        assert shown.unexpected() == []
        assert shown.outside() == []

    return opened
