"""Each role at each route, RPC and message of the local socket, as the table says, at a server that has tokens."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pushstep.client import Session
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import (
    PermissionDenied,
    PushstepError,
    TooManyAttempts,
    Unauthenticated,
)
from pushstep.proto.errors.status import from_rpc_error
from pushstep.server.access.attempts import FREE_ATTEMPTS
from pushstep.server.access.roles import LET_IN, Need, Role
from pushstep.server.access.table import ROUTES, RPCS
from tests.support.access.secured import TokenFile
from tests.support.servers.harness import RunningServer, running_server
from tests.support.workers.wire import PARAMETERS, state_of

MODEL, OTHER = "flights", "other"
WHO = (None, "unknown", *Role)
PATH_VALUES = {
    "m": MODEL,
    "name": "nothing",
    "worker": "nobody",
    "snapshot": "none",
    "hook_id": "none",
    "index": "99",
    "asset": "app.js",
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    made = TokenFile(tmp_path_factory.mktemp("tokens") / "tokens")
    made.add("limited-worker", Role.WORKER, f"{MODEL},test-*")
    made.add("limited-operator", Role.OPERATOR, f"{MODEL},test-*")
    made.add("bound-worker", Role.WORKER, workers="bound,gpu-*")
    return made


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, tokens: TokenFile) -> Iterator[RunningServer]:
    options = (*tokens.options(), "--log-level", "debug")
    with running_server(tmp_path_factory.mktemp("guarded") / "data", *options) as running:
        running.headers = tokens.headers("operator")
        running.metadata = tokens.metadata("worker")
        for model in (MODEL, OTHER):
            running.connect(model, token=tokens.tokens["worker"]).create(PARAMETERS)
        yield running


@contextlib.contextmanager
def both_untouched(server: RunningServer) -> Iterator[None]:
    before = [state_of(server, model) for model in (MODEL, OTHER)]
    yield
    assert [state_of(server, model) for model in (MODEL, OTHER)] == before


def authorization(tokens: TokenFile, who: str | None) -> dict[str, str]:
    if who is None:
        return {}
    return {"Authorization": "Bearer " + "x" * 43} if who == "unknown" else tokens.headers(who)


def expected(need: Need, who: str | None) -> int | None:
    """The status of a refusal; None if the caller is let in."""
    if need is Need.OPEN:
        return None
    if not isinstance(who, Role):
        return 401
    return None if who in LET_IN[need] else 403


def of_a_request(entry: str) -> tuple[str, str]:
    """A request that a route refuses for what it names, or answers without changing anything."""
    method, path = entry.split(" ")
    return method, re.sub(r"\{(\w+)\}", lambda found: PATH_VALUES[found[1]], path)


# --- REST


@pytest.mark.parametrize("who", WHO, ids=str)
def test_each_role_at_each_route(guarded: RunningServer, tokens: TokenFile, who: str | None) -> None:
    wrong = {}
    with both_untouched(guarded):
        for number, (entry, need) in enumerate(ROUTES.items()):
            if (entry, expected(need, who)) == ("DELETE /v1/models/{m}", None) or (
                need is Need.OPERATOR and expected(need, who) is None
            ):
                continue  # what operators do is tested where it belongs; here it would be done
            method, path = of_a_request(entry)
            # addresses of this host, so that each has its own attempts
            answer = guarded.rest(
                method, path, headers=authorization(tokens, who), local_address=f"127.0.2.{1 + number % 250}"
            )
            status = expected(need, who)
            refused = answer.status_code if answer.status_code in (401, 403) else None
            if refused != status:
                wrong[entry] = answer.status_code, answer.text
            if status is not None:
                assert answer.headers["www-authenticate"].startswith('Bearer realm="pushstep"'), entry
                assert answer.headers["content-type"] == "application/problem+json"
                code = {401: "unauthenticated", 403: "permission_denied"}[status]
                assert method == "HEAD" or answer.json()["code"] == code
    assert wrong == {}


@pytest.mark.parametrize("entry", [entry for entry, need in ROUTES.items() if need is Need.OPERATOR])
def test_an_operator_gets_as_far_as_the_resource(
    guarded: RunningServer, tokens: TokenFile, entry: str
) -> None:
    """To one that is not there, of a model that is not there, so that nothing happens."""
    method, path = of_a_request(entry)
    path = path.replace(f"/{MODEL}", "/missing")
    answer = guarded.rest(method, path, headers=tokens.headers("operator"))
    assert answer.status_code in (404, 409, 411, 415, 422), answer.text


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/"), ("GET", "/v2"), ("TRACE", "/v1"), ("OPTIONS", "/v1/models"), ("POST", "/healthz")],
)
def test_what_is_nowhere_is_closed_too(
    guarded: RunningServer, tokens: TokenFile, method: str, path: str
) -> None:
    assert guarded.rest(method, path, headers={}).status_code == 401
    assert guarded.rest(method, path, headers=tokens.headers("worker")).status_code in (404, 405)


def test_the_description_says_which_role_each_route_asks_for(
    guarded: RunningServer, tokens: TokenFile
) -> None:
    described = guarded.rest("GET", "/openapi.json", headers=tokens.headers("worker")).json()
    found = {
        f"{method.upper()} {path}": (operation["x-role"], bool(operation["security"]))
        for path, operations in described["paths"].items()
        for method, operation in operations.items()
    }
    assert found == {
        entry: (need.value, need is not Need.OPEN)
        for entry, need in ROUTES.items()
        if not entry.endswith(("openapi.json", "/ui", "/ui/{asset}"))
    }
    assert described["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"


def test_a_body_is_not_read_before_its_sender_is_let_in(guarded: RunningServer) -> None:
    """Of a gibibyte that is announced, nothing has to come."""
    host, _, port = guarded.http.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            f"PUT /v1/models/{MODEL}/state-dict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {1 << 30}\r\n\r\n".encode()
        )
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 401 ")


# --- gRPC


def call(
    address: str, method: str, metadata: tuple[tuple[str, str], ...], message: bytes = b""
) -> PushstepError | None:
    """The error with which the catalogue refuses a call, None if it has none."""
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        answers = channel.stream_stream(method)(iter([message]), metadata=metadata, timeout=20)
        try:
            next(iter(answers), None)
            answers.cancel()
            return None
        except grpc.RpcError as error:
            return from_rpc_error(error)


def refusal(address: str, method: str, tokens: TokenFile, who: str | None, message: bytes = b"") -> Any:
    fields = authorization(tokens, who)
    metadata = tuple((name.lower(), value) for name, value in fields.items())
    found = call(address, method, metadata, message)
    if isinstance(found, TooManyAttempts):  # a table of refusals is more than an address has
        return Unauthenticated
    return type(found) if isinstance(found, (Unauthenticated, PermissionDenied)) else None


@pytest.mark.parametrize("unix", [False, True], ids=["TCP", "Unix socket"])
@pytest.mark.parametrize("who", WHO, ids=str)
def test_each_role_at_each_rpc(
    guarded: RunningServer, tokens: TokenFile, who: str | None, unix: bool
) -> None:
    """An operator's token trains nothing, and a viewer's reads nothing here; nor does a Unix socket let anyone in."""
    address = f"unix:{guarded.unix}" if unix else guarded.grpc
    kinds = {None: None, 401: Unauthenticated, 403: PermissionDenied}
    wrong = {}
    with both_untouched(guarded):
        for method, need in RPCS.items():
            if method.endswith("/List"):
                continue  # not in every version of grpc-health-checking
            found = refusal(address, method, tokens, who)
            if found is not kinds[expected(need, who)]:
                wrong[method] = found
    assert wrong == {}


def test_health_is_open(guarded: RunningServer) -> None:
    with grpc.insecure_channel(guarded.grpc) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    for path in ("/healthz", "/readyz"):
        assert guarded.rest("GET", path, headers={}).status_code == 200


def test_a_method_that_is_not_there_is_not_there_for_anyone(
    guarded: RunningServer, tokens: TokenFile
) -> None:
    with grpc.insecure_channel(guarded.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/pushstep.v1.TrainingService/Destroy")(b"", metadata=tokens.metadata("operator"))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


# --- models


def naming(method: str, model: str) -> bytes:
    """A message of an RPC that names a model."""
    header = {"Push": pb.PushRequest, "Exchange": pb.PushRequest, "TakeSteps": pb.PushRequest}
    if method in (*header, "Upload"):
        made: Any = header.get(method, pb.UploadRequest)()
        made.header.model = model
    elif method == "JoinInParts":
        made = pb.JoinPart(part=pb.JoinRequest(model=model, worker="w").SerializeToString())
    else:
        made = getattr(pb, f"{method}Request")(model=model)
    return bytes(made.SerializeToString())


OF_A_MODEL = [method for method, need in RPCS.items() if need is Need.WORKER]


@pytest.mark.parametrize("method", OF_A_MODEL)
def test_a_token_for_one_model_reaches_no_other_by_any_rpc(
    guarded: RunningServer, tokens: TokenFile, method: str
) -> None:
    name = method.rpartition("/")[2]
    with both_untouched(guarded):
        for model, is_theirs in ((MODEL, True), (OTHER, False), ("missing", False), ("test-1", True)):
            found = refusal(guarded.grpc, method, tokens, "limited-worker", naming(name, model))
            assert found is (None if is_theirs else PermissionDenied), (method, model)


def of_worker(method: str, worker: str) -> bytes | None:
    """A message of an RPC that names a worker of the model; None if none of its messages does."""
    of_steps = method in ("Exchange", "TakeSteps")
    kind = pb.PushRequest if of_steps else getattr(pb, f"{method}Request", pb.JoinRequest)
    made: Any = kind()
    named = made.header if "header" in kind.DESCRIPTOR.fields_by_name else made
    named.model = MODEL
    fields = named.DESCRIPTOR.fields_by_name
    if "worker" in fields:
        named.worker = worker
    elif "identity" in fields:
        named.identity.worker = worker
    else:
        return None
    whole = bytes(made.SerializeToString())
    return bytes(pb.JoinPart(part=whole).SerializeToString()) if method == "JoinInParts" else whole


@pytest.mark.parametrize("method", OF_A_MODEL)
def test_a_token_for_one_worker_speaks_for_no_other_by_any_rpc(
    guarded: RunningServer, tokens: TokenFile, method: str
) -> None:
    name = method.rpartition("/")[2]
    for worker, is_theirs in (("bound", True), ("gpu-7", True), ("w0", False), ("bound2", False)):
        message = of_worker(name, worker)
        if message is None:
            assert name in ("PullRows", "PullExtras", "PullState"), f"{name} names no worker"
            continue
        found = refusal(guarded.grpc, method, tokens, "bound-worker", message)
        assert found is (None if is_theirs else PermissionDenied), (method, worker)


@pytest.mark.parametrize("shared_memory", [False, True], ids=["frames", "shared memory"])
def test_a_token_for_one_worker_trains_as_this_one(
    guarded: RunningServer, tokens: TokenFile, shared_memory: bool
) -> None:
    held = tokens.tokens["bound-worker"]
    with guarded.connect("bound", "bound", token=held, shared_memory=shared_memory) as session:
        session.create({"w": np.zeros(4, np.float32)})
        session.push({"w": np.ones(4, np.float32)})
    with (
        guarded.connect("bound", "w0", token=held, shared_memory=shared_memory) as session,
        pytest.raises(PermissionDenied, match=r"for workers bound, gpu-\*, and 'w0' is none of them"),
    ):
        session.create({"w": np.zeros(4, np.float32)})


@pytest.mark.parametrize("entry", [entry for entry in ROUTES if "{m}" in entry])
def test_a_token_for_one_model_reaches_no_other_by_any_route(
    guarded: RunningServer, tokens: TokenFile, entry: str
) -> None:
    method, path = of_a_request(entry)
    headers = tokens.headers("limited-operator")
    for model in (OTHER, "missing", "%6fther", "flights%2F..%2Fother"):
        other = path.replace(f"/{MODEL}", f"/{model}", 1)
        answer = guarded.rest(method, other, headers=headers)
        assert answer.status_code in (403, 404), (other, answer.text)
        if model != "flights%2F..%2Fother":
            assert answer.status_code == 403, (other, answer.text)


def test_a_token_for_some_models_sees_only_these(guarded: RunningServer, tokens: TokenFile) -> None:
    headers = tokens.headers("limited-operator")
    assert [
        shown["name"] for shown in guarded.rest("GET", "/v1/models", headers=headers).json()["models"]
    ] == [MODEL]
    assert guarded.rest("GET", "/metrics", headers=headers).status_code == 403
    for model, status in ((MODEL, 200), (OTHER, 403), ("", 403)):
        answer = guarded.rest("GET", "/v1/capacity", params={"model": model}, headers=headers)
        assert answer.status_code == status, answer.text
    for query in ({"name": OTHER}, {"name": ["test-1", OTHER]}, {"name": "new"}):
        answer = guarded.rest("POST", "/v1/models", params=query, headers=headers, content=b"x")
        assert answer.status_code == 403, answer.text
    metadata = tokens.metadata("limited-worker")
    with grpc.insecure_channel(guarded.grpc) as channel:
        answer = channel.unary_unary("/pushstep.v1.TrainingService/Describe")(b"", metadata=metadata)
    assert list(pb.DescribeResponse.FromString(answer).models) == [MODEL]


# --- the local socket, events, and what is never said


def shared(guarded: RunningServer, tokens: TokenFile, model: str, token: str) -> Session:
    return guarded.connect(model, "local", shared_memory=True, token=tokens.tokens[token])


def test_the_local_socket_s_calls_are_the_opener_s(guarded: RunningServer, tokens: TokenFile) -> None:
    session = shared(guarded, tokens, "test-shared", "limited-worker")
    session.create({"w": np.zeros(4, np.float32)})
    for _ in range(3):
        session.push({"w": np.ones(4, np.float32)})
    assert session.memory.region is not None


def test_events_say_whose_token_it_was(guarded: RunningServer, tokens: TokenFile, model_name: str) -> None:
    with guarded.connect(model_name, token=tokens.tokens["worker"]) as session:
        session.create({"w": np.zeros(4, np.float32)})
        headers = tokens.headers("operator")
        guarded.rest("PATCH", f"/v1/models/{model_name}/param-groups/0", json={"lr": 0.5}, headers=headers)
        guarded.rest("POST", f"/v1/models/{model_name}/snapshots", headers=headers)
        events = guarded.rest("GET", f"/v1/models/{model_name}/events", headers=headers).json()["events"]
    actors = {event["kind"]: event["actor"] for event in events if event["by"] != "server"}
    assert actors == {
        "created": "worker:w0",
        "param_group_changed": "operator:operator",
        "snapshot_taken": "operator:operator",
    }


def test_who_comes_again_and_again_without_a_token_is_told_to_stop(
    guarded: RunningServer, tokens: TokenFile
) -> None:
    """At either door; and who has a right token is let in from the same address all the while."""
    transport = httpx.HTTPTransport(local_address="127.0.3.1")
    with httpx.Client(transport=transport, base_url=f"http://{guarded.http}", trust_env=False) as client:
        answers = [client.get("/v1") for _ in range(2 * FREE_ATTEMPTS)]
    assert {answer.status_code for answer in answers} == {401, 429}
    last = next(answer for answer in answers if answer.status_code == 429)
    assert (last.json()["code"], last.headers["connection"]) == ("too_many_attempts", "close")
    assert int(last.headers["retry-after"]) >= 1
    headers = tokens.headers("viewer")
    assert guarded.rest("GET", "/v1/models", headers=headers, local_address="127.0.3.1").status_code == 200
    kinds = set()
    with grpc.insecure_channel(guarded.grpc) as channel:
        describe = channel.unary_unary("/pushstep.v1.TrainingService/Describe")
        for call_under_way in [describe.future(b"", timeout=60) for _ in range(2 * FREE_ATTEMPTS)]:
            error = call_under_way.exception()
            assert isinstance(error, grpc.RpcError)
            kinds.add(type(from_rpc_error(error)))
    assert TooManyAttempts in kinds
    assert refusal(guarded.grpc, "/pushstep.v1.TrainingService/Describe", tokens, "viewer") is None


def test_no_token_is_in_the_log_an_answer_or_the_list_of_processes(
    guarded: RunningServer, tokens: TokenFile
) -> None:
    """After everything that the tests above have sent, with the log at debug."""
    places = [guarded.log.read_text(), Path(f"/proc/{guarded.process.pid}/cmdline").read_text()]
    paths = ("/openapi.json", f"/v1/models/{MODEL}/events", "/v1/capacity", "/v1/models")
    places += [guarded.rest("GET", path, headers=tokens.headers("operator")).text for path in paths]
    session = guarded.connect(MODEL, token=tokens.tokens["worker"])
    places += [repr(session), repr(vars(session._transport))]
    for token in tokens.tokens.values():
        assert not any(token in place for place in places)
