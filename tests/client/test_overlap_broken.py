"""Exchanges whose bytes left early, and that break off: nothing is applied twice, and nothing stays set aside."""

from __future__ import annotations

import copy
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pushstep.client import Outcome, connect
from pushstep.client.optimizer import overlap
from pushstep.proto.errors import OverBudget, SessionClosed
from tests.support.servers.harness import RunningServer, running_server, start_server, wait_until
from tests.support.servers.operators import restore, show_model, take_snapshot
from tests.support.servers.proxy import Proxy
from tests.support.trainings.optimizers import adagrad
from tests.support.trainings.overlapping import (
    Deep,
    early_of,
    let_it_leave,
    step_all,
    trained,
    twins_of,
    warmed,
)
from tests.support.trainings.twins import Twins
from tests.support.workers.counting import create, grads


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets that these small models fill."""
    monkeypatch.setattr(overlap, "BUCKET_BYTES", 16)


def test_a_stream_that_stalls_is_forgotten_and_sent_again(data: Path) -> None:
    with running_server(data, "--stall-s", "0.3") as server:
        twins = warmed(twins_of(server, "m", Deep(), adagrad))
        trained(twins, 2, lambda: wait_until(early_of(twins.remote)._sealed.is_set))
        step_all(twins)
        assert twins.remote.overlapped_steps == 1
        trained(twins, 3)
        step_all(twins)
        assert twins.remote.overlapped_steps == 2
        twins.check_state()


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_cut_in_the_middle_of_an_early_stream(
    server: RunningServer, model_name: str, direction: str
) -> None:
    with Proxy(server.grpc) as proxy:
        twins = warmed(twins_of(server, model_name, Deep(), adagrad, address=proxy.address))

        def cut() -> None:
            early = early_of(twins.remote)
            proxy.hold(direction)  # type: ignore[arg-type]
            proxy.cut()
            proxy.release()
            wait_until(early._sealed.is_set)

        for seed in range(2, 4):
            trained(twins, seed, cut)
            step_all(twins)
        trained(twins, 4)
        step_all(twins)
        assert twins.remote.overlapped_steps == 2
        twins.check_state()
        twins.remote._session.close()


def test_a_lost_reply_to_the_commit(server: RunningServer, model_name: str) -> None:
    """The retry is plain, under the same identity and digest: it is answered with the first receipt."""
    with Proxy(server.grpc) as proxy, ThreadPoolExecutor(1) as pool:
        twins = warmed(twins_of(server, model_name, Deep(), adagrad, address=proxy.address))
        trained(twins, 2)
        let_it_leave(twins.remote)
        proxy.hold("down")
        stepping = pool.submit(twins.remote.step)
        wait_until(lambda: show_model(server, model_name)["version"] == 3)
        proxy.cut()
        proxy.release()
        stepping.result(30)
        twins.local[0].step()
        twins.check_state()
        receipt = twins.remote.last_receipt
        assert receipt is not None
        assert (receipt.outcome, receipt.version, receipt.duplicates) == (Outcome.APPLIED, 3, 1)
        assert twins.remote.overlapped_steps == 2
        twins.remote._session.close()


@pytest.mark.parametrize("how", ["restore", "kill"])
def test_a_timeline_that_ends_in_the_middle_of_an_early_stream(data: Path, how: str) -> None:
    server = start_server(data)
    twins = warmed(
        Twins(
            connect(server.grpc, model="m", worker="w0", retry_for_s=30.0, shared_memory=False),
            Deep(),
            adagrad,
            overlap=True,
        )
    )
    snapshot = take_snapshot(server, "m")["id"]
    kept = copy.deepcopy((twins.local_model.state_dict(), twins.local[0].state_dict()))
    trained(twins, 2)
    step_all(twins)

    def end() -> None:
        nonlocal server
        early = early_of(twins.remote)
        if how == "restore":
            restore(server, "m", snapshot)
        else:
            server.stop(signal.SIGKILL)
            server = start_server(data, "--grpc", server.grpc)
            wait_until(early._sealed.is_set)

    trained(twins, 3, end)
    said = "restored to version 2" if how == "restore" else "undone 1 versions .* from version 2"
    with pytest.warns(RuntimeWarning, match=said):
        twins.remote.step()
    assert twins.remote.last_receipt is not None
    assert twins.remote.last_receipt.outcome is Outcome.SUPERSEDED
    twins.local_model.load_state_dict(kept[0])
    twins.local[0].load_state_dict(kept[1])
    twins.check()
    for seed in range(4, 7):
        trained(twins, seed)
        step_all(twins)
    assert twins.remote.overlapped_steps >= 3
    twins.check_state()
    twins.remote._session.close()
    assert server.stop() == 0


@pytest.mark.parametrize("how", ["close", "raise"])
def test_what_was_set_aside_for_an_early_stream_is_given_back(data: Path, how: str) -> None:
    """Closed or broken off in the middle of backward: the others go on, and no thread stays."""
    elements = sum(parameter.numel() for parameter in Deep().parameters())
    budget = 6 * elements  # one push and a half
    with running_server(data, "--staging-bytes", str(budget), "--stall-s", "12") as server:
        other = server.connect("other", retry_for_s=0.5)
        create(other, elements)
        threads = set(threading.enumerate())
        twins = warmed(twins_of(server, "m", Deep(), adagrad))
        session = twins.remote._session

        def refused() -> bool:
            try:
                other.push(grads(0, elements))
            except OverBudget:
                return True
            return False

        def end() -> None:
            early_of(twins.remote)
            wait_until(refused)
            if how == "raise":
                raise FloatingPointError("half way")
            session.close()

        if how == "close":
            trained(twins, 2, end)
            with pytest.raises(SessionClosed):
                twins.remote.step()
        else:
            with pytest.raises(FloatingPointError):
                trained(twins, 2, end)
            twins.remote.zero_grad()
        wait_until(lambda: not refused())
        if how == "raise":
            trained(twins, 3)
            step_all(twins)
            twins.check_state()
            session.close()
        other.close()
        wait_until(lambda: set(threading.enumerate()) <= threads)
