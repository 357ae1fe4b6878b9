"""Edits are planned in one place, once for each push unless something changes; receipts are written in one place."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pushstep.server
from pushstep.proto.training_pb2 import GroupEdit
from pushstep.proto.wire.hyperparameters import wire_values
from pushstep.server.coordinator.groups import OperatorEdit, ParamGroups
from tests.support.servers.judged import Court

SERVER = Path(pushstep.server.__file__).parent


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What was planned, by its edits."""
    seen: list[Any] = []
    plan = ParamGroups.plan

    def counting(self: ParamGroups, edits: Any, *rest: Any) -> Any:
        seen.append(edits)
        return plan(self, edits, *rest)

    monkeypatch.setattr(ParamGroups, "plan", counting)
    yield seen


def edit(lr: float) -> list[GroupEdit]:
    return [GroupEdit(group=0, values=wire_values({"lr": lr}))]


def pinned(court: Court) -> None:
    court.commits.groups.patch(0, OperatorEdit({"lr": 0.5}, True), "m")


def patched(court: Court) -> None:
    court.commits.groups.patch(0, OperatorEdit({"eps": 0.5}, False), "m")


def elsewhere(court: Court) -> None:
    court.commits.groups.patch(1, OperatorEdit({"lr": 0.5}, True), "m")


def lead_leaves(court: Court) -> None:
    _, decisions = court.coordinator.on_leave(court.identity("a"), court.now_s)
    court.do(decisions)


@pytest.mark.parametrize(
    ("between", "planned", "lr", "ignored"),
    [
        (lambda court: None, 1, 0.25, []),
        (elsewhere, 1, 0.25, []),
        (patched, 2, 0.25, []),
        (pinned, 2, 0.5, ["0.lr"]),
        (lead_leaves, 2, None, ["0.lr"]),
    ],
    ids=[
        "nothing",
        "another group is patched",
        "another field is patched",
        "the field is pinned",
        "the lead leaves",
    ],
)
def test_edits_are_planned_again_only_if_something_has_changed(
    plans: list[Any], between: Callable[[Court], None], planned: int, lr: float | None, ignored: list[str]
) -> None:
    court = Court(policy="sync", min_workers=2, timeout_s=None)
    court.join("a", "b")
    before = court.commits.groups.list[0].values["lr"]
    push = court.push("a", edits=edit(0.25))
    assert (court.outcome(push), len(plans)) == ("pending", 1)
    between(court)
    plans_of_leave = len([edits for edits in plans if not edits])
    if between is lead_leaves:
        court.join("c")
        court.push("c")
    court.push("b")
    assert len(plans) - plans_of_leave == planned
    assert court.outcome(push) == "applied"
    assert court.commits.groups.list[0].values["lr"] == (before if lr is None else lr)
    assert list(court.receipt(push).ignored_edits) == ignored


def test_a_push_without_edits_plans_nothing(plans: list[Any]) -> None:
    court = Court()
    court.join("a")
    assert court.outcome(court.push("a")) == "applied"
    assert not plans


def test_one_file_makes_receipts_and_states_their_outcomes() -> None:
    """Elsewhere they are read, copied and parsed."""
    written = set()
    for path in SERVER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            makes = (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Receipt"
            )
            targets = node.targets if isinstance(node, ast.Assign) else []
            flat = [one for target in targets for one in getattr(target, "elts", [target])]
            states = any(isinstance(one, ast.Attribute) and one.attr == "outcome" for one in flat)
            if makes or states:
                written.add(path.relative_to(SERVER).as_posix())
    assert written == {"coordinator/receipts.py"}
