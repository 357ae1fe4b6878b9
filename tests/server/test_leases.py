"""Leases end by the clock: under every policy, whether or not anything else happens."""

from __future__ import annotations

import asyncio
import time

import pytest

from pushstep.proto.training_pb2 import GroupEdit
from pushstep.proto.wire.hyperparameters import wire_values
from pushstep.server.coordinator.sessions import Sessions
from pushstep.server.coordinator.worker import WorkerState
from tests.support.servers.driven import made
from tests.support.servers.judged import LEASE_S, Court

POLICIES = [{"policy": "async"}, {"policy": "bounded", "bound": 8}, {"policy": "sync"}]
EDIT = GroupEdit(group=0, values=wire_values({"lr": 0.5}))


def lr(court: Court) -> float | bool:
    return court.commits.groups.list[0].values["lr"]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["policy"])
@pytest.mark.parametrize("ticks", [True, False])
def test_a_lead_that_died_leads_no_longer(policy: dict[str, object], ticks: bool) -> None:
    """The next one's scheduler counts from the end of the lease on, told of by the clock or by its own push."""
    court = Court(**policy)
    court.join("lead", "next")
    court.wait(LEASE_S - 1)
    court.do(court.coordinator.on_heartbeat(court.identity("next"), court.now_s))
    assert court.coordinator.next_s() == LEASE_S
    if policy["policy"] != "sync":  # there it would wait for the lead
        early = court.push("next", edits=[EDIT])
        assert list(court.receipt(early).ignored_edits) == ["0.lr"]
        assert lr(court) == 0.01
    court.now_s += 2
    if ticks:
        court.wait(0)
        assert court.coordinator.sessions.workers["lead"].state is WorkerState.EXPIRED
    late = court.push("next", edits=[EDIT])
    assert court.outcome(late) == "applied"
    assert not court.receipt(late).ignored_edits
    assert lr(court) == 0.5
    expired = [note for note in court.notes if note.kind == "worker_expired"]
    assert [note.facts["worker"] for note in expired] == ["lead"]


def test_nothing_has_to_happen_for_a_lease_to_end() -> None:
    async def scenario() -> None:
        model = made()
        model.sessions.lease_s = 0.1
        for name in ("lead", "next"):
            _, decisions = model.coordinator.join(name, time.monotonic(), takeover=False)
            model.executor.apply(decisions)
        lead, following = model.sessions.workers.values()
        while lead.state is WorkerState.LIVE:
            _, decisions = model.coordinator.join("next", time.monotonic(), takeover=True)
            model.executor.apply(decisions)
            await asyncio.sleep(0.01)
        assert following.state is WorkerState.LIVE
        assert model.sessions.leads(following)
        while following.state is WorkerState.LIVE:
            await asyncio.sleep(0.01)
        assert [event["worker"] for event in model.events if event["kind"] == "worker_expired"] == [
            "lead",
            "next",
        ]
        await model.close()

    asyncio.run(scenario())


def test_each_lease_is_looked_at_seldom() -> None:
    """10,000 workers that are heard of all the time: what is remembered of their leases does not grow."""
    sessions = Sessions(30.0, 100_000)
    workers = [sessions.join(f"w{number}", 0.0, takeover=False) for number in range(1000)]
    for second in range(1, 100):
        for worker in workers[:: 1 + second % 3]:
            sessions._touch(worker, float(second))
        sessions.expire(float(second))
        for worker in workers[:10]:
            sessions.join(worker.name, float(second), takeover=True)
    assert sum(worker.state is WorkerState.LIVE for worker in workers) == 1000
    assert len(sessions.leases._heap) < 3000
    sessions.expire(1000.0)
    assert not sessions.live()
    assert sessions.leases.first_s() is None
    assert not sessions.leases._heap
