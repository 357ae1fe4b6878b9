"""A worker that steps in any of the ways there are, and a restore that meets it at any point of a step.

Push number k has the gradient 2**k (see counting.py), so the model says which pushes it is made of. What falls into
the middle of a step is put where the session waits for its answer: everything on either side of that is the real one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from pushstep.client import Outcome, Receipt
from pushstep.client.transport.attempts import Sending
from pushstep.optim import Adagrad
from pushstep.proto.errors import NoAnswer, Superseded
from tests.support.servers.harness import RunningServer, wait_until
from tests.support.servers.operators import patch_group, restore, set_policy, take_snapshot
from tests.support.workers.counting import counts

NAMES = ("a", "b")
GROUPS = [{"rule": "adagrad", "params": list(NAMES), "lr": 0.5}]
WARM_UP = 2  # pushes before the snapshot; overlap learns from them
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {},
    "prefetch": {"prefetch": True},
    "overlap": {"overlap": True},
}
INTERFACES = ("push", "exchange", *OPTIMIZERS)


class Trainer:
    """One worker, whichever way it steps."""

    def __init__(
        self, server: RunningServer, model: str, interface: str, on_restore: str = "continue"
    ) -> None:
        self.interface = interface
        self.session = server.connect(
            model, shared_memory=interface == "shared", on_restore=on_restore, retry_for_s=20.0
        )
        self.receipts: dict[int, Receipt] = {}
        self.after_backward: Callable[[], object] = lambda: None
        self._number = 0
        self._flying: int | None = None
        if interface in OPTIMIZERS:
            self.parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in NAMES]
            self.remote = self.session.attach(
                Adagrad(self.parameters, lr=0.5), names=NAMES, **OPTIMIZERS[interface]
            )
        else:
            self.session.create({name: np.zeros(3, np.float32) for name in NAMES}, GROUPS)

    def step(self) -> None:
        """The next push."""
        number, self._number = self._number, self._number + 1
        if self.interface not in OPTIMIZERS:
            self._step_arrays(number)
            return
        self.remote.zero_grad()
        sum((p * 2.0**number).sum() for p in self.parameters).backward()  # type: ignore[union-attr]
        self._call_once()
        if self.interface != "prefetch":
            self.remote.step()
            self._told(number)
            return
        landed, self._flying = self._flying, None
        self.remote.step()
        self._told(landed)
        self._flying = number

    def _call_once(self) -> None:
        call, self.after_backward = self.after_backward, lambda: None
        call()

    def _step_arrays(self, number: int) -> None:
        grads = {name: np.full(3, 2.0**number, np.float32) for name in NAMES}
        self._call_once()
        if self.interface == "push":
            self.receipts[number] = self.session.push(grads)
        else:
            self.receipts[number] = self.session.exchange(grads)[0]

    def _told(self, number: int | None) -> None:
        if number is not None:
            assert self.remote.last_receipt is not None
            self.receipts[number] = self.remote.last_receipt

    def land(self) -> None:
        """Have nothing in flight."""
        if self.interface == "prefetch":
            landed, self._flying = self._flying, None
            self.remote.synchronize()
            self._told(landed)

    def check(self, server: RunningServer, restored: int) -> None:
        """What is held here, and what the receipts say, is what the server has: it was restored to version `restored`."""
        model = self.session.model
        reader = server.connect(model, "reader")
        theirs = {name: torch.from_numpy(value) for name, value in reader.pull().items()}
        if self.interface in OPTIMIZERS:
            assert all(
                torch.equal(p.detach(), theirs[n]) for n, p in zip(NAMES, self.parameters, strict=True)
            )
            (group,) = server.rest("GET", f"/v1/models/{model}/param-groups").json()["param_groups"]
            assert self.remote.param_groups[0]["lr"] == group["lr"] == 0.5
        elif self.interface == "exchange":
            assert all(torch.equal(torch.from_numpy(v), theirs[n]) for n, v in self.session.pull().items())
        told = [self.receipts.get(number) for number in range(self._number)]
        applied = counts(reader, self._number)
        for receipt, times in zip(told, applied, strict=True):
            if receipt is None:
                assert times <= 1
            else:
                stands = receipt.timeline == 2 or receipt.version <= restored
                assert times == (receipt.outcome is Outcome.APPLIED and stands), (told, applied)


@dataclass
class Meeting:
    """A restore, and the point of a step at which it comes."""

    server: RunningServer
    trainer: Trainer
    recent: bool
    old: dict[str, Any]
    to: int = 0  # the version that it restored
    met: bool = False

    def restore(self) -> None:
        """Restore; to what the model is now, but for the lr, if `recent`."""
        model, self.met = self.trainer.session.model, True
        snapshot = take_snapshot(self.server, model) if self.recent else self.old
        self.to = snapshot["version"]
        patch_group(self.server, model, 0, lr=7.0)
        restore(self.server, model, snapshot["id"])

    def put_in(self, patch: pytest.MonkeyPatch, of_push: Callable[[Callable[[], Any]], Any]) -> None:
        """Have `of_push` make the next push's attempts."""
        retry = self.trainer.session._worker.membership.retry
        run = retry.run

        def met(attempt: Callable[[], Any]) -> Any:
            if isinstance(attempt, Sending) and not self.met:
                return of_push(lambda: run(attempt))
            return run(attempt)

        patch.setattr(retry, "run", met)


def no_answer() -> NoAnswer:
    return NoAnswer(address="here", seconds=0, problem="on purpose")


# By name, what happens from a step's beginning to its end; where the restore is.


def between_steps(meeting: Meeting, patch: pytest.MonkeyPatch) -> None:
    meeting.restore()


def after_backward(meeting: Meeting, patch: pytest.MonkeyPatch) -> None:
    meeting.trainer.after_backward = meeting.restore


def pulled_meanwhile(meeting: Meeting, patch: pytest.MonkeyPatch) -> None:
    meeting.restore()
    meeting.trainer.session.pull()


def before_the_push_leaves(meeting: Meeting, patch: pytest.MonkeyPatch) -> None:
    def push(run: Callable[[], Any]) -> Any:
        meeting.restore()
        return run()

    meeting.put_in(patch, push)


def answer_is_lost(meeting: Meeting, patch: pytest.MonkeyPatch) -> None:
    """Applied; the restore comes before it is sent again."""
    retry = meeting.trainer.session._worker.membership.retry
    run = retry.run

    def lossy(attempt: Callable[[], Any]) -> Any:
        if isinstance(attempt, Sending) and not meeting.met:
            attempt()
            attempt.in_doubt = True
            meeting.restore()
        return run(attempt)

    patch.setattr(retry, "run", lossy)


def parameters_are_of_after_it(meeting: Meeting, patch: pytest.MonkeyPatch) -> None:
    """Applied; the restore comes before the server reads the parameters that it answers with."""

    def push(run: Callable[[], Any]) -> Any:
        receipt, pulled = run()
        meeting.restore()
        if pulled is None or pulled.header.shared:  # in a region they are read before the receipt is sent
            return receipt, pulled
        later = meeting.trainer.session._worker.pull_message(None)
        del later.header.groups[:]
        later.header.groups.extend(pulled.header.groups)
        return receipt, later

    meeting.put_in(patch, push)


def answer_is_here(meeting: Meeting, patch: pytest.MonkeyPatch) -> None:
    def push(run: Callable[[], Any]) -> Any:
        answer = run()
        meeting.restore()
        return answer

    meeting.put_in(patch, push)


def nobody_answers(meeting: Meeting, patch: pytest.MonkeyPatch) -> None:
    """Applied; given up before the restore."""

    def push(run: Callable[[], Any]) -> Any:
        run()
        meeting.restore()
        raise no_answer()

    meeting.put_in(patch, push)


def nobody_answers_but_a_pull(meeting: Meeting, patch: pytest.MonkeyPatch) -> None:
    """What is held is of the later timeline when the push in doubt is settled."""
    nobody_answers(meeting, patch)
    with pytest.raises(NoAnswer):
        meeting.trainer.step()
        meeting.trainer.land()
    meeting.trainer.session.pull()


def the_pull_after_it_fails(meeting: Meeting, patch: pytest.MonkeyPatch) -> None:
    """Told; and what is held is what was held before."""
    meeting.restore()
    pull, failed = meeting.trainer.session._worker.pull_message, []

    def failing(have: Any) -> Any:
        if not failed:
            failed.append(have)
            raise no_answer()
        return pull(have)

    patch.setattr(meeting.trainer.session._worker, "pull_message", failing)


def waits_in_a_round(meeting: Meeting, patch: pytest.MonkeyPatch) -> None:
    server, model = meeting.server, meeting.trainer.session.model
    server.connect(model, "w1").member()
    set_policy(server, model, policy="sync", min_workers=2, timeout_s=None)

    def waiting() -> bool:
        shown = server.rest("GET", f"/v1/models/{model}/workers").json()["workers"]
        return any(worker["name"] == "w0" and worker["round"] == "present" for worker in shown)

    def push(run: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(1) as other:
            running: Future[Any] = other.submit(run)
            wait_until(waiting)
            meeting.restore()
            set_policy(server, model, policy="async")  # a recent snapshot brings the round back
            return running.result(30)

    meeting.put_in(patch, push)


POINTS = (
    between_steps,
    after_backward,
    pulled_meanwhile,
    before_the_push_leaves,
    answer_is_lost,
    parameters_are_of_after_it,
    answer_is_here,
    nobody_answers,
    nobody_answers_but_a_pull,
    the_pull_after_it_fails,
    waits_in_a_round,
)
Point = Callable[[Meeting, pytest.MonkeyPatch], None]


def met(
    server: RunningServer, trainer: Trainer, point: Point, patch: pytest.MonkeyPatch, *, recent: bool
) -> str:
    """Step over a restore until two steps in a row were applied behind it; what was said of it."""
    for _ in range(WARM_UP):
        trainer.step()
    trainer.land()
    meeting = Meeting(server, trainer, recent, take_snapshot(server, trainer.session.model))
    said: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        point(meeting, patch)
        for _ in range(6):
            try:
                trainer.step()
            except Superseded as error:
                said.append(error.message)
            except NoAnswer:
                continue
        trainer.land()
    assert meeting.met
    trainer.check(server, meeting.to)
    last = [trainer.receipts[number] for number in sorted(trainer.receipts)[-2:]]
    goes_on = [(r.outcome, r.timeline) for r in last] == [(Outcome.APPLIED, 2)] * 2
    assert goes_on, f"the last steps are not applied: {last}"
    # what was computed on the ended timeline is not applied: one push, or with prefetch the one in flight, too
    superseded = [r for r in trainer.receipts.values() if r.outcome is Outcome.SUPERSEDED]
    assert len(superseded) <= (2 if trainer.interface == "prefetch" else 1)
    if point is the_pull_after_it_fails and trainer.interface in OPTIMIZERS:
        assert superseded, "what was computed on the ended timeline's parameters is applied"
    said += [str(warning.message) for warning in warned]
    assert len(said) == 1, f"the restore is told {len(said)} times"
    return said[0]


def answered_once_more(trainer: Trainer, patch: pytest.MonkeyPatch, between: Callable[[], object]) -> None:
    """Have the next push's answer be lost, and `between` happen before it is sent again."""
    retry = trainer.session._worker.membership.retry
    run = retry.run

    def lossy(attempt: Callable[[], Any]) -> Any:
        if isinstance(attempt, Sending) and not attempt.in_doubt:
            attempt()
            attempt.in_doubt = True
            between()
        return run(attempt)

    patch.setattr(retry, "run", lossy)
