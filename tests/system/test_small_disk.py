"""A disk that is full, a real one: what does not fit is refused by name, nothing is held up, and with room it all goes on.

Where the machine does not let its user mount a disk, the tests of a disk that only seems full (`test_journal_faults.py`) remain.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pushstep.client import Session, connect
from pushstep.proto.errors import JournalFull, PushstepError
from tests.support.disks.small_disk import SmallDisk, may_mount, small_disk
from tests.support.servers.harness import RunningServer, start_server, wait_until

SIZE_BYTES, LEFT_BYTES = 16 << 20, 6 << 20
SHAPE = (50_000,)
GRADIENT = {"w": np.ones(SHAPE, np.float32)}
LEVELS = ("durable", "everysec")
MAY_MOUNT = may_mount(Path(tempfile.mkdtemp()))


@pytest.fixture
def disk(data: Path) -> Iterator[SmallDisk]:
    with small_disk(data, SIZE_BYTES) as disk:
        yield disk


def session_of(server: RunningServer, worker: str, retry_for_s: float) -> Session:
    return connect(server.grpc, model="m", worker=worker, retry_for_s=retry_for_s, shared_memory=False)


def steps(session: Session) -> int:
    """How many gradients were applied, by Adagrad's sum of their squares; the version says the same."""
    state = session.pull_state()
    (total,) = {float(values.view(-1)[0]) for _, name, values in state.dense() if name == "sum"}
    return round(total)


def lr(server: RunningServer) -> float:
    found = server.rest("GET", "/v1/models/m/param-groups").json()["param_groups"][0]
    return float(found["lr"])


def set_lr(server: RunningServer, value: float) -> Any:
    return server.rest("PATCH", "/v1/models/m/param-groups/0", json={"lr": value})


def spend_what_is_set_aside(server: RunningServer) -> PushstepError:
    """Join and leave with a large worker's state, which is recorded each time, until that is refused. Leaves never are."""
    for _ in range(100):
        session = session_of(server, "w3", 0.0)
        try:
            session.member()
        except PushstepError as error:
            return error
        finally:
            session.close()
    raise AssertionError("joins are never refused")


if MAY_MOUNT:

    @pytest.mark.parametrize("level", LEVELS)
    def test_a_full_disk(data: Path, disk: SmallDisk, level: str) -> None:
        options = ("--durability", level, "--snapshot-every-s", "3600")
        server = start_server(data, *options, command=disk.command)
        patient, hasty = session_of(server, "w0", 120.0), session_of(server, "w1", 0.0)
        try:
            ballast = disk.fill(leave_bytes=LEFT_BYTES)
            patient.create({"w": np.zeros(SHAPE, np.float32)}, [{"rule": "adagrad", "params": ["w"]}])
            with session_of(server, "w3", 10.0) as large:
                large.worker_state = bytes(60 << 10)
                large.push(GRADIENT)
            hasty.member()
            pushed = 1
            with pytest.raises(JournalFull) as refused:
                while True:
                    hasty.push(GRADIENT)
                    pushed += 1
            assert refused.value.retry_after_s
            assert refused.value.grpc_status.name == "RESOURCE_EXHAUSTED"
            filler = disk.fill()
            # readers are answered, and of what does not fit nothing is visible
            assert hasty.pull()["w"].shape == SHAPE
            kept = server.rest("GET", "/v1/models/m/snapshots").json()
            answer = server.rest("POST", "/v1/models/m/snapshots")
            assert (answer.status_code, answer.json()["code"]) == (507, "disk_full")
            assert server.rest("GET", "/v1/models/m/snapshots").json() == kept
            assert not list(disk.folder.glob("models/m/snapshots/tmp-*"))
            # edits and joins have room of their own, until that is gone, too: then they are refused and change nothing
            for value in (0.1, 0.2, 0.3):
                assert set_lr(server, value).status_code == 200
            assert spend_what_is_set_aside(server).code == "journal_full"
            answer = set_lr(server, 0.4)
            assert (answer.status_code, answer.json()["code"]) == (503, "journal_full")
            assert float(answer.headers["retry-after"]) > 0
            assert lr(server) == pytest.approx(0.3)
            with pytest.raises(JournalFull):
                session_of(server, "w2", 0.0).member()
            workers = server.rest("GET", "/v1/models/m/workers").json()["workers"]
            assert {worker["name"] for worker in workers} == {"w0", "w1", "w3"}
            # nothing waits for the disk: neither readers, nor who leaves
            hasty.close()
            assert steps(patient) == pushed
            # a push that is told to come again is taken once there is room
            done = threading.Event()
            pushing = threading.Thread(target=lambda: (patient.push(GRADIENT), done.set()))
            pushing.start()
            assert lr(server) == pytest.approx(0.3)
            assert not done.is_set()
            filler.unlink()
            ballast.unlink()
            assert server.rest("PATCH", "/v1/models/m/durability", json={"keep": 1}).status_code == 200
            with server.connect("m", "reader") as reader:
                reader.member()
            wait_until(lambda: server.rest("POST", "/v1/models/m/snapshots").status_code == 201)
            assert set_lr(server, 0.5).status_code == 200
            pushing.join(60)
            assert done.is_set()
            server.kill()
            server = start_server(data, "--grpc", server.grpc, *options, command=disk.command)
            assert steps(patient) == pushed + 1
            assert lr(server) == pytest.approx(0.5)
            patient.push(GRADIENT)
            assert steps(patient) == pushed + 2
            patient.close()
            assert server.stop() == 0
        finally:
            server.kill()
