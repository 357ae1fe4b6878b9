"""A disk that is full, or that fails, under a durable server: nothing acknowledged is lost, and training goes on when it may."""

from __future__ import annotations

import resource
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from pushstep.client import Session, connect
from pushstep.proto.errors import DiskFull, Fenced, JournalFull, PushstepError
from tests.support.servers import faulty_server
from tests.support.servers.harness import (
    RunningServer,
    kill_and_restart,
    running_server,
    start_server,
    wait_until,
)
from tests.support.workers.counting import counts, create, grads

FAULTY = Path(faulty_server.__file__)
DURABLE = ("--durability", "durable")


@contextmanager
def faulty(data: Path, calls: str, deed: str) -> Iterator[RunningServer]:
    """A durable server whose calls fail while the file `armed` is there."""
    server = start_server(data, *DURABLE, command=(sys.executable, FAULTY, calls, deed))
    try:
        yield server
    finally:
        server.kill()


def _session(server: RunningServer, retry_for_s: float = 60.0) -> Session:
    return connect(server.grpc, model="m", worker="w0", retry_for_s=retry_for_s, shared_memory=False)


def test_without_room_pushes_wait_and_pulls_are_answered(data: Path) -> None:
    """A push is told to come again before anything is decided; with room it is taken, once."""
    with faulty(data, "statvfs:m/journal", "full") as server:
        session, impatient = _session(server), connect(server.grpc, model="m", worker="w1", retry_for_s=0.0)
        create(session)
        session.push(grads(0))
        (data / "armed").touch()
        impatient.member()
        with pytest.raises(JournalFull) as raised:
            for _ in range(20):  # the room that was seen last may be used up first
                impatient.push({"w": np.zeros(3, np.float32)})
        assert raised.value.retry_after_s
        pushed = threading.Event()

        def push() -> None:
            session.push(grads(1))
            pushed.set()

        pushing = threading.Thread(target=push)
        pushing.start()
        assert impatient.pull()["w"].shape == (3,)
        assert not pushed.is_set()
        (data / "armed").unlink()
        pushing.join(30)
        assert pushed.is_set()
        assert counts(session, 2) == [1, 1]
        again = kill_and_restart(server, *DURABLE)
        try:
            assert counts(session, 2) == [1, 1]
            impatient.close()
            session.close()
        finally:
            assert again.stop() == 0


@pytest.mark.parametrize("deed", ["ENOSPC", "EIO"])
def test_a_record_that_the_disk_refuses_is_a_push_that_was_not_applied(data: Path, deed: str) -> None:
    """By name. The next one is taken as soon as the disk takes it, also by a server that was killed in between."""
    with faulty(data, "pwritev:journal/*.journal", deed) as server:
        session = _session(server)
        create(session)
        session.push(grads(0))
        (data / "armed").touch()
        with pytest.raises(PushstepError) as raised:
            session.push(grads(1))
        assert raised.value.code == ("disk_full" if deed == "ENOSPC" else "storage_failed")
        assert isinstance(raised.value, DiskFull) == (deed == "ENOSPC")
        assert list(session.pull()) == ["w"]
        (data / "armed").unlink()
        session.push(grads(2))
        assert counts(session, 3) == [1, 0, 1]
        again = kill_and_restart(server, *DURABLE)
        try:
            assert counts(session, 3) == [1, 0, 1]
            session.push(grads(3))
            assert counts(session, 4) == [1, 0, 1, 1]
            session.close()
        finally:
            assert again.stop() == 0


def test_a_failed_fsync_ends_the_process(data: Path) -> None:
    """At once and for good: a second fsync would report success. What it was of is not acknowledged by this process."""
    with faulty(data, "fdatasync:journal/*.journal", "EIO") as server:
        session = _session(server)
        create(session)
        session.push(grads(0))
        (data / "armed").touch()
        pushing = threading.Thread(target=session.push, args=(grads(1),))
        pushing.start()
        wait_until(lambda: server.process.poll() is not None, 30)
        assert server.process.wait() == 5
        assert "could not be forced to the disk" in server.log.read_text()
        again = start_server(data, "--grpc", server.grpc, *DURABLE)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                pushing.join(60)
            assert not pushing.is_alive()
            assert counts(session, 2) == [1, 1]
            session.close()
        finally:
            assert again.stop() == 0


def test_an_epoch_goes_to_one_session_however_many_join_at_once(data: Path) -> None:
    """Each join waits for the disk before it is answered: by then another may have taken the name."""
    with running_server(data, *DURABLE) as server:
        with _session(server) as first:
            create(first)

        def join(_: int) -> int:
            session = connect(server.grpc, model="m", worker="z", takeover=True, shared_memory=False)
            try:
                return session.member().epoch
            except Fenced:
                return 0
            finally:
                session.close()

        with warnings.catch_warnings(), ThreadPoolExecutor(3) as threads:
            warnings.simplefilter("ignore")
            for _ in range(10):
                epochs = [epoch for epoch in threads.map(join, range(3)) if epoch]
                assert len(set(epochs)) == len(epochs)


def test_a_start_shows_what_it_has_replayed_to_who_only_reads(data: Path) -> None:
    with running_server(data, *DURABLE) as server, _session(server) as session:
        create(session)
        session.push(grads(0))
    with running_server(data, *DURABLE) as server:
        assert server.rest("GET", "/v1/models/m/parameters/w").json()["version"] == 1
        assert server.rest("GET", "/v1/models/m/durability").json()["durable_version"] == 1


def test_an_edit_is_answered_once_its_record_is_taken(data: Path) -> None:
    """A disk that refuses it holds the edit up, and later records stay in their order."""
    with faulty(data, "pwritev:journal/*.journal", "ENOSPC") as server:
        session = _session(server)
        create(session)
        (data / "armed").touch()
        with ThreadPoolExecutor(1) as thread:
            edit = thread.submit(
                httpx.patch,
                f"http://{server.http}/v1/models/m/param-groups/0",
                json={"lr": 0.25},
                timeout=60,
                trust_env=False,
            )
            with pytest.raises(TimeoutError):
                edit.result(1)
            (data / "armed").unlink()
            assert edit.result(30).status_code == 200
        session.push(grads(0))
        again = kill_and_restart(server, *DURABLE)
        try:
            groups = again.rest("GET", "/v1/models/m/param-groups").json()["param_groups"]
            assert groups[0]["lr"] == 0.25
            assert counts(session, 1) == [1]
            session.close()
        finally:
            assert again.stop() == 0


def test_a_snapshot_that_failed_behind_a_restore_holds_up_no_change_of_the_level(data: Path) -> None:
    with faulty(data, "fsync:manifest.json", "EIO") as server:
        session = _session(server)
        create(session)
        snapshot = server.rest("GET", "/v1/models/m/snapshots").json()["snapshots"][0]["id"]
        (data / "armed").touch()
        assert server.rest("POST", f"/v1/models/m/snapshots/{snapshot}/restore").status_code == 500
        (data / "armed").unlink()
        changed = server.rest("PATCH", "/v1/models/m/durability", json={"level": "applied"})
        assert changed.json()["level"] == "applied"
        assert server.rest("POST", "/v1/models/m/snapshots").status_code == 201
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session.close()
        assert server.stop() == 0


def test_a_server_without_a_descriptor_left_acknowledges_what_it_forces_to_the_disk(data: Path) -> None:
    """What is already open goes on: pushes and pulls. A snapshot is refused by name, and taken later."""
    server = start_server(data, *DURABLE)
    session = _session(server)
    try:
        create(session)
        session.push(grads(0))
        pid = server.process.pid
        with httpx.Client(base_url=f"http://{server.http}", trust_env=False) as operator:
            assert operator.get("/v1/models/m").status_code == 200
            before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
            for number in range(1, 6):
                session.push(grads(number))
            refused = operator.post("/v1/models/m/snapshots")
            assert (refused.status_code, refused.json()["code"]) == (500, "storage_failed")
            session.push(grads(6))
            assert counts(session, 7) == [1] * 7
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
            assert operator.post("/v1/models/m/snapshots").status_code == 201
        server = kill_and_restart(server, *DURABLE)
        assert counts(session, 7) == [1] * 7
        session.close()
        assert server.stop() == 0
    finally:
        server.kill()
