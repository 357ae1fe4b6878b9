"""connect(): what it is told is checked before anything is asked, and a wrong address is told from an absent server."""

from __future__ import annotations

import gc
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from pushstep.client import connect, options
from pushstep.proto.errors import (
    InvalidAddress,
    InvalidName,
    InvalidSettings,
    PushstepError,
    ServerUnavailable,
    WrongDtype,
)
from tests.support.deployments.ports import free_port
from tests.support.servers.harness import RunningServer, running_server, start_server

VALUES = {"a": np.zeros(3, np.float32)}


@contextmanager
def listener() -> Iterator[socket.socket]:
    """Somebody who would notice a connection."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.settimeout(0)
        yield made


# --- before anything is asked

OPTIONS: list[tuple[dict[str, Any], type[PushstepError], str]] = [
    ({"wire": "float33"}, WrongDtype, "float33"),
    ({"wire": torch.int32}, WrongDtype, r"torch\.int32"),
    ({"wire": ("float32", "int8")}, WrongDtype, "int8 for pulls"),
    ({"wire": ("float32",)}, WrongDtype, "1 dtypes"),
    ({"wire": ["float32"]}, WrongDtype, "float32"),
    ({"top_k": 0}, InvalidSettings, "top_k=0"),
    ({"top_k": 1.5}, InvalidSettings, r"top_k=1\.5"),
    ({"top_k": "1%"}, InvalidSettings, "top_k='1%'"),
    ({"top_k": 0.1, "wire": "int8"}, WrongDtype, "wire with top_k"),
    ({"model": "a/b"}, InvalidName, "'a/b' is no valid model name"),
    ({"model": ""}, InvalidName, "'' is no valid model name"),
    ({"model": None}, InvalidName, "model name"),
    ({"worker": "w 0"}, InvalidName, "'w 0' is no valid worker name"),
    ({"worker": "w" * 101}, InvalidName, "worker name"),
    ({"on_reject": "ignore"}, InvalidSettings, "on_reject='ignore': use 'raise' or 'skip'"),
    ({"on_restore": 1}, InvalidSettings, "on_restore=1: use 'continue' or 'raise'"),
    ({"timeout_s": 0}, InvalidSettings, "timeout_s=0"),
    ({"timeout_s": float("inf")}, InvalidSettings, "timeout_s=inf"),
    ({"timeout_s": None}, InvalidSettings, "timeout_s=None"),
    ({"retry_for_s": -1}, InvalidSettings, "retry_for_s=-1"),
    ({"wait_s": float("nan")}, InvalidSettings, "wait_s=nan"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), OPTIONS, ids=lambda value: str(value)[:30])
def test_what_it_is_told_is_checked_first(
    wrong: dict[str, Any], kind: type[PushstepError], message: str
) -> None:
    with listener() as there:
        address = f"127.0.0.1:{there.getsockname()[1]}"
        with pytest.raises(kind, match=message):
            connect(address, **{"model": "m", "worker": "w0", **wrong})
        with pytest.raises(BlockingIOError):
            there.accept()


ADDRESSES = [
    ("http://localhost:7071", "URLs are for the REST door.* such as localhost:7070"),
    ("https://host/v1", "such as host:7070"),
    ("grpc://localhost:7070", "written without grpc://, as localhost:7070"),
    ("tcp://", "written without tcp://"),
    ("localhost", "no port: write localhost:7070"),
    ("", "no port"),
    ("localhost:grpc", "'grpc' is no port"),
    ("localhost:0", "'0' is no port"),
    ("localhost:65536", "'65536' is no port"),
    (":7070", "write HOST:PORT"),
    ("::1:7070", r"an IPv6 host as \[::1\]:PORT"),
    ("unix:", "names no socket"),
    ("unix://", "names no socket"),
    (None, "an address is a str"),
]


@pytest.mark.parametrize(("address", "message"), ADDRESSES)
def test_what_is_no_address(address: Any, message: str) -> None:
    with pytest.raises(InvalidAddress, match=message):
        connect(address, model="m")


# --- who is there


@pytest.mark.parametrize("what", ["nobody", "a missing socket", "an unknown host"])
def test_no_server_there(what: str, tmp_path: Path) -> None:
    """It is said at once; the default timeout_s is 30 s."""
    address = {
        "nobody": f"127.0.0.1:{free_port()}",
        "a missing socket": f"unix:{tmp_path}/none",
        "an unknown host": "no-such-host.invalid:7070",
    }[what]
    started_s = time.monotonic()
    with pytest.raises(ServerUnavailable) as caught:
        connect(address, model="m")
    assert time.monotonic() - started_s < 15.0
    assert re.search(
        f"{re.escape(address)} after 0.0 s .*start one with: pushstep-server.*wait_s", caught.value.message
    )


def test_who_listens_and_never_answers(tmp_path: Path) -> None:
    with listener() as there, pytest.raises(ServerUnavailable, match=r"after 0\.3 s"):
        connect(f"127.0.0.1:{there.getsockname()[1]}", model="m", timeout_s=0.3)


def test_a_server_s_rest_port_says_where_workers_go(server: RunningServer) -> None:
    expected = f"a pushstep server's REST door, for operators: workers connect to {server.grpc}"
    with pytest.raises(InvalidAddress, match=f"(?m){re.escape(expected)}$"):
        connect(server.http, model="m")


def test_another_web_server() -> None:
    def answer(there: socket.socket) -> None:
        there.settimeout(20)
        for _ in range(8):
            connection, _ = there.accept()
            with connection:
                if connection.recv(1 << 16):
                    connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno")
            if done.is_set():
                return

    done = threading.Event()
    with listener() as there:
        serving = threading.Thread(target=answer, args=(there,))
        serving.start()
        with pytest.raises(InvalidAddress, match="it speaks HTTP: workers connect to"):
            connect(f"127.0.0.1:{there.getsockname()[1]}", model="m")
        done.set()
        socket.create_connection(there.getsockname()).close()
        serving.join(60)


def test_a_server_that_ends_each_connection_is_not_taken_for_one_that_speaks_tls() -> None:
    """One that stops does, and a network that breaks; who waits for it would be told to pass certificates."""

    def end(there: socket.socket) -> None:
        there.settimeout(20)
        while not done.is_set():
            connection, _ = there.accept()
            with connection:
                connection.recv(1 << 16)

    done = threading.Event()
    with listener() as there:
        serving = threading.Thread(target=end, args=(there,))
        serving.start()
        try:
            with pytest.raises(ServerUnavailable):
                connect(f"127.0.0.1:{there.getsockname()[1]}", model="m", timeout_s=1.0)
        finally:
            done.set()
            socket.create_connection(there.getsockname()).close()
            serving.join(60)


def test_another_grpc_server() -> None:
    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    try:
        with pytest.raises(InvalidAddress, match="a gRPC server, and not one of pushstep"):
            connect(f"127.0.0.1:{port}", model="m")
    finally:
        other.stop(None).wait()


@pytest.mark.parametrize("by", ["port", "socket"])
def test_a_server_that_is_started_meanwhile_is_waited_for(data: Path, by: str) -> None:
    port = free_port()
    path = str(data / "a.sock")
    address = f"127.0.0.1:{port}" if by == "port" else f"unix:{path}"
    connected: list[Any] = []
    waiting = threading.Thread(
        target=lambda: connected.append(connect(address, model="m", worker="w0", wait_s=60.0))
    )
    waiting.start()
    with running_server(data, "--grpc", f"127.0.0.1:{port}", "--unix", path):
        waiting.join(60)
        (session,) = connected
        session.create(VALUES)
        session.close()


def test_wait_s_ends(tmp_path: Path) -> None:
    with pytest.raises(ServerUnavailable, match=r"after 0\.4 s"):
        connect(f"unix:{tmp_path}/none", model="m", wait_s=0.4)


# --- what a failure leaves


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_a_failed_connect_leaves_nothing_open(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = f"127.0.0.1:{free_port()}"

    def fail(address: str, **wrong: Any) -> None:
        with pytest.raises(PushstepError):
            connect(address, **{"model": "m", "worker": "w0", **wrong})

    def fail_all() -> None:
        fail(nobody)
        fail(server.http)
        fail(server.grpc, wire="float33")
        fail(server.grpc, top_k=7)
        with monkeypatch.context() as patch:  # what only the session finds
            patch.setattr("pushstep.client.connection.check_options", lambda *_, **__: None)
            fail(server.grpc, wire="float33")

    threads = set(threading.enumerate())
    fail_all()
    before = descriptors()
    for _ in range(3):
        fail_all()
    assert descriptors() <= before
    assert {t.name for t in set(threading.enumerate()) - threads} <= {"pushstep-waits"}


# --- who it is


def test_the_default_worker_name(server: RunningServer, model_name: str) -> None:
    with connect(server.grpc, model=model_name) as made:
        made.create(VALUES)
        assert made.worker.endswith(f"-{os.getpid()}")
        listed = server.rest("GET", f"/v1/models/{model_name}/workers").json()["workers"]
        assert [worker["name"] for worker in listed] == [made.worker]


@pytest.mark.parametrize("host", ["host-1", "ünïcode.example", "_x", "h" * 255, "a b/c", ""])
def test_any_host_makes_a_name(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    name = options.default_worker()
    options.check_options("m", name, None, None, choices={}, seconds={})
    if host == "host-1":
        assert name == f"host-1-{os.getpid()}"


def test_a_restarted_server_is_no_first_contact(data: Path) -> None:
    """Who is connected keeps asking, as ever: only `connect` says at once that nobody is there."""
    port = free_port()
    server = start_server(data, "--grpc", f"127.0.0.1:{port}")
    session = connect(server.grpc, model="m", worker="w0", shared_memory=False, retry_for_s=60.0)
    session.create(VALUES)
    server.stop()
    pushing = threading.Thread(target=lambda: session.push({"a": np.ones(3, np.float32)}))
    pushing.start()
    with running_server(data, "--grpc", f"127.0.0.1:{port}"):
        pushing.join(60)
        assert session.last_receipt is not None and session.last_receipt.version == 1
        session.close()
