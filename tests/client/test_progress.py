"""Transfers that take longer than a time-out: they end while they move, and are given up when they stand still."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pushstep.client import Outcome, Session, connect
from pushstep.client.transport import retry as retry_module
from pushstep.client.transport.progress import LEAST_CHUNK_BYTES, SLOW_S, Pace, Watchdog
from pushstep.client.transport.retry import Retry, TransportFailure
from pushstep.client.transport.waiting import Wait
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import BeingCreated, NoAnswer
from pushstep.proto.training_pb2 import Process
from pushstep.proto.types_pb2 import Identity
from pushstep.proto.wire.frames import CHUNK_BYTES, Chunk
from pushstep.server.config import Config
from pushstep.server.coordinator.sessions import Sessions
from pushstep.server.coordinator.worker import WorkerState
from pushstep.server.models.catalog import Catalog
from pushstep.server.models.creations import CREATION_S, propose
from pushstep.server.requests.upload import Upload
from tests.support.servers.harness import RunningServer, running_server, wait_until
from tests.support.servers.judged import LAYOUT
from tests.support.servers.proxy import Proxy
from tests.support.workers.wire import RawWorker, Wire, created

# 12 MB take 1.1 s on this link and a chunk of 2 MiB 0.2.
PAUSE_S = 0.006
TIMEOUT_S = 0.6
ELEMENTS = 3_000_000


def slow_session(proxy: Proxy, model: str) -> Session:
    return connect(
        proxy.address, model=model, worker="w0", timeout_s=TIMEOUT_S, retry_for_s=30, shared_memory=False
    )


@pytest.mark.parametrize("door", ["tcp", "unix"])
def test_every_transfer_may_take_longer_than_the_time_out(
    door: str, server: RunningServer, model_name: str
) -> None:
    target = server.grpc if door == "tcp" else server.unix
    ones = {"a": np.ones(ELEMENTS, np.float32)}
    with Proxy(target, PAUSE_S) as proxy, slow_session(proxy, model_name) as session:
        begun_s = time.monotonic()
        session.create({"a": np.zeros(ELEMENTS, np.float32)}, [{"rule": "adagrad", "params": ["a"]}])
        assert time.monotonic() - begun_s > TIMEOUT_S
        assert session.push(ones).outcome is Outcome.APPLIED
        receipt, values = session.exchange(ones)
        assert receipt.version == 2
        assert session.upload(values) == 3
        with server.connect(model_name, "w1") as other:
            assert np.array_equal(other.pull()["a"], values["a"])
        begun_s = time.monotonic()
        assert session.pull_state().header.version == 3
        assert time.monotonic() - begun_s > TIMEOUT_S
        # each was made once: nothing had to be sent again
        (worker,) = (w for w in workers(server, model_name) if w["name"] == "w0")
        assert (worker["outcomes"], worker["duplicates"]) == ({"applied": 3}, 0)


def workers(server: RunningServer, model: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = server.rest("GET", f"/v1/models/{model}/workers").json()["workers"]
    return found


@pytest.mark.parametrize("way", ["up", "down"])
def test_what_stands_still_is_given_up(way: str, server: RunningServer, model_name: str) -> None:
    """In the middle of a transfer, on either side's way; it is made as soon as the link moves again."""
    with Proxy(server.grpc) as proxy, slow_session(proxy, model_name) as session:
        session.create({"a": np.zeros(ELEMENTS, np.float32)}, [{"rule": "adagrad", "params": ["a"]}])
        session._worker.membership.retry.for_s = 1.0
        proxy.stop_after(way, 5 << 20)  # type: ignore[arg-type]
        with pytest.raises(NoAnswer, match=f"nothing moved for {TIMEOUT_S:g} s|server's gRPC|connect"):
            session.exchange({"a": np.ones(ELEMENTS, np.float32)})
        proxy.cut()
        proxy.release()
        session._worker.membership.retry.for_s = 30.0
        receipt, _ = session.exchange({"a": np.ones(ELEMENTS, np.float32)})
        assert receipt.outcome is Outcome.APPLIED
        assert receipt.version in (
            1,
            2,
        )  # the first may have been taken, and is settled before the second is sent


def test_messages_fit_the_link() -> None:
    pace = Pace()
    assert pace.chunk_bytes == CHUNK_BYTES
    pace.took(SLOW_S + 1)
    assert pace.chunk_bytes == CHUNK_BYTES // 8
    for _ in range(3):
        pace.took(SLOW_S + 1)
    assert pace.chunk_bytes == LEAST_CHUNK_BYTES
    pace.took(SLOW_S / 2)  # as large as it should be
    assert pace.chunk_bytes == LEAST_CHUNK_BYTES
    for _ in range(10):
        pace.took(0.01)
    assert pace.chunk_bytes == CHUNK_BYTES


class Call:
    """What a watchdog needs of a call."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


@pytest.fixture
def told() -> list[float]:
    return []


@pytest.fixture
def watchdog(told: list[float]) -> Iterator[Watchdog]:
    made = Watchdog(0.2, lambda: told.append(time.monotonic()))
    yield made
    made.close()


def test_a_watchdog_ends_what_stands_still_and_nothing_else(watchdog: Watchdog, told: list[float]) -> None:
    calls = [Call() for _ in range(3)]
    still, moving, ours = (watchdog.begin() for _ in calls)
    for progress, call in zip((still, moving, ours), calls, strict=True):
        progress.of(call)
    ours.asked()  # its next message is being made here
    until_s = time.monotonic() + 2.0
    while not calls[0].cancelled:
        moving.moved()
        assert time.monotonic() < until_s
        time.sleep(0.01)
    assert still.stalled
    assert [call.cancelled for call in calls] == [True, False, False]
    for progress in (still, moving, ours):
        watchdog.end(progress)
    assert told[-1] >= moving.moved_s
    # it sleeps while there is nothing to look after, and is there again
    wait_until(lambda: not watchdog._awake)
    late = watchdog.begin()
    late.of(calls[1])
    wait_until(lambda: calls[1].cancelled)


def test_time_in_which_bytes_move_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transfer of ten minutes that breaks off at its end is begun again, though five are all that silence is given."""
    now_s = [0.0]
    wait = Wait("nowhere")
    attempts: list[float] = []

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now_s[0]

    def pause(seconds: float) -> None:
        now_s[0] += seconds

    monkeypatch.setattr(retry_module, "time", Clock)
    monkeypatch.setattr(retry_module.shield, "pause", pause)

    def attempt() -> None:
        attempts.append(now_s[0])
        moves = len(attempts) <= 3
        now_s[0] += 600.0 if moves else 30.0
        wait.moved_s = now_s[0] if moves else 0.0
        raise TransportFailure

    with pytest.raises(NoAnswer):
        Retry(wait, 300.0).run(attempt)
    assert 3 + 300 / 31 <= len(attempts) <= 3 + 300 / 30 + 1


def test_a_ticket_lasts_while_its_values_come(data: Path) -> None:
    async def scenario() -> None:
        catalog = Catalog(Config(data=data))
        now_s = time.monotonic()
        creation = catalog.begin_creation("m", "w0", propose(LAYOUT.manifest), now_s, 0, Process())
        segments = [segment for segment, _ in LAYOUT.whole(None)]
        header = pb.UploadHeader(
            model="m", kind=pb.UPLOAD_KIND_CREATE, ticket=creation.ticket, segments=segments
        )
        upload = Upload(catalog, header)
        await upload.admit()
        upload.place(Chunk(0, 0, memoryview(bytes(4))))
        late_s = now_s + 10 * CREATION_S  # so long it has been on its way
        with pytest.raises(BeingCreated):
            catalog.begin_creation("m", "w1", propose(LAYOUT.manifest), late_s, 0, Process())
        upload.release()

    asyncio.run(scenario())


def test_a_lease_is_renewed_while_it_lasts_and_never_revived() -> None:
    sessions = Sessions(30.0, 10, "m")
    worker = sessions.join("w0", 0.0, takeover=False)
    identity = Identity(worker="w0", epoch=worker.epoch)
    for now_s in (20.0, 40.0, 60.0):
        sessions.renew(identity, now_s)
        assert worker.lease_until_s == now_s + 30.0
    sessions.renew(Identity(worker="w0", epoch=worker.epoch + 1), 70.0)
    sessions.renew(Identity(worker="nobody", epoch=1), 70.0)
    sessions.renew(identity, 91.0)
    assert worker.lease_until_s == 90.0
    sessions.expire(91.0)
    assert worker.state is WorkerState.EXPIRED


def test_a_body_that_comes_slowly_keeps_its_worker_alive(data: Path) -> None:
    """Of a worker that has no heartbeat: its push takes twice as long as a lease."""
    with running_server(data, "--lease-s", "1.5") as server:
        created(server, "m")
        wire = Wire(server.grpc)
        worker = RawWorker(wire, "m", takeover=True)
        header, chunk, commit = worker.good(name="weight")
        fields = pb.PushRequest.FromString(chunk)

        def messages() -> Iterator[bytes]:
            yield header
            for offset in range(0, len(fields.payload), 4):
                time.sleep(3.0 / (len(fields.payload) // 4))
                piece = fields.payload[offset : offset + 4]
                yield pb.PushRequest(segment=0, offset=offset, payload=piece).SerializeToString()
            yield commit

        assert worker.push(messages()).receipt.version == 2
        wire.close()
