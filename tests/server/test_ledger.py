"""Which pushes are in what the model is now, after restores of restores."""

from __future__ import annotations

import pytest

from pushstep.proto.types_pb2 import Outcome
from pushstep.server.coordinator.policies import catalogue as policies
from tests.support.servers.judged import Court

ASYNC = policies.read({"policy": "async"})


@pytest.mark.parametrize(
    ("lineage", "held", "undone"),
    [
        ([], [(1, 0), (1, 99)], [(2, 1)]),
        ([(1, 5)], [(1, 5), (2, 6)], [(1, 6), (3, 1)]),
        ([(1, 5), (2, 9)], [(1, 5), (2, 9), (3, 10)], [(1, 6), (2, 10)]),
        # the second restore went back behind the first one: its timeline came to nothing
        ([(1, 3)], [(1, 3)], [(1, 4)]),
        # a snapshot of timeline 1 was restored when 2 was in force: 2 is no part of it
        ([(1, 5), (3, 7)], [(1, 5), (3, 7)], [(2, 6), (3, 8)]),
    ],
)
def test_what_a_model_holds(
    lineage: list[tuple[int, int]], held: list[tuple[int, int]], undone: list[tuple[int, int]]
) -> None:
    commits = Court().commits
    if lineage:
        commits.go_back(lineage, lineage[-1][0] + 1)
        assert commits.version == lineage[-1][1]
    assert [commits.holds(*push) for push in held] == [True] * len(held)
    assert [commits.holds(*push) for push in undone] == [False] * len(undone)


def test_a_join_tells_what_restores_have_undone() -> None:
    court = Court()
    court.join("a", "b")
    for value in (1.0, 2.0, float("nan"), 3.0):
        court.push("a", value)

    def told() -> list[tuple[int, int]]:
        court.join("a", takeover=True)
        receipts = court.coordinator.receipts_of(court.coordinator.sessions.workers["a"])
        return [(int(receipt.version), receipt.outcome) for receipt in receipts]

    applied, rejected, undone = (
        Outcome.OUTCOME_APPLIED,
        Outcome.OUTCOME_REJECTED,
        Outcome.OUTCOME_SUPERSEDED,
    )
    assert told() == [(1, applied), (2, applied), (2, rejected), (3, applied)]
    for timeline, lineage, second, third in (
        (2, [(1, 2)], applied, undone),
        (3, [(1, 1)], undone, undone),
        (4, [(1, 3)], applied, applied),  # an operator has thought better of it
    ):
        court.do(court.coordinator.restored(lineage, timeline, ASYNC, court.now_s))
        assert told() == [(1, applied), (2, second), (2, rejected), (3, third)]
