"""Tokens and the table, without a server: what is read, who is found, what is compared how, and who is let in."""

from __future__ import annotations

import asyncio
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from pushstep.proto.errors import (
    PermissionDenied,
    PushstepError,
    TokenRevoked,
    TooManyAttempts,
    Unauthenticated,
)
from pushstep.proto.shared_memory.local_socket import Method
from pushstep.server.__main__ import serve
from pushstep.server.access.attempts import FREE_ATTEMPTS, MOST_ADDRESSES, PER_S, Attempts
from pushstep.server.access.caller import CALLER, Caller, require_model
from pushstep.server.access.guard import Guard
from pushstep.server.access.request_rate import FREE, MOST_CALLERS, MOST_WAITING, RequestRate
from pushstep.server.access.request_rate import PER_S as REQUESTS_PER_S
from pushstep.server.access.roles import LET_IN, Need, Role
from pushstep.server.access.routes import RouteAccess, entry_of
from pushstep.server.access.table import LOCAL_SOCKET, ROUTES, RPCS
from pushstep.server.access.tokens import Token, Tokens, digest_of, made_token, read_tokens
from pushstep.server.config import Config
from pushstep.server.links.hub import SERVICE as SHARDS
from pushstep.server.operator_door.app import all_routes
from pushstep.server.worker_door.entrance import require_entries
from pushstep.server.worker_door.servicer import SERVICE

SECRET = made_token()
HASHED = f"sha256:{digest_of(SECRET).hex()}"


def known(role: Role, name: str = "t", models: Sequence[str] = (), token: str = SECRET) -> Token:
    return Token(name, role, tuple(models), digest_of(token))


# --- what a line says

LINES: dict[str, tuple[str, str]] = {
    "no words": ("worker", "NAME ROLE"),
    "too many words": (f"a worker {HASHED} m n", "NAME ROLE"),
    "no such role": (f"a admin {HASHED}", "no role"),
    "a role in capitals": (f"a Worker {HASHED}", "no role"),
    "a bad name": (f"../a worker {HASHED}", "no name"),
    "a short hash": ("a worker sha256:abcd", "64 hexadecimal"),
    "a hash in capitals": (f"a worker sha256:{'A' * 64}", "64 hexadecimal"),
    "another hash": (f"a worker md5:{'a' * 32}", "20 to 512"),
    "a short token": ("a worker hunter2", "20 to 512"),
    "a token of other characters": ("a worker " + "ä" * 30, "20 to 512"),
    "bad models": (f"a worker {HASHED} m/..", "fourth"),
    "empty models": (f"a worker {HASHED} m,,n", "fourth"),
    "bad workers": (f"a worker {HASHED} m worker=w/..", "list of workers"),
    "no workers": (f"a worker {HASHED} worker=", "list of workers"),
    "workers in front of models": (f"a worker {HASHED} worker=w m", "NAME ROLE"),
    "a viewer that is a worker": (f"a viewer {HASHED} worker=w0", "for the role worker"),
}


@pytest.mark.parametrize("case", LINES)
def test_a_bad_line_is_named_by_its_number_and_nothing_of_it_is_shown(case: str) -> None:
    line, words = LINES[case]
    with pytest.raises(ValueError, match=words) as caught:
        list(read_tokens(["# mine", "", line], "the file"))
    assert "the file, line 3" in str(caught.value)
    for word in line.split()[2:3]:
        assert word.removeprefix("sha256:") not in str(caught.value)


def test_a_token_and_its_hash_are_the_same_line() -> None:
    plain, hashed = read_tokens([f"a viewer {SECRET} m,n-*", f" a viewer {HASHED} m,n-* "], "x")
    assert plain == hashed == Token("a", Role.VIEWER, ("m", "n-*"), digest_of(SECRET))
    assert SECRET not in repr(plain)
    assert plain.digest.hex() not in repr(plain)


def test_settings_take_hashes_only(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(f'tokens = ["a worker {HASHED}"]\n')
    (token,) = Config.read({}, path).read_tokens() or ()
    assert token.digest == digest_of(SECRET)
    path.write_text(f'tokens = ["a worker {SECRET}"]\n')
    with pytest.raises(ValueError, match="hashes, not tokens") as caught:
        Config.read({}, path)
    assert SECRET not in str(caught.value)


def test_sources_add_up_and_one_token_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"a worker {HASHED}\n")
    monkeypatch.setenv("PUSHSTEP_TOKENS", f"b viewer {made_token()}; c operator {made_token()}")
    config = Config.read({"tokens_file": path}, None)
    assert [token.name for token in config.read_tokens() or ()] == ["b", "c", "a"]
    assert "viewer" not in repr(config)
    monkeypatch.setenv("PUSHSTEP_TOKENS", f"b viewer {SECRET}")
    with pytest.raises(ValueError, match="'b' and 'a' are the same token"):
        Config.read({"tokens_file": path}, None)


def test_an_empty_source_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("")
    tokens = Config.read({"tokens_file": tmp_path / "tokens"}, None).read_tokens()
    assert tokens == []
    assert not Guard(tokens).is_open
    assert Guard(Config.read({}, None).read_tokens()).is_open


@pytest.mark.parametrize("role", list(Role))
def test_make_token_prints_a_token_and_the_line_that_lets_it_in(
    role: Role, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = os.umask(0o077)
    try:
        assert serve(["--make-token", role.value, "--name", "n", "--models", "m,x-*"]) == 0
        printed = capsys.readouterr()
        token, line = printed.out.splitlines()
        assert token not in line + printed.err
        assert list(read_tokens([line], "x", hashed_only=True)) == [known(role, "n", ("m", "x-*"), token)]
        assert serve(["--make-token", role.value, "--name", "a b"]) == 2
        workers = ["--models", "m", "--worker", "w0,gpu-*"]
        assert serve(["--make-token", role.value, *workers]) == (0 if role is Role.WORKER else 2)
        printed = capsys.readouterr()
        assert role is not Role.WORKER or printed.out.endswith(" m worker=w0,gpu-*\n")
        assert serve(["--name", "n"]) == 2
    finally:
        os.umask(mask)


@pytest.mark.parametrize("option", ["--tokens", "--token", "--tokens=", "--token="])
def test_a_token_as_an_argument_is_refused_and_not_shown(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"{option}{SECRET}"] if option.endswith("=") else [option, SECRET]
    with pytest.raises(SystemExit) as ended:
        serve(arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert "--tokens-file" in printed.err
    assert SECRET not in printed.err + printed.out


# --- who is found


def test_a_token_is_found_by_its_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens([known(Role.WORKER)])
    found = tokens.caller(SECRET)
    assert found is not None
    assert (found.name, found.role) == ("t", Role.WORKER)
    for other in ("", SECRET[:-1], SECRET + "x", SECRET.swapcase(), HASHED, digest_of(SECRET).hex()):
        assert tokens.caller(other) is None


@pytest.mark.parametrize("token", [SECRET, "x" * 40, ""], ids=["known", "unknown", "empty"])
def test_every_look_up_compares_once_in_constant_time(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that finds nothing: the same work, whatever was sent and however many tokens there are."""
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    tokens = Tokens([known(Role.WORKER), *(known(Role.WORKER, token=made_token()) for _ in range(100))])
    monkeypatch.setattr("pushstep.server.access.tokens.hmac.compare_digest", compare)
    tokens.caller(token)
    ((ours, theirs),) = compared
    assert ours == digest_of(token)
    assert len(theirs) == 32


def test_the_index_is_keyed_anew_in_each_process() -> None:
    assert Tokens([])._place(b"x") != Tokens([])._place(b"x")


def test_replaced_tokens_keep_those_that_stay_and_name_those_that_go() -> None:
    second = made_token()
    tokens = Tokens([known(Role.WORKER), known(Role.VIEWER, "u", token=second)])
    first, other = tokens.caller(SECRET), tokens.caller(second)
    assert tokens.replace([known(Role.WORKER)]) == [other]
    assert tokens.caller(SECRET) is first
    assert tokens.replace([known(Role.OPERATOR)]) == [first]  # another role is another caller
    again = tokens.caller(SECRET)
    assert again is not None
    assert again.role is Role.OPERATOR
    with pytest.raises(ValueError, match="same token"):
        tokens.replace([known(Role.WORKER), known(Role.WORKER, "v")])
    assert tokens.caller(SECRET) is again


# --- who is let in


@pytest.mark.parametrize("need", list(Need))
@pytest.mark.parametrize("role", list(Role))
def test_the_guard_lets_in_whom_the_table_says(need: Need, role: Role) -> None:
    guard = Guard([known(role)])

    async def admit() -> Caller | None:
        return guard.admit(need, [f"Bearer {SECRET}"], "it")

    if role in LET_IN[need]:
        assert (asyncio.run(admit()) is None) == (need is Need.OPEN)
    else:
        with pytest.raises(PermissionDenied, match="it is for"):
            asyncio.run(admit())


def test_an_operator_does_all_that_a_viewer_does_and_a_worker_stands_apart() -> None:
    may = {role: {need for need in Need if role in LET_IN[need]} for role in Role}
    assert may[Role.VIEWER] < may[Role.OPERATOR]
    assert Need.WORKER not in may[Role.OPERATOR]
    assert may[Role.WORKER] == {Need.OPEN, Need.MEMBER, Need.WORKER}


FIELDS: dict[str, list[str]] = {
    "none": [],
    "empty": [""],
    "no scheme": [SECRET],
    "basic": [f"Basic {SECRET}"],
    "no token": ["Bearer "],
    "two fields": [f"Bearer {SECRET}", f"Bearer {SECRET}"],
    "two tokens": [f"Bearer {SECRET} {SECRET}"],
    "a long one": ["Bearer " + "x" * 8000],
    "letters of no token": ["Bearer \xff\x00" + SECRET],
    "unknown": [f"Bearer {SECRET[:-1]}"],
}


@pytest.mark.parametrize("case", FIELDS)
def test_without_a_right_token_nobody_is_let_in(case: str) -> None:
    guard = Guard([known(Role.OPERATOR)])
    with pytest.raises(Unauthenticated) as caught:
        guard.admit(Need.VIEWER, FIELDS[case], "it")
    assert SECRET not in caught.value.message
    assert guard.admit(Need.OPEN, FIELDS[case], "it") is None


def test_the_scheme_is_written_as_one_likes() -> None:
    async def admit(scheme: str) -> Caller | None:
        return Guard([known(Role.VIEWER)]).admit(Need.VIEWER, [f"{scheme} {SECRET}"], "it")

    assert all(asyncio.run(admit(scheme)) for scheme in ("Bearer", "bearer", "BEARER "))


def test_a_token_for_some_models_is_for_no_other() -> None:
    CALLER.set(Caller("t", Role.WORKER, ("flights", "test-*")))
    try:
        for model in ("flights", "test-", "test-1"):
            require_model(model)
        for model in ("", "flight", "flights2", "Flights", "test", "a/test-1", "test\n"):
            with pytest.raises(PermissionDenied, match="is none of them"):
                require_model(model)
    finally:
        CALLER.set(None)
    require_model("anything")


def test_a_revoked_caller_s_calls_end_and_it_begins_no_other() -> None:
    async def run() -> None:
        guard = Guard([known(Role.WORKER)])
        begun = asyncio.Event()

        async def call() -> None:
            guard.admit(Need.WORKER, [f"Bearer {SECRET}"], "it")
            begun.set()
            await asyncio.sleep(60)

        task = asyncio.create_task(call())
        await begun.wait()
        caller = guard._tokens.caller(SECRET)
        assert caller is not None
        guard.replace([])
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TokenRevoked):
            caller.require(Need.WORKER, "it")
        assert not caller._calls

    asyncio.run(run())


# --- attempts


def test_attempts_are_counted_by_address_and_forgiven_with_time() -> None:
    now = [0.0]
    attempts = Attempts(clock=lambda: now[0])
    assert [attempts.wait_s("10.0.0.1") for _ in range(FREE_ATTEMPTS)] == [0.0] * FREE_ATTEMPTS
    assert attempts.wait_s("10.0.0.1") > 0
    assert attempts.wait_s("10.0.0.2") == 0
    for _ in range(10 * FREE_ATTEMPTS):
        attempts.wait_s("10.0.0.1")  # a flood does not shut it out for longer
    now[0] += 3.0 / PER_S
    assert attempts.wait_s("10.0.0.1") == 0


def test_beyond_what_is_free_requests_are_answered_at_a_pace() -> None:
    """Each waits behind the one before, up to so many; the others have what they had; a flood does not last."""
    now = [0.0]
    rate = RequestRate(clock=lambda: now[0])
    assert [rate.wait_s("a") for _ in range(FREE)] == [0.0] * FREE
    waits = [rate.wait_s("a") for _ in range(MOST_WAITING)]
    assert waits == pytest.approx([(number + 1) / REQUESTS_PER_S for number in range(MOST_WAITING)])
    assert [rate.wait_s("a") for _ in range(1000)] == [None] * 1000
    assert rate.wait_s("b") == 0.0
    now[0] += MOST_WAITING / REQUESTS_PER_S
    assert rate.wait_s("a") == pytest.approx(1 / REQUESTS_PER_S)
    now[0] += FREE
    assert rate.wait_s("a") == 0.0
    for number in range(MOST_CALLERS + 5):
        rate.wait_s(f"caller-{number}")
    assert len(rate._taken) == MOST_CALLERS


def test_a_host_has_one_count_for_all_its_ipv6_addresses() -> None:
    attempts = Attempts(clock=lambda: 0.0)
    waits = [attempts.wait_s(f"2001:db8::{number:x}") for number in range(FREE_ATTEMPTS + 1)]
    assert waits[-1] > 0
    assert attempts.wait_s("2001:db8:0:1::1") == 0


def test_addresses_are_remembered_within_a_bound() -> None:
    attempts = Attempts(clock=lambda: 0.0)
    for number in range(MOST_ADDRESSES + 10):
        attempts.wait_s(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(attempts._counts) == MOST_ADDRESSES


def test_only_refusals_change_beyond_the_attempts() -> None:
    guard = Guard([known(Role.VIEWER)])
    error: PushstepError = Unauthenticated(problem="x")
    told = [guard.refusal(error, "10.0.0.1") for _ in range(FREE_ATTEMPTS + 1)]
    assert [type(each) for each in told] == [Unauthenticated] * FREE_ATTEMPTS + [TooManyAttempts]
    denied = PermissionDenied(problem="x", need="y")
    assert guard.refusal(denied, "10.0.0.1") is denied

    async def admit() -> Caller | None:
        return guard.admit(Need.VIEWER, [f"Bearer {SECRET}"], "it")

    assert asyncio.run(admit()) is not None


# --- the table is whole

SERVICES = (SERVICE, SHARDS, health.SERVICE_NAME, reflection.SERVICE_NAME)


def test_every_route_has_an_entry_and_every_entry_a_route() -> None:
    routes = {entry_of(method, path) for path, methods in all_routes() for method in methods}
    assert routes == set(ROUTES)


def test_every_rpc_has_an_entry_and_every_entry_an_rpc() -> None:
    pool = descriptor_pool.Default()
    found = {
        f"/{service}/{method.name}"
        for service in SERVICES
        for method in pool.FindServiceByName(service).methods
    }
    assert found <= set(RPCS)
    # the description of grpc.health.v1 is that of the installed version: List came later
    assert set(RPCS) - found <= {"/grpc.health.v1.Health/List"}


def test_every_message_of_the_local_socket_has_an_entry() -> None:
    assert set(LOCAL_SOCKET) == set(Method)


def test_what_changes_something_asks_for_an_operator() -> None:
    for entry, need in ROUTES.items():
        is_read = entry.split()[0] in ("GET", "HEAD")
        assert (need is Need.OPERATOR) != is_read, entry
    is_open = [entry for entry, need in ROUTES.items() if need is Need.OPEN]
    assert is_open == ["GET /healthz", "GET /readyz", "GET /ui", "GET /ui/{asset}"]
    assert [entry for entry, need in RPCS.items() if need is Need.OPEN] == ["/grpc.health.v1.Health/Check"]


def test_a_route_or_an_rpc_without_an_entry_is_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        RuntimeError, match=r"POST /v1/models/\{m\}/new has no entry in server/access/table.py"
    ):
        RouteAccess(Guard(None), [("/v1/models/{m}/new", ("POST",))])
    monkeypatch.setattr("pushstep.server.worker_door.entrance.RPCS", {})
    with pytest.raises(RuntimeError, match="TrainingService/Describe has no entry"):
        require_entries((SERVICE,))
