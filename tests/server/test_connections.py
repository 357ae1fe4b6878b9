"""Connections: who sends nothing, sends slowly, does not read, or opens thousands keeps nobody out, and is let go."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pushstep.server.operator_door.app import MOST_REQUESTS
from pushstep.server.process.descriptors import FEW_CONNECTIONS, MOST_HTTP, shared_out
from tests.support.servers.harness import SERVER, RunningServer, running_server, wait_until
from tests.support.servers.operators import checkpoints_held
from tests.support.workers.wire import created, untouched

STALL_S = 1.0
MODEL = "m"
MOST_GRPC = 8


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with little patience."""
    options = ("--stall-s", str(STALL_S), "--max-connections", str(MOST_GRPC))
    with running_server(tmp_path_factory.mktemp("quick") / "data", *options) as running:
        created(running, MODEL)
        yield running


@pytest.mark.parametrize("limit", [4 * FEW_CONNECTIONS, FEW_CONNECTIONS])
def test_only_who_can_have_few_workers_is_told_so(
    limit: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A line about open files at a start says nothing to who has three workers, if there is room for a thousand."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    with caplog.at_level(logging.INFO, "pushstep.service"):
        shares = shared_out(20_000)
    assert (shares.grpc < FEW_CONNECTIONS) == ("raise the limit" in caplog.text) == (limit == FEW_CONNECTIONS)


def connected(server: RunningServer, port: str = "http") -> socket.socket:
    host, _, number = getattr(server, port).rpartition(":")
    opened = socket.create_connection((host, int(number)), timeout=20)
    opened.settimeout(20)
    return opened


def request(path: str, method: str = "GET", **headers: object) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def received(connection: socket.socket) -> bytes:
    """Everything until the other end closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def problem(answer: bytes) -> tuple[int, str]:
    """The status and code of an answer that is an error."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head, answer
    return int(head.split()[1]), json.loads(body)["code"]


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1 << 16) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


UNFINISHED = {
    "nothing": b"",
    "half a line": b"GET /v1/mod",
    "half a head": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n",
    "half a body": request("/v1/models/m/hooks", "POST", Content_Length=100, Content_Type="application/json")
    + b'{"name"',
    "half a chunk": request("/v1/models/m/hooks", "POST", Transfer_Encoding="chunked") + b"ff\r\n{",
}


@pytest.mark.parametrize("sent", UNFINISHED.values(), ids=UNFINISHED)
def test_a_request_that_does_not_arrive_ends_its_connection(quick: RunningServer, sent: bytes) -> None:
    with untouched(quick, MODEL), connected(quick) as connection:
        connection.sendall(sent)
        assert problem(received(connection)) == (408, "request_timeout")


def test_a_second_request_has_the_same_time(quick: RunningServer) -> None:
    with connected(quick) as connection:
        connection.sendall(request("/healthz"))
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        connection.sendall(request("/healthz")[:-2])
        assert problem(received(connection)) == (408, "request_timeout")


def test_a_caller_that_does_not_read_is_dropped(quick: RunningServer, model_name: str) -> None:
    session = quick.connect(model_name)
    session.create({"w": np.zeros(4_000_000, np.float32)})
    with connected(quick) as connection:
        connection.sendall(request(f"/v1/models/{model_name}/export"))
        wait_until(lambda: checkpoints_held(quick) == 1)
        wait_until(lambda: checkpoints_held(quick) == 0, 60)


REFUSED = {
    "no request": b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03 TLS\r\n\r\n",
    "no version": b"GET\r\n\r\n",
    "two lengths": request("/", "POST", Content_Length="3, 5") + b"abc",
    "a negative length": request("/", "POST", Content_Length=-1),
    "an endless head": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 30_000,
}


@pytest.mark.parametrize("sent", REFUSED.values(), ids=REFUSED)
def test_what_is_no_request_is_refused_in_the_one_shape(quick: RunningServer, sent: bytes) -> None:
    with connected(quick) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(sent)
        assert problem(received(connection)) == (400, "malformed_request")


@pytest.mark.parametrize("order", [1, -1], ids=["length first", "encoding first"])
def test_a_request_of_two_ends_takes_nothing_along(quick: RunningServer, order: int) -> None:
    """Length and chunks: what follows would be a request to one of two that read it, and a body to the other."""
    headers = [("Content_Length", 5), ("Transfer_Encoding", "chunked")][::order]
    hidden = b'{"lr": 0.5}'
    behind = request(
        f"/v1/models/{MODEL}/param-groups/0",
        "PATCH",
        Content_Type="application/json",
        Content_Length=len(hidden),
    )
    with untouched(quick, MODEL), connected(quick) as connection:
        connection.sendall(request("/v1/models", **dict(headers)) + b"0\r\n\r\n" + behind + hidden)
        answer = received(connection)
        assert problem(answer) == (400, "malformed_request")
        assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("path", ["/v1/models/m/hooks", "/nowhere"])
def test_a_refused_body_is_not_read_without_an_end(quick: RunningServer, path: str) -> None:
    """It is answered at once; of a GB only what the system's buffers hold goes out, and what is read to be polite."""
    with untouched(quick, MODEL), connected(quick) as connection:
        connection.sendall(request(path, "POST", Content_Length=1 << 30))
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 1 << 30:
                sent += connection.send(bytes(1 << 20))
        assert sent < 64 << 20
        assert problem(received(connection)) == (413, "message_too_large")


def test_idle_connections_make_room_for_new_ones(quick: RunningServer) -> None:
    """More than there may be, of which none sends a byte: whoever comes is served, and the oldest go first."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(connected(quick)) for _ in range(MOST_HTTP + 50)]
        assert quick.rest("GET", "/healthz").status_code == 200
        assert quick.rest("GET", "/v1/models").status_code == 200
        wait_until(lambda: not is_open(opened[0]))


def test_health_is_answered_beside_all_the_requests_that_may_be(quick: RunningServer) -> None:
    waiting = request("/v1/models/m/hooks", "POST", Content_Length=100, Content_Type="application/json")

    def busy() -> bool:
        answer = quick.rest("GET", "/v1/models")
        if answer.status_code == 200:
            return False
        assert (answer.status_code, answer.json()["code"]) == (503, "busy")
        assert int(answer.headers["retry-after"]) > 0
        return True

    with contextlib.ExitStack() as stack:
        for _ in range(MOST_REQUESTS):
            stack.enter_context(connected(quick)).sendall(waiting)
        wait_until(busy)
        assert quick.rest("GET", "/healthz").status_code == 200
        assert quick.rest("GET", "/readyz").status_code == 200
    wait_until(lambda: quick.rest("GET", "/v1/models").status_code == 200)


def test_workers_connections_are_bounded_too(quick: RunningServer) -> None:
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(connected(quick, "grpc")) for _ in range(MOST_GRPC + 10)]
        wait_until(lambda: sum(map(is_open, opened)) <= MOST_GRPC)


def test_the_limit_of_open_files_is_raised(data: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    command = ("bash", "-c", f'ulimit -S -n 300; exec "{SERVER}" "$@"', "server")
    with running_server(data, command=command) as server:
        limits = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        assert limits == (hard, hard)


def test_out_of_descriptors_health_is_answered_and_the_log_is_short(data: Path) -> None:
    """Even if somebody lowers the limit under the server, and takes all there are."""
    few = 200
    with running_server(data) as server, contextlib.ExitStack() as stack:
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (few, few))
        opened = [stack.enter_context(connected(server, "grpc")) for _ in range(few)]
        wait_until(lambda: "descriptor limit" in server.log.read_text())
        assert server.rest("GET", "/healthz").status_code == 200
        idle = [stack.enter_context(connected(server)) for _ in range(50)]
        for _ in range(2):
            assert server.rest("GET", "/healthz").status_code == 200
        told = [line for line in server.log.read_text().splitlines() if "was not accepted" in line]
        assert len(told) == 1
        for connection in (*opened, *idle):
            connection.close()
