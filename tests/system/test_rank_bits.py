"""The bits of a long training for each number of ranks under torchrun: those of one server, whatever is trained.

`make test` has the short version, with three ranks (`test_ranks.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks.group import Torchrun
from tests.support.servers.harness import RunningServer, running_server
from tests.system.test_ranks import TRAININGS, Training, adagrad, in_rounds, model_of, trained

STEPS = 200
CASES: dict[str, Callable[[RunningServer], Any]] = {
    **{
        name: lambda server, name=name: trained(server, model_of(name), TRAININGS[name], steps=STEPS)
        for name in TRAININGS
    },
    "four workers": lambda server: trained(server, "four", Training(adagrad, sparse=True), 4, STEPS),
    "four workers, top-k": lambda server: trained(server, "four-top-k", TRAININGS["top-k"], 4, STEPS),
    "rounds of three": lambda server: in_rounds(server, Training(adagrad, sparse=True), STEPS),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """What one server makes of each case, which it is asked for once."""
    known: dict[str, Any] = {}
    with running_server(tmp_path_factory.mktemp("alone")) as server:

        def of(case: str) -> Any:
            if case not in known:
                known[case] = CASES[case](server)
            return known[case]

        yield of


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_same_bits_for_each_number_of_ranks(
    tmp_path: Path, expected: Callable[[str], Any], world: int
) -> None:
    """200 steps of each case: 16 minutes for all four on two cores that others use, too."""
    group = Torchrun(tmp_path, world, restarts=0)
    try:
        server = group.leader
        assert server.rest("GET", "/v1").json()["ranks"] == world
        different = [case for case in CASES if CASES[case](server) != expected(case)]
        assert not different
    finally:
        group.stop()
    print(f"{world} ranks: {len(CASES)} cases of {STEPS} steps, the same bits")
