"""A worker dies, or freezes, at a random moment of a round: the others go on, and what it gave is counted once.

The victim is a process of its own, the others are threads here; all push ones into one Adagrad parameter under
`sync` with `reduce = sum`, so a step adds the square of its contributors' number to the state `sum`. The survivors'
receipts say who contributed to each version: the state must be exactly what they say.
"""

from __future__ import annotations

import io
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from harness import RunningServer, running_server, wait_until
from operators import download, show_model

from pushstep.client import Outcome, Receipt, connect

LEASE_S = 1.5
# a lease, plus what a busy machine may take to notice and to step
HANGS_S = 60.0
GRADS = {"p": np.ones(3, np.float32)}
VICTIM = """
import sys, warnings
import numpy as np
from pushstep.client import connect
warnings.simplefilter("ignore")
with connect(sys.argv[1], model=sys.argv[2], worker="victim", timeout_s=10, retry_for_s=60) as session:
    session.create({"p": np.zeros(3, np.float32)}, [{"rule": "adagrad", "params": ["p"], "lr": 0.0}])
    while True:
        print(session.exchange({"p": np.ones(3, np.float32)})[0].version, flush=True)
"""


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose leases are short."""
    with running_server(tmp_path_factory.mktemp("deaths") / "data", "--lease-s", str(LEASE_S)) as running:
        yield running


@contextmanager
def survivors(
    server: RunningServer, model: str, enough: threading.Event
) -> Iterator[list[Future[list[Receipt]]]]:
    """Two workers that push until it is enough."""
    there = threading.Barrier(3)

    def work(name: str) -> list[Receipt]:
        receipts = []
        with connect(server.grpc, model=model, worker=name, timeout_s=10, retry_for_s=HANGS_S) as session:
            session.create(
                {"p": np.zeros(3, np.float32)},
                [{"rule": "adagrad", "params": ["p"], "lr": 0.0}],
                policy={"policy": "sync", "reduce": "sum", "timeout_s": None, "min_workers": 2},
            )
            there.wait(30)
            while not enough.is_set():
                receipts.append(session.exchange(GRADS)[0])
        return receipts

    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(work, name) for name in ("a", "b")]
        try:
            there.wait(30)
            yield futures
        finally:
            enough.set()


@contextmanager
def victim(server: RunningServer, model: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", VICTIM, server.grpc, model], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def state_sum(server: RunningServer, model: str) -> float:
    exported = torch.load(io.BytesIO(download(server, f"{model}/export", "torch")), weights_only=True)
    return float(exported["optimizer"]["state"][0]["sum"][0])


def check(server: RunningServer, model: str, futures: list[Future[list[Receipt]]]) -> dict[int, list[str]]:
    """The contributors of each version, which the survivors agree on and the state proves."""
    rounds: dict[int, list[str]] = {}
    for future in futures:
        for receipt in future.result(HANGS_S):
            if receipt.outcome is not Outcome.APPLIED:
                assert receipt.outcome is Outcome.DROPPED_LATE
                continue
            assert rounds.setdefault(receipt.version, list(receipt.contributors)) == receipt.contributors
            assert len(set(receipt.contributors)) == len(receipt.contributors)
    version = show_model(server, model)["version"]
    alone = version - len(
        rounds
    )  # rounds of the victim only, after the others had left: one contributor each
    assert state_sum(server, model) == sum(len(names) ** 2 for names in rounds.values()) + alone
    return rounds


@pytest.mark.parametrize("moment", range(1))
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_rounds_go_on_without_a_worker_that_died(
    short: RunningServer, model_name: str, blow: signal.Signals, moment: int
) -> None:
    strike(short, model_name, blow, random.Random(moment).random() * 0.05)


@pytest.mark.soak
@pytest.mark.parametrize("moment", range(25))
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_rounds_go_on_at_fifty_random_moments(
    short: RunningServer, model_name: str, blow: signal.Signals, moment: int
) -> None:
    strike(short, model_name, blow, random.Random(1000 + moment).random() * 0.2)


def strike(server: RunningServer, model: str, blow: signal.Signals, after_s: float) -> None:
    enough = threading.Event()

    def version() -> int:
        return int(show_model(server, model)["version"])

    with survivors(server, model, enough) as futures, victim(server, model) as process:
        assert process.stdout is not None
        for _ in range(3):  # it is in the rounds
            assert process.stdout.readline()
        threading.Event().wait(after_s)
        process.send_signal(blow)
        if blow is signal.SIGKILL:
            process.wait()
        reached = version()
        wait_until(lambda: version() >= reached + 5, HANGS_S)
        shown = server.rest("GET", f"/v1/models/{model}/workers").json()["workers"]
        assert {worker["name"]: worker["state"] for worker in shown} == {
            "a": "live",
            "b": "live",
            "victim": "expired",
        }
        if blow is signal.SIGSTOP:
            process.send_signal(signal.SIGCONT)
            threading.Thread(target=process.stdout.read, daemon=True).start()
            wait_until(lambda: back(server, model), HANGS_S)
            reached = version()
            wait_until(lambda: version() >= reached + 5, HANGS_S)
            process.kill()
            process.wait()
            wait_until(lambda: version() >= reached + 10, HANGS_S)
        enough.set()
        rounds = check(server, model, futures)
    assert ["a", "b", "victim"] in rounds.values()
    assert ["a", "b"] in rounds.values()


def back(server: RunningServer, model: str) -> bool:
    workers = server.rest("GET", f"/v1/models/{model}/workers").json()["workers"]
    return any(w["name"] == "victim" and w["epoch"] == 2 and w["sequence"] > 2 for w in workers)
