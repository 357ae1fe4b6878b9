"""Policies and the gate through a real server: chosen, shown, changed live, kept, and what workers are told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pushstep.client import Outcome, Receipt, Session, connect
from pushstep.proto.errors import Fenced, InvalidSettings, NonfiniteGradient, OverCapacity, Quarantined
from tests.support.servers.harness import RunningServer, running_server, wait_until
from tests.support.servers.operators import restore, take_snapshot
from tests.support.workers.wire import created, untouched

GROUPS = [{"rule": "adagrad", "params": ["p"]}]
START = {"p": np.zeros(4, np.float32)}
NAN = {"p": np.full(4, np.nan, np.float32)}


def grads(value: float = 1.0) -> dict[str, np.ndarray[Any, Any]]:
    return {"p": np.full(4, value, np.float32)}


def patch(server: RunningServer, model: str, what: str = "policy", **settings: Any) -> dict[str, Any]:
    answer = server.rest("PATCH", f"/v1/models/{model}/{what}", json=settings)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def worker(server: RunningServer, model: str, name: str) -> dict[str, Any]:
    shown = server.rest("GET", f"/v1/models/{model}/workers").json()["workers"]
    found: dict[str, Any] = next(entry for entry in shown if entry["name"] == name)
    return found


@contextmanager
def sessions(server: RunningServer, model: str, *names: str, **options: Any) -> Iterator[list[Session]]:
    with ExitStack() as stack:
        opened = []
        for name in names:
            session = stack.enter_context(
                connect(server.grpc, model=model, worker=name, timeout_s=20, retry_for_s=30)
            )
            session.create(START, GROUPS, **(options if not opened else {}))
            opened.append(session)
        yield opened


def test_a_policy_is_set_at_creation_and_later_ones_are_told(server: RunningServer, model_name: str) -> None:
    wanted = {"policy": "bounded", "bound": 5}
    with sessions(server, model_name, "a", policy=wanted):
        assert server.rest("GET", f"/v1/models/{model_name}/policy").json() == {
            **wanted,
            "effective_version": 1,
        }
        parameter = torch.nn.Parameter(torch.zeros(4))
        with connect(server.grpc, model=model_name, worker="b") as other:
            optimizer = torch.optim.Adagrad([{"params": [parameter]}])
            with pytest.warns(RuntimeWarning, match="policy 'bounded' and not 'sync'"):
                other.attach(optimizer, names=["p"], policy="sync")
    with connect(server.grpc, model=f"{model_name}-wrong", worker="a") as session:
        with pytest.raises(InvalidSettings, match="no policy 'eventual'"):
            session.create(START, policy="eventual")
        session.create(START, policy="async")  # the name is free again


def test_changes_are_events_and_outlive_the_server(data: Path) -> None:
    policy = {
        "policy": "sync",
        "quorum": 2,
        "late": "carry",
        "timeout_s": 7.0,
        "reduce": "sum",
        "min_workers": 1,
    }
    gate = {"nonfinite": "skip", "norm_outlier": 6.0, "norm_warmup": 9, "quarantine_after": None}
    with running_server(data) as server, sessions(server, "m", "a") as (session,):
        session.push(grads())
        taken = take_snapshot(server, "m")
        assert patch(server, "m", **policy) == {**policy, "effective_version": 2}
        patch(server, "m", "gate", **gate)
        events = server.rest("GET", "/v1/models/m/events").json()["events"]
        assert [event["kind"] for event in events[-2:]] == ["policy_changed", "gate_changed"]
        assert {key: events[-2][key] for key in policy} == policy
    with running_server(data) as server:
        assert server.rest("GET", "/v1/models/m/policy").json() == {**policy, "effective_version": 2}
        shown = server.rest("GET", "/v1/models/m/gate").json()
        assert {key: shown[key] for key in gate} == gate
        assert shown["norms_seen"] == 1
        restore(server, "m", taken["id"])
        assert server.rest("GET", "/v1/models/m/policy").json()["policy"] == "async"
        assert server.rest("GET", "/v1/models/m/gate").json()["nonfinite"] == "reject"


@pytest.mark.parametrize(
    ("what", "body"),
    [
        ("policy", {"policy": "eventual"}),
        ("policy", {"bound": 3}),
        ("policy", {"policy": "sync", "timeout_s": -1}),
        ("gate", {"nonfinite": "hope"}),
        ("gate", {"sigma": 3}),
    ],
)
def test_wrong_settings_change_nothing(
    server: RunningServer, model_name: str, what: str, body: dict[str, Any]
) -> None:
    created(server, model_name)
    before = server.rest("GET", f"/v1/models/{model_name}/{what}").json()
    with untouched(server, model_name):
        answer = server.rest("PATCH", f"/v1/models/{model_name}/{what}", json=body)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_settings")
    assert server.rest("GET", f"/v1/models/{model_name}/{what}").json() == before


def test_a_round_must_fit_into_staging(data: Path) -> None:
    """Three buffers and their sum do, four do not."""
    with (
        running_server(data, "--staging-bytes", str(4 * 16)) as server,
        sessions(server, "m", "a", "b", "c") as workers,
    ):
        answer = server.rest("PATCH", "/v1/models/m/policy", json={"policy": "sync", "min_workers": 4})
        assert (answer.status_code, answer.json()["code"]) == (409, "over_capacity")
        patch(server, "m", policy="sync")
        with connect(server.grpc, model="m", worker="d") as fourth, pytest.raises(OverCapacity):
            fourth.create(START, GROUPS)
        with ThreadPoolExecutor(3) as threads:
            receipts = [f.result() for f in [threads.submit(s.push, grads()) for s in workers]]
        assert {receipt.version for receipt in receipts} == {1}


def test_a_policy_is_switched_while_four_workers_push(server: RunningServer, model_name: str) -> None:
    """Every push gets a verdict, and the versions are exactly what the receipts say."""
    names = ["a", "b", "c", "d"]
    done = threading.Event()

    def work(session: Session) -> list[Receipt]:
        receipts = []
        while not done.is_set():
            receipts.append(session.exchange(grads())[0])
        return receipts

    policies: list[dict[str, Any]] = [
        {"policy": "sync"},
        {"policy": "bounded", "bound": 0},
        {"policy": "sync", "quorum": 2, "late": "carry"},
        {"policy": "async", "scale": True},
        {"policy": "bounded", "bound": 2},
        {"policy": "sync", "quorum": 3},
        {"policy": "async", "max_staleness": 1},
    ]
    with sessions(server, model_name, *names) as opened, ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(work, session) for session in opened]
        try:
            for settings in policies:
                patch(server, model_name, **settings)
                at = server.rest("GET", f"/v1/models/{model_name}").json()["version"]
                wait_until(
                    lambda at=at: server.rest("GET", f"/v1/models/{model_name}").json()["version"] > at + 8,
                    60,
                )
            patch(server, model_name, policy="async")
        finally:
            done.set()
        histories = [future.result(60) for future in futures]
        version = server.rest("GET", f"/v1/models/{model_name}").json()["version"]
    made: dict[int, set[str]] = {}
    for name, receipts in zip(names, histories, strict=True):
        assert [receipt.sequence for receipt in receipts] == list(range(1, len(receipts) + 1))
        for receipt in receipts:
            assert receipt.outcome in (Outcome.APPLIED, Outcome.DROPPED_LATE, Outcome.TOO_STALE)
            if receipt.outcome is Outcome.APPLIED:
                assert name in receipt.contributors
                made.setdefault(receipt.version, set(receipt.contributors)).add(name)
                assert made[receipt.version] == set(receipt.contributors)
    assert sorted(made) == list(range(1, version + 1))
    assert {receipt.policy for history in histories for receipt in history} == {"async", "bounded", "sync"}


def test_a_push_that_ssp_lets_wait_is_let_in_by_the_slowest(server: RunningServer, model_name: str) -> None:
    with sessions(server, model_name, "a", "b", policy={"policy": "bounded", "bound": 1}) as (fast, slow):
        for _ in range(2):
            fast.push(grads())
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(fast.push, grads())
            threading.Event().wait(0.3)
            assert not waiting.done()
            assert worker(server, model_name, "a")["in_flight"] == 0  # it holds nothing
            assert worker(server, model_name, "a")["clocks_ahead"] == 2
            slow.push(grads())
            receipt = waiting.result(60)
        assert receipt.outcome is Outcome.APPLIED
        assert receipt.times["wait_s"] > 0.25


def test_who_only_pushes_is_in_every_round(server: RunningServer, model_name: str) -> None:
    policy = {"policy": "sync", "min_workers": 2}
    with sessions(server, model_name, "a", "b", policy=policy) as both, ThreadPoolExecutor(2) as threads:
        for step in range(3):
            for receipt in threads.map(lambda session: session.push(grads()), both):
                told = (receipt.outcome, receipt.version, receipt.staleness, list(receipt.contributors))
                assert told == (Outcome.APPLIED, step + 1, step, ["a", "b"])


def test_staleness_has_the_consequences_that_the_receipt_says(server: RunningServer, model_name: str) -> None:
    with sessions(server, model_name, "a", "b", policy={"policy": "async", "scale": True}) as (fast, slow):
        slow.pull()
        for _ in range(3):
            fast.exchange(grads())
        receipt, _ = slow.exchange(grads())
        assert (receipt.staleness, receipt.lr_scale) == (3, 0.25)
        assert receipt.effective_lr[0] == pytest.approx(0.25 * float(receipt.groups[0]["lr"]), rel=1e-12)
        assert receipt.notes == ["lr scaled by 1/4 for staleness 3"]
        patch(server, model_name, max_staleness=1)
        for _ in range(2):
            fast.exchange(grads())
        before = fast.pull()["p"]
        receipt, after = slow.exchange(grads())
        assert (receipt.outcome, receipt.staleness) == (Outcome.TOO_STALE, 2)
        assert (after["p"] == before).all()
        assert slow.exchange(grads())[0].outcome is Outcome.APPLIED


def test_a_worker_that_pushes_rubbish_is_quarantined_until_released(
    server: RunningServer, model_name: str
) -> None:
    with sessions(server, model_name, "good", "bad") as (good, bad):
        good.push(grads())
        patch(server, model_name, "gate", quarantine_after=3)
        with untouched(server, model_name):
            for _ in range(3):
                with pytest.raises(NonfiniteGradient):
                    bad.push(NAN)
            with pytest.raises(Quarantined, match="release"):
                bad.push(grads())
        shown = worker(server, model_name, "bad")
        assert (shown["quarantined"], shown["refused_in_row"], shown["outcomes"]) == (
            True,
            3,
            {"rejected": 3},
        )
        assert good.push(grads()).outcome is Outcome.APPLIED
        kinds = [e["kind"] for e in server.rest("GET", f"/v1/models/{model_name}/events").json()["events"]]
        assert kinds[-4:] == ["push_rejected"] * 3 + ["worker_quarantined"]
        released = server.rest("POST", f"/v1/models/{model_name}/workers/bad/release")
        assert released.json() == {"name": "bad", "effective_version": 3}
        assert bad.push(grads()).outcome is Outcome.APPLIED
        assert not worker(server, model_name, "bad")["quarantined"]
        missing = server.rest("POST", f"/v1/models/{model_name}/workers/nobody/release")
        assert (missing.status_code, missing.json()["code"]) == (404, "unknown_worker")


@pytest.mark.parametrize("why", ["quarantined", "fenced"])
def test_on_reject_skip_warns_where_others_raise(server: RunningServer, model_name: str, why: str) -> None:
    module = torch.nn.Linear(2, 1)
    with connect(server.grpc, model=model_name, worker="w", on_reject="skip") as session:
        optimizer = session.attach(torch.optim.Adagrad(module.parameters()), module=module)
        if why == "quarantined":
            patch(server, model_name, "gate", quarantine_after=1)
            module(torch.full((1, 2), torch.nan)).sum().backward()
            with pytest.warns(RuntimeWarning, match="NaN"):
                optimizer.step()
        else:
            server.rest("DELETE", f"/v1/models/{model_name}/workers/w")
        before = [parameter.detach().clone() for parameter in module.parameters()]
        optimizer.zero_grad()
        module(torch.ones(1, 2)).sum().backward()
        with pytest.warns(RuntimeWarning, match=why):
            optimizer.step()
        assert optimizer.last_receipt is not None
        assert (optimizer.last_receipt.outcome, optimizer.last_receipt.reason) == (Outcome.REJECTED, why)
        assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
        if why == "fenced":
            with pytest.raises(Fenced):
                session.upload()
        else:
            server.rest("POST", f"/v1/models/{model_name}/workers/w/release")
            optimizer.step()
            assert optimizer.last_receipt.outcome is Outcome.APPLIED


@pytest.mark.parametrize("policy", ["async", "sync"])
def test_a_scheduler_in_each_of_four_workers_counts_once(
    server: RunningServer, model_name: str, policy: str
) -> None:
    """Four times StepLR(10, 0.5): 0.5 after 10 steps each, and not 0.0625."""
    there, seen = threading.Barrier(4), threading.Barrier(4)

    def work(name: str) -> list[float]:
        module = torch.nn.Linear(2, 1)
        with connect(server.grpc, model=model_name, worker=name, timeout_s=20, retry_for_s=30) as session:
            optimizer = session.attach(
                torch.optim.Adadelta(module.parameters(), lr=1.0),
                module=module,
                policy=policy,
                workers=4 if policy == "sync" else None,
            )
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)
            there.wait(30)
            lrs = []
            for step in range(21):
                module(torch.ones(1, 2)).sum().backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                if step % 10 in (9, 0):
                    seen.wait(30)  # nobody is a step ahead of the lead when the lr is due
                    lrs.append(float(optimizer.last_receipt.groups[0]["lr"]))
                    seen.wait(30)
        return lrs

    with ThreadPoolExecutor(4) as threads, pytest.warns(RuntimeWarning, match="only the lead"):
        found = [f.result(60) for f in [threads.submit(work, name) for name in "abcd"]]
    group = server.rest("GET", f"/v1/models/{model_name}/param-groups/0").json()
    assert group["lr"] == 0.25
    for lrs in found:
        assert lrs[:2] == [1.0, 1.0]  # after steps 1 and 10
        assert lrs[2] in (1.0, 0.5)  # step 11 of the lead brings the edit: this one came before it, or not
        assert lrs[3] == 0.5
        assert lrs[4] in (0.5, 0.25)
