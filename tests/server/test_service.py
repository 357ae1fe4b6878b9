"""The process: how it starts, who may start beside it, what its sockets are, and how it ends under load."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import threading
import warnings
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from pushstep.client import Outcome, Session
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import PushstepError
from pushstep.server.service import bind_http, require_free
from tests.support.servers.harness import (
    RunningServer,
    refused_start,
    running_server,
    start_server,
    wait_until,
)
from tests.support.servers.operators import take_snapshot
from tests.support.workers.wire import Wire, created, state_of

SERVICE = "pushstep.v1.TrainingService"


def abandon(sessions: list[Session]) -> None:
    """Close sessions whose server is gone: each says that it could not leave."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for session in sessions:
            session.close()


def test_one_server_per_data_folder(data: Path) -> None:
    with running_server(data) as first:
        created(first, "m")
        before = state_of(first, "m")
        second = refused_start(data)
        assert second.returncode == 1
        assert "another server uses" in second.stderr
        assert str(data) in second.stderr
        assert "Traceback" not in second.stderr
        assert state_of(first, "m") == before
        assert first.connect("m", address=f"unix:{first.unix}").pull()["bias"].shape == (4,)
    with running_server(data) as again:  # the lock went with its process
        assert again.rest("GET", "/v1/models/m").json()["version"] == 1


@pytest.mark.parametrize("door", ["grpc", "http"])
def test_a_port_that_is_taken(door: str, data: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "127.0.0.1:{1}".format(*taken.getsockname())
        found = refused_start(data, f"--{door}", address)
    assert found.returncode == 1
    assert address in found.stderr
    assert "pushstep-server: cannot listen" in found.stderr


def test_what_cannot_start_says_why(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    found = refused_start(file)
    assert found.returncode == 1
    assert "pushstep-server: " in found.stderr
    if not torch.cuda.is_available():
        found = refused_start(data, "--device", "cuda")
        assert found.returncode == 1
        assert "--device cuda" in found.stderr
        assert "Traceback" not in found.stderr


def test_sockets_are_loopback_and_the_users_own(server: RunningServer) -> None:
    assert stat.S_IMODE(os.stat(server.unix).st_mode) == 0o600
    assert stat.S_ISSOCK(os.stat(server.unix).st_mode)
    assert server.grpc.startswith("127.0.0.1:")
    assert server.http.startswith("127.0.0.1:")
    mine = {f":{int(address.rpartition(':')[2]):04X}" for address in (server.grpc, server.http)}
    table = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    rows = [line.split()[1:4] for line in table.splitlines() if ":" in line.split()[1]]
    listening = {local for local, _, state in rows if state == "0A" and local[-5:] in mine}
    assert {address[-5:] for address in listening} == mine
    # 127.0.0.1, as IPv4 or mapped into IPv6
    assert all(re.fullmatch(r"(0{16}FFFF0000)?0100007F:.{4}", address) for address in listening), listening


def test_answers_over_http_do_not_wait_for_more() -> None:
    """asyncio turns Nagle's algorithm off only where the socket names its protocol; on, it costs 40 ms an answer."""
    bound, _ = bind_http("127.0.0.1:0")
    with bound:
        assert bound.proto == socket.IPPROTO_TCP


def test_an_address_is_one_servers_from_the_moment_that_it_is_bound() -> None:
    """Of two that start together, the second would otherwise say that it is ready at the first one's port."""
    first, address = bind_http("127.0.0.1:0")
    with first, pytest.raises(OSError, match=f"cannot listen on {address}"):
        bind_http(address)


def test_a_name_is_taken_when_one_of_its_addresses_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC would listen at the others, and who asks for the name might be answered by another server."""
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = taken.getsockname()[1]
        require_free("127.0.0.1", port)
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port))
            for host in ("127.0.0.1", "127.0.0.2")
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        with pytest.raises(OSError, match=r"127\.0\.0\.2 is in use"):
            require_free("localhost", port)


def test_what_a_server_writes_is_its_users_own(data: Path) -> None:
    with running_server(data, "--data", str(data / "own")) as server:
        created(server, "m")
        take_snapshot(server, "m")
        paths = [data / "own", *(data / "own").rglob("*")]
        assert {path.name for path in paths} >= {"lock", "identity.json", "manifest.json", "pushstep.sock"}
        modes = {(path.is_dir(), stat.S_IMODE(path.lstat().st_mode)) for path in paths}
        assert modes == {(True, 0o700), (False, 0o600)}


def test_a_socket_left_by_a_dead_server_is_replaced(data: Path) -> None:
    killed = start_server(data)
    killed.stop(signal.SIGKILL)
    assert Path(killed.unix).exists()
    with running_server(data) as server:
        server.connect("m", address=f"unix:{server.unix}").create({"w": np.zeros(1, np.float32)})
    assert not Path(server.unix).exists()


@pytest.mark.parametrize("name", ["a%41%zz", "what?#é%2F", "my data unix='x"])
def test_a_folder_whose_name_is_no_uri(name: str, tmp_path: Path) -> None:
    """gRPC takes a Unix socket's path for part of a URI; both ends take it as it is. The line on stdout is a shell's words."""
    data = tmp_path / name
    with running_server(data, "--unix", str(data / "s")) as server:
        assert server.unix == str(data / "s")
        with server.connect("m", address=f"unix:{server.unix}", shared_memory=True) as session:
            session.create({"w": np.zeros(1, np.float32)})
            session.push({"w": np.ones(1, np.float32)})
        assert {path.name for path in data.glob("s*") if path.is_socket()} == {"s", "s.memory"}
    assert list(tmp_path.iterdir()) == [data]


def test_no_unix_socket_when_it_is_turned_off(data: Path) -> None:
    with running_server(data, "--unix", "") as server:
        assert server.unix == ""
        assert not list(data.glob("*.sock"))


def test_health_over_grpc(server: RunningServer) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_gives_the_contract(server: RunningServer) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        found = ProtoReflectionDescriptorDatabase(channel)
        assert set(found.get_services()) == {
            SERVICE,
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        contract = found.FindFileContainingSymbol(SERVICE)
        ours = pb.DESCRIPTOR.services_by_name["TrainingService"]
        (service,) = contract.service
        assert [method.name for method in service.method] == [method.name for method in ours.methods]
        with grpc.insecure_channel(server.grpc) as other:  # each of them is really there
            for method in service.method:
                call = other.stream_stream(f"/{SERVICE}/{method.name}")(iter([b"\xff"]), timeout=10)
                with pytest.raises(grpc.RpcError) as caught:
                    list(call)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_describe_says_where_and_how(server: RunningServer) -> None:
    wire = Wire(server.grpc)
    (answer,) = wire.answers("Describe", [b""])
    wire.close()
    described = pb.DescribeResponse.FromString(answer)
    assert described.http_url == f"http://{server.http}"
    assert described.unix_path == server.unix
    assert described.max_chunk_bytes == 4 << 20
    assert described.server_version == server.rest("GET", "/openapi.json").json()["info"]["version"]


class Load:
    """Workers that push for as long as they are let."""

    def __init__(self, sessions: list[Session]) -> None:
        self.versions: list[int] = []
        self.endings: list[BaseException] = []
        self._threads = [threading.Thread(target=self._push, args=(session,)) for session in sessions]
        for thread in self._threads:
            thread.start()

    def _push(self, session: Session) -> None:
        gradient = {"w": np.ones(200_000, np.float32)}
        try:
            while True:
                receipt = session.push(gradient)
                assert receipt.outcome is Outcome.APPLIED
                self.versions.append(receipt.version)
        except PushstepError as error:
            self.endings.append(error)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_stop_under_load_keeps_everything_acknowledged(number: signal.Signals, data: Path) -> None:
    """Pushes in flight finish, later ones are told, the process exits 0, and nothing acknowledged is missing."""
    server = start_server(data)
    sessions = [server.connect("m", f"w{i}", retry_for_s=0.5, timeout_s=5.0) for i in range(3)]
    for session in sessions:
        session.create({"w": np.zeros(200_000, np.float32)})
    load = Load(sessions)
    wait_until(lambda: len(load.versions) > 20)
    server.process.send_signal(number)
    assert server.process.wait(30) == 0
    load.join()
    server.close_pipe()
    assert len(load.endings) == 3
    assert {error.code for error in load.endings if isinstance(error, PushstepError)} <= {
        "draining",
        "no_answer",
    }
    log = server.log.read_text()
    assert "stopped" in log
    assert "internal error" not in log
    assert "Traceback" not in log
    assert sorted(load.versions) == list(range(1, max(load.versions) + 1))
    abandon(sessions)
    with running_server(data) as again:
        shown = again.rest("GET", "/v1/models/m").json()
        assert shown["version"] >= max(load.versions)
        assert shown["timeline"] == 1
        assert not list(data.glob("tmp-*"))


def test_a_second_signal_does_not_break_the_stop(data: Path) -> None:
    server = start_server(data)
    created(server, "m").close()
    server.sessions.clear()
    server.process.send_signal(signal.SIGTERM)
    server.process.send_signal(signal.SIGTERM)
    assert server.stop() == 0
    assert list((data / "models" / "m" / "snapshots").iterdir())


def test_a_stop_waits_for_a_stream_no_longer_than_told(data: Path) -> None:
    """A client that holds its stream open cannot hold the server."""
    with running_server(data, "--drain-s", "1") as server:
        created(server, "m")
        wire = Wire(server.grpc)
        done = threading.Event()

        def messages() -> Any:
            yield b""
            done.wait(60)

        call = wire.start("Push", messages())
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        done.set()
        with pytest.raises(grpc.RpcError):
            list(call)
        wire.close()
        abandon(server.sessions)
        server.close_pipe()
