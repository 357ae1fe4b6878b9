"""TLS at both doors, certificates that change, and tokens that are taken back while they are in use."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from pushstep.client import TLS, connect
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import (
    PushstepError,
    TlsFailed,
    TokenRevoked,
    Unauthenticated,
)
from pushstep.server.access.roles import Role
from tests.support.access.secured import Authority, TokenFile, reload
from tests.support.servers.harness import RunningServer, running_server, start_server, wait_until
from tests.support.workers.unread import UnreadCall
from tests.support.workers.wire import PARAMETERS, RawWorker, Wire, state_of

STALL_S = 2.0
GRADIENTS = {name: np.full(value.shape, 0.5, np.float32) for name, value in PARAMETERS.items()}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[RunningServer]:
    """A server that has a certificate, and asks for its callers'. It has no tokens."""
    options = (*authority.server_options(asks=True), "--stall-s", str(STALL_S))
    with running_server(tmp_path_factory.mktemp("secured") / "data", *options) as running:
        yield running


@pytest.fixture(scope="module")
def own(authority: Authority) -> TLS:
    return authority.tls(authority.issue("worker", "worker"))


def get(server: RunningServer, tls: TLS, path: str = "/healthz") -> httpx.Response:
    context = ssl.create_default_context(cafile=tls.ca)
    if tls.cert is not None and tls.key is not None:
        context.load_cert_chain(tls.cert, tls.key)
    with httpx.Client(verify=context, trust_env=False, timeout=20.0) as client:
        return client.get(f"https://{server.http}{path}")


# --- TLS


def test_both_doors_speak_tls_with_who_has_a_certificate(
    secured: RunningServer, own: TLS, model_name: str
) -> None:
    with secured.connect(model_name, tls=own) as session:
        session.create(PARAMETERS)
        assert session.push(GRADIENTS).version == 1
        assert session.pull()["bias"].shape == (4,)
    assert get(secured, own, f"/v1/models/{model_name}").json()["version"] == 1


def test_the_unix_socket_needs_none(secured: RunningServer, own: TLS, model_name: str) -> None:
    with secured.connect(model_name, address=f"unix:{secured.unix}", tls=own) as session:
        session.create(PARAMETERS)


REFUSED = {
    "no certificate": "a certificate of yours",
    "one of another CA": "does not accept",
    "an expired one": "does not accept",
    "a CA that is not the server's": "not accepted: unable to get local issuer certificate",
    "public CAs": "not accepted",
    "no TLS": "it speaks TLS",
}


@pytest.fixture(scope="module")
def shown(authority: Authority, own: TLS, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TLS | bool]:
    other = Authority(tmp_path_factory.mktemp("other"))
    cert, key = other.issue("worker", "worker")
    return {
        "no certificate": authority.tls(),
        "one of another CA": TLS(ca=authority.ca, cert=cert, key=key),
        "an expired one": authority.tls(authority.issue("late", "worker", expired=True)),
        "a CA that is not the server's": TLS(ca=other.ca, cert=own.cert, key=own.key),
        "public CAs": TLS(cert=own.cert, key=own.key),
        "no TLS": False,
    }


@pytest.mark.parametrize("case", REFUSED)
def test_who_is_not_believed_is_told_why_at_once(
    secured: RunningServer, shown: dict[str, TLS | bool], case: str
) -> None:
    begun_s = time.monotonic()
    with pytest.raises(TlsFailed, match=REFUSED[case]):
        connect(secured.grpc, model="m", timeout_s=30.0, tls=shown[case])
    assert time.monotonic() - begun_s < 25  # not by running out of time
    tls = shown[case]
    if isinstance(tls, TLS):
        with pytest.raises((httpx.HTTPError, OSError)):
            get(secured, tls)
    else:
        with pytest.raises(httpx.HTTPError):
            secured.rest("GET", "/healthz")


def test_a_name_that_is_not_the_certificate_s_is_not_believed(
    data: Path, authority: Authority, tmp_path: Path
) -> None:
    """And a server whose certificate has expired is not, either."""
    for name, how in (("elsewhere", {}), ("late", {"expired": True})):
        hosts = ("elsewhere.example",) if name == "elsewhere" else ("127.0.0.1",)
        cert, key = authority.issue(name, *hosts, **how)
        options = ("--tls-cert", str(cert), "--tls-key", str(key))
        words = "mismatch" if name == "elsewhere" else "expired"
        with running_server(data / name, *options) as server, pytest.raises(TlsFailed, match=words):
            connect(server.grpc, model="m", tls=authority.tls())


def test_a_server_without_tls_says_so(server: RunningServer, authority: Authority) -> None:
    with pytest.raises(TlsFailed, match="it speaks no TLS"):
        connect(server.grpc, model="m", tls=authority.tls())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.parametrize("door", ["grpc", "http"])
def test_old_tls_is_refused(secured: RunningServer, own: TLS, door: str, version: ssl.TLSVersion) -> None:
    with pytest.raises(ssl.SSLError):
        handshake(getattr(secured, door), own, version, "ALL:@SECLEVEL=0")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("door", ["grpc", "http"])
def test_ciphers_keep_past_connections_secret(
    secured: RunningServer, own: TLS, door: str, version: ssl.TLSVersion
) -> None:
    address = getattr(secured, door)
    name = handshake(address, own, version)
    assert name.startswith(("TLS_", "ECDHE-")), name
    assert "GCM" in name or "CHACHA20" in name
    if version is ssl.TLSVersion.TLSv1_2:
        with pytest.raises(ssl.SSLError):
            handshake(address, own, version, "AES128-SHA:AES256-SHA:AES128-GCM-SHA256:ECDHE-ECDSA-AES128-SHA")


def handshake(address: str, tls: TLS, version: ssl.TLSVersion, ciphers: str = "") -> str:
    """The cipher on which a handshake of one version agrees."""
    context = ssl.create_default_context(cafile=tls.ca)
    if tls.cert is not None and tls.key is not None:
        context.load_cert_chain(tls.cert, tls.key)
    with pytest.warns(DeprecationWarning) if version < ssl.TLSVersion.TLSv1_2 else contextlib.nullcontext():
        context.minimum_version = context.maximum_version = version
    if ciphers:
        context.set_ciphers(ciphers)
    context.set_alpn_protocols(["h2", "http/1.1"])
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=20) as connection,
        context.wrap_socket(connection, server_hostname=host) as secured,
    ):
        return str((secured.cipher() or ("",))[0])


def test_handshakes_that_do_not_come_keep_nobody_out(secured: RunningServer, own: TLS) -> None:
    """At either door, more than there may be connections of operators; each is ended in its time."""
    with contextlib.ExitStack() as stack:
        waiting = []
        for port in (secured.http, secured.grpc):
            host, _, number = port.rpartition(":")
            waiting += [
                stack.enter_context(socket.create_connection((host, int(number)), timeout=20))
                for _ in range(300)
            ]
        for connection in waiting[::2]:
            connection.sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a ClientHello
        assert get(secured, own).status_code == 200
        assert "andshake" not in secured.log.read_text()  # strangers write no lines
        secured.connect("handshakes", tls=own).create(PARAMETERS)
        waiting[0].settimeout(20)
        assert waiting[0].recv(1) == b""


# --- certificates that change


def test_new_certificates_are_taken_while_workers_push(data: Path, tmp_path: Path) -> None:
    """Another CA for all, ten times, while two workers push: no push is lost, and none is made twice."""
    authority = Authority(tmp_path / "tls")
    both = tmp_path / "both.pem"
    both.write_bytes(authority.ca.read_bytes())
    with running_server(data, *authority.server_options()) as server:
        tls = TLS(ca=both)
        sessions = [server.connect("m", f"w{number}", tls=tls) for number in range(2)]
        for session in sessions:
            session.create({"w": np.zeros(64, np.float32)})
        stopped, made, failed = threading.Event(), [0, 0], list[BaseException]()

        def push(number: int) -> None:
            try:
                while not stopped.is_set():
                    assert sessions[number].push({"w": np.ones(64, np.float32)}).outcome == "applied"
                    made[number] += 1
            except BaseException as error:  # noqa: BLE001 - the test's thread shows it
                failed.append(error)

        threads = [threading.Thread(target=push, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        try:
            for number in range(5):
                before = list(made)
                renewed = Authority(tmp_path / f"tls-{number}")
                both.write_bytes(both.read_bytes() + renewed.ca.read_bytes())
                cert, key = renewed.issue("server")
                (authority.folder / "server.key").write_bytes(key.read_bytes())
                if number == 2:
                    reload(server)  # at an unlucky moment: the key has changed, and the certificate has not
                (authority.folder / "server.pem").write_bytes(cert.read_bytes())
                reload(server)
                wait_until(lambda renewed=renewed: believed(server, renewed))
                server.connect(f"new-{number}", tls=TLS(ca=renewed.ca)).create(PARAMETERS)
                wait_until(
                    lambda before=before: all(now > then for now, then in zip(made, before, strict=True))
                )
        finally:
            stopped.set()
            for thread in threads:
                thread.join()
        assert failed == []
        assert get(server, TLS(ca=both), "/v1/models/m").json()["version"] == sum(made)
        assert "internal error" not in server.log.read_text()


def believed(server: RunningServer, authority: Authority) -> bool:
    """Whether a new connection to either door shows a certificate of this CA."""
    for address in (server.grpc, server.http):
        try:
            handshake(address, authority.tls(), ssl.TLSVersion.TLSv1_3)
        except ssl.SSLCertVerificationError:
            return False
    return True


def test_a_worker_s_renewed_certificate_is_used_when_it_connects_again(data: Path, tmp_path: Path) -> None:
    """gRPC keeps the files that it was given; a session in trouble looks at them anew."""
    authority, later = Authority(tmp_path / "tls"), Authority(tmp_path / "later")
    own = authority.tls(authority.issue("worker", "worker"))
    server = start_server(data, *authority.server_options(asks=True))
    try:
        session = server.connect("m", tls=own, retry_for_s=60.0)
        session.create({"w": np.zeros(4, np.float32)})
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        server.close_pipe()
        for name, hosts in (("worker", ("worker",)), ("server", ())):
            made = later.issue(name, *hosts)
            for path in made:
                (authority.folder / path.name).write_bytes(path.read_bytes())
        authority.ca.write_bytes(later.ca.read_bytes())
        files = [str(authority.folder / name) for name in ("server.pem", "server.key")]
        options = ("--tls-cert", files[0], "--tls-key", files[1], "--tls-client-ca", str(authority.ca))
        server = start_server(data, "--grpc", server.grpc, *options)
        assert session.push({"w": np.ones(4, np.float32)}).outcome == "applied"
        session.close()
    finally:
        server.kill()


def test_files_that_do_not_fit_are_no_start(data: Path, tmp_path: Path, authority: Authority) -> None:
    (cert, _), (_, key) = authority.issue("one"), authority.issue("two")
    for options, words in (
        (("--tls-cert", cert), "go together"),
        (("--tls-client-ca", cert), "goes with"),
        (("--tls-cert", cert, "--tls-key", key), "KEY_VALUES_MISMATCH"),
        (("--tls-cert", cert, "--tls-key", tmp_path / "none"), "No such file"),
    ):
        with pytest.raises(RuntimeError, match=words):
            start_server(data, *map(str, options))


# --- tokens that are taken back


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path / "tokens")


@pytest.fixture
def guarded(data: Path, tokens: TokenFile) -> Iterator[RunningServer]:
    tokens.add("second", Role.WORKER)
    with running_server(data, *tokens.options()) as running:
        running.headers, running.metadata = tokens.headers("operator"), tokens.metadata("second")
        yield running


def test_a_token_that_is_taken_back_ends_a_push_that_streams(
    guarded: RunningServer, tokens: TokenFile
) -> None:
    """Half a body has come: the call ends by name in a second, and the model is as it was; another's pushes go on."""
    parameters = {"w": np.zeros(12 << 20, np.float32)}
    guarded.connect("m", "owner", token=tokens.tokens["second"]).create(parameters)
    wire = Wire(guarded.grpc, tokens.metadata("worker"))
    raw = RawWorker(wire, "m")
    before = state_of(guarded, "m")
    ended: list[PushstepError] = []
    begun, more = threading.Event(), threading.Event()
    messages = raw.good(name="w")

    def half() -> Iterator[bytes]:
        # more than the server's window takes, so it has read the header
        yield from messages[: len(messages) // 2]
        begun.set()
        more.wait(30)

    def push() -> None:
        ended.append(wire.refused("Push", half()))

    thread = threading.Thread(target=push)
    thread.start()
    assert begun.wait(30)
    with other_pushes(guarded, tokens) as made:
        wait_until(lambda: made[0] > 2)
        tokens.take_back("worker")
        begun_s = time.monotonic()
        reload(guarded)
        thread.join(60)
        assert time.monotonic() - begun_s < 5
        more.set()
        (error,) = ended
        assert type(error) is TokenRevoked
        wait_until(lambda: "calls cut: 1" in guarded.log.read_text())  # a thread of its own writes the log
        seen = made[0]
        wait_until(lambda: made[0] > seen + 2)
    assert type(wire.refused("Push", iter([b""]))) is Unauthenticated
    assert state_of(guarded, "m") == before
    wire.close()


def test_a_token_that_is_taken_back_ends_a_pull_that_nobody_reads(
    guarded: RunningServer, tokens: TokenFile
) -> None:
    """Cut in its first message, before gRPC has heard that any of it is sent, the call ends with a status."""
    guarded.connect("m", "owner", token=tokens.tokens["second"]).create({"w": np.zeros(1 << 20, np.float32)})
    request = pb.PullRequest(model="m").SerializeToString()
    call = UnreadCall(guarded.grpc, "Pull", [request], metadata=tokens.metadata("worker"))
    wait_until(call.begins)
    tokens.take_back("worker")
    reload(guarded)
    wait_until(lambda: "calls cut: 1" in guarded.log.read_text())
    assert not call.is_over()
    call.open(1 << 30)
    wait_until(call.is_over)
    assert call.has_status
    call.close()


@contextlib.contextmanager
def other_pushes(server: RunningServer, tokens: TokenFile) -> Iterator[list[int]]:
    """Pushes by the second token, to a model of its own; how many they are."""
    made, stopped = [0], threading.Event()
    session = server.connect("of-second", token=tokens.tokens["second"])
    session.create({"w": np.zeros(4, np.float32)})

    def push() -> None:
        while not stopped.is_set():
            session.push({"w": np.ones(4, np.float32)})
            made[0] += 1

    thread = threading.Thread(target=push)
    thread.start()
    try:
        yield made
    finally:
        stopped.set()
        thread.join()


@pytest.mark.parametrize("shared_memory", [False, True], ids=["frames", "shared memory"])
def test_a_session_whose_token_is_taken_back_is_told_so(
    guarded: RunningServer, tokens: TokenFile, shared_memory: bool
) -> None:
    session = guarded.connect("m", token=tokens.tokens["worker"], shared_memory=shared_memory)
    session.create({"w": np.zeros(4, np.float32)})
    receipt = session.push({"w": np.ones(4, np.float32)})
    tokens.take_back("worker")
    reload(guarded)
    wait_until(lambda: "revoked: worker" in guarded.log.read_text())
    with pytest.raises((TokenRevoked, Unauthenticated)):
        session.push({"w": np.ones(4, np.float32)})
    assert guarded.rest("GET", "/v1/models/m").json()["version"] == receipt.version
    with pytest.warns(RuntimeWarning, match="could not leave"):
        session.close()


def test_a_token_that_is_taken_back_ends_its_stream_of_events(
    guarded: RunningServer, tokens: TokenFile
) -> None:
    """Also one that waits for an event; another's goes on, and the log has no error for it."""
    guarded.connect("m", token=tokens.tokens["worker"]).create(PARAMETERS)
    url = f"http://{guarded.http}/v1/models/m/events"
    stream = {"Accept": "text/event-stream"}
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx.Client(timeout=60, trust_env=False))
        viewers, operators = (
            stack.enter_context(client.stream("GET", url, headers={**stream, **tokens.headers(role)}))
            for role in ("viewer", "operator")
        )
        lines = viewers.iter_lines()
        assert next(lines).startswith("retry:")
        tokens.take_back("viewer")
        reload(guarded)
        assert [line for line in lines if line][-2:] == ["event: ended", 'data: {"why": "token_revoked"}']
        wait_until(lambda: "revoked: viewer; calls cut: 1" in guarded.log.read_text())
        guarded.rest("PATCH", "/v1/models/m/gate", json={"nonfinite": "skip"})
        assert any("gate_changed" in line for line in operators.iter_lines())
        assert client.get(url, headers={**stream, **tokens.headers("viewer")}).status_code == 401
    assert not re.search("Traceback|ERROR", guarded.log.read_text())


def test_a_token_that_is_taken_back_ends_its_download(guarded: RunningServer, tokens: TokenFile) -> None:
    """In the middle, so that nobody takes what has come for the whole; and the log has no error for it."""
    large = {"w": np.zeros(16 << 20, np.float32)}
    guarded.connect("m", token=tokens.tokens["worker"]).create(large)
    url = f"http://{guarded.http}/v1/models/m/export?format=safetensors"
    with (
        httpx.Client(timeout=60, trust_env=False) as client,
        client.stream("GET", url, headers=tokens.headers("viewer")) as answer,
    ):
        blocks = answer.iter_raw(1 << 16)
        next(blocks)
        tokens.take_back("viewer")
        reload(guarded)
        wait_until(lambda: "revoked: viewer; calls cut: 1" in guarded.log.read_text())
        with pytest.raises(httpx.RemoteProtocolError):
            list(blocks)
    assert not re.search("Traceback|ERROR", guarded.log.read_text())


def test_a_token_that_changes_its_role_is_another_from_then_on(
    guarded: RunningServer, tokens: TokenFile
) -> None:
    headers = tokens.headers("viewer")
    assert guarded.rest("POST", "/v1/models/none/restore", headers=headers).status_code == 403
    lines = tokens.path.read_text().replace("viewer viewer", "viewer operator")
    tokens.path.write_text(lines)
    reload(guarded)
    wait_until(lambda: "revoked: viewer" in guarded.log.read_text())
    assert (
        guarded.rest("POST", "/v1/models/none/restore", headers=headers, json={"version": 1}).status_code
        == 404
    )


def test_tokens_that_cannot_be_read_change_nothing(guarded: RunningServer, tokens: TokenFile) -> None:
    before = tokens.path.read_text()
    for content in ("what is this", before + before):
        tokens.path.write_text(content)
        lines = guarded.log.read_text().count("the tokens stay as they are")
        reload(guarded)
        wait_until(lambda lines=lines: guarded.log.read_text().count("the tokens stay as they are") > lines)
        assert guarded.rest("GET", "/v1/models").status_code == 200
    assert not any(token in guarded.log.read_text() for token in tokens.tokens.values())


def test_an_emptied_source_closes_the_doors(guarded: RunningServer, tokens: TokenFile) -> None:
    tokens.path.write_text("")
    reload(guarded)
    wait_until(lambda: "0 tokens are known" in guarded.log.read_text())
    assert guarded.rest("GET", "/v1/models").status_code == 401
    call: Any = None
    with grpc.insecure_channel(guarded.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        call = channel.unary_unary("/pushstep.v1.TrainingService/Describe")
        call(pb.DescribeRequest().SerializeToString(), metadata=tokens.metadata("operator"), timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
