"""The page of a job of two ranks: a table of them below the models. A server alone has none (tests/page/test_page.py)."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import pytest
from playwright.sync_api import expect

from tests.support.browser.chromium import Watched
from tests.support.ranks.group import RankGroup, running_ranks
from tests.support.servers.harness import RunningServer

pytestmark = pytest.mark.chromium
GRADIENT = {"weight": np.ones((20_000, 8), np.float32)}


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankGroup]:
    with running_ranks(tmp_path_factory.mktemp("ranks"), 2) as ranks:
        session = ranks.leader.connect("flights", "w0")
        session.create(GRADIENT)
        session.exchange(GRADIENT)
        yield ranks


def test_the_ranks_of_a_job(
    group: RankGroup, watching: Callable[[RunningServer], AbstractContextManager[Watched]]
) -> None:
    with watching(group.leader) as shown:
        page = shown.show()
        table = page.get_by_role("region", name="Ranks")
        rows = table.locator("tbody tr")
        expect(rows).to_have_count(2)
        for number, rank in enumerate(group.ranks):
            expect(rows.nth(number)).to_contain_text("serving")
            expect(rows.nth(number)).to_contain_text(rank.grpc)
            expect(rows.nth(number)).to_contain_text("iB of 1 TiB")
        expect(page.get_by_text("All ranks are ready.")).to_be_visible()
        assert shown.violations() == []
        # one that does not answer is marked, with the age of what is shown of it
        group.ranks[1].process.send_signal(signal.SIGSTOP)
        try:
            expect(rows.nth(1)).to_contain_text("as of")
        finally:
            group.ranks[1].process.send_signal(signal.SIGCONT)
        expect(rows.nth(1)).not_to_contain_text("as of")
