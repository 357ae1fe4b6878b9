"""Workers that push without pause while the server is stopped and started: every push counted exactly once.

Each push is a gradient of ones under Adagrad, so `sum` is the number of pushes applied, element for element. The
server is stopped in order (SIGTERM) again and again on the same data folder and ports; the workers only retry.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from harness import start_server

from pushstep.client import Outcome, connect

WORKERS = 4
PUSHES_EACH = 2_000
PUSHES_BETWEEN = 400
ELEMENTS = 1_000


@pytest.mark.soak
def test_every_push_counts_once_across_restarts(tmp_path: Path) -> None:
    data = tmp_path / "data"
    server = start_server(data)
    ports = ("--grpc", server.grpc, "--http", server.http)
    with connect(server.grpc, model="soak", worker="creator") as session:
        session.create(
            {"w": np.zeros(ELEMENTS, np.float32)}, [{"rule": "adagrad", "params": ["w"], "lr": 0.1}]
        )
    applied = [0] * WORKERS

    def work(index: int) -> None:
        with connect(server.grpc, model="soak", worker=f"w{index}", retry_for_s=120) as session:
            for _ in range(PUSHES_EACH):
                receipt = session.push({"w": np.ones(ELEMENTS, np.float32)})
                assert receipt.outcome is Outcome.APPLIED, receipt
                applied[index] += 1

    threads = [threading.Thread(target=work, args=(index,)) for index in range(WORKERS)]
    for thread in threads:
        thread.start()
    restarts = 0
    try:
        while any(thread.is_alive() for thread in threads):
            so_far = sum(applied)
            while sum(applied) < so_far + PUSHES_BETWEEN and any(thread.is_alive() for thread in threads):
                time.sleep(0.01)
            assert server.stop() == 0
            server = start_server(data, *ports)
            restarts += 1
        for thread in threads:
            thread.join()
    except BaseException:
        server.stop()
        raise
    assert applied == [PUSHES_EACH] * WORKERS
    with connect(server.grpc, model="soak", worker="reader") as session:
        state = {name: values for slot, name, values in session.pull_state().dense() if slot.name == "w"}
    assert server.stop() == 0
    total = WORKERS * PUSHES_EACH
    assert np.array_equal(state["sum"].numpy(), np.full(ELEMENTS, total, np.float32))
    print(f"\n{total} pushes by {WORKERS} workers across {restarts} restarts: each applied exactly once")
