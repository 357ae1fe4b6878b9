"""A restore at each point of a step, through each way of stepping: told once, and training goes on from what was restored.

Beside steps: joining again, uploads, and whatever else may be what finds the restore.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pushstep.client import Outcome
from pushstep.client.attachment import buffers as extras
from pushstep.client.optimizer import overlap
from pushstep.client.transport.attempts import Sending
from pushstep.client.transport.retry import TransportFailure
from pushstep.optim import Adagrad
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import FateUnknown, Fenced, NoAnswer, Superseded
from tests.simulation.seeded_bugs import Bug, found_by
from tests.support.servers.harness import RunningServer
from tests.support.servers.operators import evict, patch_group, restore, take_snapshot
from tests.support.workers.counting import counts
from tests.support.workers.restore_points import (
    INTERFACES,
    NAMES,
    POINTS,
    Meeting,
    Point,
    Trainer,
    answer_is_lost,
    answered_once_more,
    between_steps,
    met,
    no_answer,
    nobody_answers,
    parameters_are_of_after_it,
)


@pytest.fixture(autouse=True)
def leaving(server: RunningServer) -> Iterator[None]:
    """Sessions end with their test: there are many."""
    before = len(server.sessions)
    yield
    for session in server.sessions[before:]:
        session.close()


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets that these small models fill."""
    monkeypatch.setattr(overlap, "BUCKET_BYTES", 4)


# what the restore brings back matters where the push was applied before it
CASES = [(point, False) for point in POINTS] + [
    (point, True) for point in (answer_is_lost, parameters_are_of_after_it, nobody_answers)
]


@pytest.mark.parametrize(
    ("point", "recent"), CASES, ids=lambda given: given.__name__ if callable(given) else "recent" * given
)
@pytest.mark.parametrize("interface", INTERFACES)
def test_a_restore_is_told_once(
    server: RunningServer,
    model_name: str,
    interface: str,
    point: Point,
    recent: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = Trainer(server, model_name, interface)
    said = met(server, trainer, point, monkeypatch, recent=recent)
    held = recent and point is answer_is_lost
    assert re.search(
        rf"\(timeline 2\); this step was {'applied before' if held else 'not applied'}, going on", said
    )


@pytest.mark.parametrize("point", [between_steps, answer_is_lost, nobody_answers], ids=lambda p: p.__name__)
@pytest.mark.parametrize("recent", [False, True], ids=["old", "recent"])
@pytest.mark.parametrize("interface", ["push", "plain", "prefetch"])
def test_a_restore_is_told_once_by_an_error(
    server: RunningServer,
    model_name: str,
    interface: str,
    point: Point,
    recent: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = Trainer(server, model_name, interface, on_restore="raise")
    said = met(server, trainer, point, monkeypatch, recent=recent)
    assert "is on timeline 2 since a restore" in said


@pytest.mark.parametrize("bug", found_by("restores"), ids=str)
def test_a_seeded_bug_is_found(
    server: RunningServer, model_name: str, bug: Bug, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(server, model_name, "plain")
    point = parameters_are_of_after_it if "parameters" in str(bug) else nobody_answers
    bug.put_in(monkeypatch)
    with pytest.raises(AssertionError, match=bug.says):
        met(server, trainer, point, monkeypatch, recent=False)


@pytest.mark.parametrize("what", ["lease", "old", "recent"])
def test_an_upload_whose_answer_was_lost_is_settled(
    server: RunningServer, model_name: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Before it is sent again the lease ends, or a restore comes: its receipt is not the next push's."""
    trainer = Trainer(server, model_name, "push")
    session = trainer.session
    trainer.step()
    meeting = Meeting(server, trainer, what == "recent", take_snapshot(server, model_name))
    upload = session._worker.membership.transport.upload

    def lossy(*sent: Any) -> Any:
        monkeypatch.undo()
        upload(*sent)
        if what == "lease":
            session._worker.membership.transport.leave(
                pb.LeaveRequest(model=model_name, identity=session.member().identity())
            )
        else:
            meeting.restore()
        raise TransportFailure("lost on purpose")

    monkeypatch.setattr(session._worker.membership.transport, "upload", lossy)
    values = {name: np.full(3, 8, np.float32) for name in NAMES}
    if what == "lease":
        assert session.upload(values) == 2
    else:
        with pytest.raises(Superseded, match="on timeline 2"):
            session.upload(values)
    trainer.step()
    receipt = trainer.receipts[1]
    expected = {"lease": (1, 3), "old": (2, 2), "recent": (2, 3)}[what]
    assert (receipt.outcome, receipt.timeline, receipt.version) == (Outcome.APPLIED, *expected)
    assert counts(session, 2) == [1, 1]
    assert bool((server.connect(model_name, "reader").pull()["a"] > 4).all()) == (what != "old")


def test_an_upload_after_a_restore_is_told_once(server: RunningServer, model_name: str) -> None:
    """By its error; then uploads and steps go on in the new timeline."""
    trainer = Trainer(server, model_name, "push")
    snapshot = take_snapshot(server, model_name)["id"]
    restore(server, model_name, snapshot)
    values = {name: np.zeros(3, np.float32) for name in NAMES}
    with pytest.raises(Superseded, match="on timeline 2"):
        trainer.session.upload(values)
    assert trainer.session.upload(values) == 1
    trainer.step()
    assert (trainer.receipts[0].outcome, trainer.receipts[0].version) == (Outcome.APPLIED, 2)


def test_loading_a_state_after_a_restore_is_told_once(server: RunningServer, model_name: str) -> None:
    trainer = Trainer(server, model_name, "plain")
    trainer.step()
    state = trainer.remote.state_dict()
    trainer.step()
    restore(server, model_name, take_snapshot(server, model_name)["id"])
    with pytest.raises(Superseded, match="on timeline 2"):
        trainer.remote.load_state_dict(state)
    trainer.remote.load_state_dict(state)
    assert trainer.session.member().timeline == 3
    trainer.step()
    trainer.step()
    assert [trainer.receipts[n].outcome for n in (2, 3)] == [Outcome.APPLIED] * 2


def test_buffers_that_meet_a_restore_fail_no_step(
    server: RunningServer, model_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "EVERY_STEPS", 1)
    module = torch.nn.BatchNorm1d(3)
    session = server.connect(model_name)
    remote = session.attach(Adagrad(module.parameters(), lr=0.5), module=module)
    snapshot = take_snapshot(server, model_name)["id"]
    run = session._worker.membership.retry.run

    def restored(attempt: Callable[[], Any]) -> Any:
        answer = run(attempt)
        if isinstance(attempt, Sending) and answer[0].timeline == 1:
            restore(server, model_name, snapshot)
        return answer

    monkeypatch.setattr(session._worker.membership.retry, "run", restored)
    module(torch.randn(4, 3)).sum().backward()
    remote.step()
    assert remote.last_receipt is not None
    assert remote.last_receipt.outcome is Outcome.APPLIED
    with pytest.warns(RuntimeWarning, match="restored to version 0"):
        remote.step()


@pytest.mark.parametrize("why", ["evicted", "another session joined"])
def test_a_restore_lifts_no_fence(server: RunningServer, model_name: str, why: str) -> None:
    """Who was fenced, and has not noticed yet, does not come back by joining again."""
    trainer = Trainer(server, model_name, "push")
    trainer.step()
    heir = server.connect(model_name, takeover=why != "evicted")
    if why == "evicted":
        evict(server, model_name, "w0")
    else:
        heir.member()
    restore(server, model_name, take_snapshot(server, model_name)["id"])
    for _ in range(2):
        with pytest.raises(Fenced, match=why):
            trainer.step()
    if why != "evicted":
        with pytest.warns(RuntimeWarning, match="restored to version 1"):
            heir.push({name: np.ones(3, np.float32) for name in NAMES})
    # by hand it may
    receipt = heir.push({name: np.ones(3, np.float32) for name in NAMES})
    assert (receipt.outcome, receipt.version) == (Outcome.APPLIED, 2)


def test_joining_again_whose_answer_was_lost_is_the_same_join(
    server: RunningServer, model_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given up, and asked for once more at the next step: it has its epoch already, and waits for no lease."""
    trainer = Trainer(server, model_name, "push")
    trainer.step()
    transport = trainer.session._worker.membership.transport
    transport.leave(pb.LeaveRequest(model=model_name, identity=trainer.session.member().identity()))
    join = transport.join

    def lossy(request: pb.JoinRequest) -> Any:
        join(request)
        monkeypatch.undo()
        raise no_answer()

    monkeypatch.setattr(transport, "join", lossy)
    with pytest.raises(NoAnswer):
        trainer.step()
    trainer.step()
    assert (trainer.receipts[2].epoch, trainer.receipts[2].version) == (2, 2)


def test_a_push_in_doubt_of_who_is_fenced_is_not_said_to_be_rejected(
    server: RunningServer, model_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was applied, and who is fenced may not join again to find out."""
    trainer = Trainer(server, model_name, "push")
    trainer.step()
    answered_once_more(trainer, monkeypatch, lambda: evict(server, model_name, "w0"))
    with pytest.raises(FateUnknown, match="push 2 of worker 'w0'"):
        trainer.step()
    monkeypatch.undo()
    with pytest.raises(Fenced, match="evicted"):
        trainer.step()
    assert counts(server.connect(model_name, "reader"), 2) == [1, 1]


def test_a_step_that_joining_again_has_settled_takes_the_groups(
    server: RunningServer, model_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(server, model_name, "plain")
    session = trainer.session

    def between() -> None:
        patch_group(server, model_name, 0, lr=0.25)
        session._worker.membership.transport.leave(
            pb.LeaveRequest(model=model_name, identity=session.member().identity())
        )

    answered_once_more(trainer, monkeypatch, between)
    trainer.step()
    assert trainer.receipts[0].outcome is Outcome.APPLIED
    assert session.member().epoch == 2
    assert trainer.remote.param_groups[0]["lr"] == 0.25


def test_a_loaded_state_that_a_restore_has_undone_is_not_said_to_hold(
    server: RunningServer, model_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(server, model_name, "plain")
    trainer.step()
    state = trainer.remote.state_dict()
    trainer.step()
    snapshot = take_snapshot(server, model_name)["id"]
    upload = trainer.session._worker.membership.transport.upload

    def lossy(*sent: Any) -> Any:
        monkeypatch.undo()
        upload(*sent)
        restore(server, model_name, snapshot)
        raise TransportFailure("lost on purpose")

    monkeypatch.setattr(trainer.session._worker.membership.transport, "upload", lossy)
    with pytest.raises(Superseded, match="on timeline 3"):
        trainer.remote.load_state_dict(state)
    trainer.step()
    trainer.step()
    assert trainer.receipts[3].outcome is Outcome.APPLIED
    assert counts(trainer.session, 4) == [1, 1, 0, 1]
