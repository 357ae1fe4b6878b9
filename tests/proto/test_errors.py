"""The error catalogue: complete, told apart by code alone, and the same on both sides of a call and of a request."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import pickle
import string
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from pushstep.proto import errors
from pushstep.proto.errors import (
    CATALOGUE,
    Broken,
    InternalError,
    InvalidRequest,
    MessageTooLarge,
    Misuse,
    NotFound,
    PushstepError,
    Refused,
    Unavailable,
)
from pushstep.proto.errors.status import (
    TRAILER,
    from_problem,
    from_rpc_error,
    named,
    to_problem,
    to_trailer,
)

KINDS = sorted(CATALOGUE.values(), key=lambda kind: kind.code)
CROSSING = [kind for kind in KINDS if not issubclass(kind, Misuse)]
FAMILIES = (InvalidRequest, NotFound, Refused, Unavailable, Broken, Misuse)
BRANCHES = {PushstepError, *FAMILIES}
LOG = logging.getLogger("test")
# what fields may hold: names that would break a template, and words that no header takes as they are
AWKWARD = "{x} %s 'ä\n\u2028\x00"


def code_of(kind: type[PushstepError]) -> str:
    return kind.code


def fields_of(kind: type[PushstepError]) -> dict[str, object]:
    """A value for every place of a class's template."""
    names = [name for _, name, _, _ in string.Formatter().parse(kind.template) if name is not None]
    values: dict[str, object] = dict.fromkeys(names, AWKWARD)
    if "retry_after_s" in names or issubclass(kind, Unavailable):
        values["retry_after_s"] = 0.25
    return values


def example(kind: type[PushstepError]) -> PushstepError:
    return kind(**fields_of(kind))


def assert_same(got: PushstepError | None, sent: PushstepError) -> None:
    assert got is not None
    assert type(got) is type(sent)
    assert (got.message, got.fields, str(got)) == (sent.message, sent.fields, sent.message)
    assert (got.consumed, got.retry_after_s) == (sent.consumed, sent.retry_after_s)


def every_class() -> list[type[PushstepError]]:
    found = [PushstepError]
    for kind in found:
        found.extend(kind.__subclasses__())
    return found


def test_catalogue_holds_every_class_of_the_module() -> None:
    in_module = {v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, PushstepError)}
    assert in_module == set(every_class())
    assert in_module - BRANCHES == set(CATALOGUE.values())
    assert all(not kind.code for kind in BRANCHES)


def test_codes_are_unique_and_theirs() -> None:
    codes = [kind.code for kind in every_class() if kind not in BRANCHES]
    assert len(set(codes)) == len(codes)
    assert all(CATALOGUE[code].code == code for code in codes)
    assert all(set(code) <= set(string.ascii_lowercase + "_") for code in codes)


@pytest.mark.parametrize("kind", KINDS, ids=code_of)
def test_class_is_complete(kind: type[PushstepError]) -> None:
    assert sum(issubclass(kind, family) for family in FAMILIES) == 1
    assert (kind.__doc__ or "").strip().endswith(".")
    assert isinstance(kind.grpc_status, grpc.StatusCode)
    assert kind.grpc_status is not grpc.StatusCode.OK
    if issubclass(kind, Misuse):
        assert kind.http_status == 0
    else:
        assert kind.grpc_status is not grpc.StatusCode.UNKNOWN
        assert 400 <= kind.http_status < 600
    assert issubclass(kind, Broken) == (kind.http_status in (500, 507))


@pytest.mark.parametrize("kind", KINDS, ids=code_of)
def test_message_is_formatted_from_its_fields(kind: type[PushstepError]) -> None:
    error = example(kind)
    plain = kind(**{name: "value" for name in fields_of(kind) if name != "retry_after_s"}, retry_after_s=1.5)
    assert plain.message == str(plain)
    assert plain.message
    assert "{" not in plain.message
    assert error.fields == {name: str(value) for name, value in fields_of(kind).items()}
    assert kind("in other words", x=1).message == "in other words"


@pytest.mark.parametrize("kind", KINDS, ids=code_of)
def test_pickles_and_copies(kind: type[PushstepError]) -> None:
    error = example(kind)
    error.fields["consumed"] = "True"
    assert_same(pickle.loads(pickle.dumps(error)), error)
    try:
        raise error
    except PushstepError as raised:
        assert_same(copy.copy(raised), error)
        assert copy.copy(raised).__traceback__ is None


class _Door:
    """A gRPC server whose calls fail as a test says."""

    def __init__(self) -> None:
        self.error: Exception = RuntimeError()
        self.address = ""
        self.loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._ready.wait(60)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._serve())
        self.loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = grpc.aio.server()

        async def fail(request: bytes, context: Any) -> bytes:
            known = named(self.error, LOG)
            await context.abort(known.grpc_status, known.message, ((TRAILER, to_trailer(known)),))
            return b""

        methods = {"Fail": grpc.unary_unary_rpc_method_handler(fail)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Door", methods),))
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self._ready.set()
        await self._stop.wait()
        await server.stop(None)

    def call(self, error: Exception) -> grpc.RpcError:
        """What a client's call fails with when the server's method raises `error`."""
        self.error = error
        with grpc.insecure_channel(self.address) as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/test.Door/Fail")(b"", timeout=10)
        return caught.value

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)


@pytest.fixture(scope="module")
def door() -> Iterator[_Door]:
    started = _Door()
    yield started
    started.stop()


@pytest.mark.parametrize("kind", CROSSING, ids=code_of)
def test_crosses_a_call_as_itself(kind: type[PushstepError], door: _Door) -> None:
    error = example(kind)
    error.fields["consumed"] = "True"
    failed = door.call(error)
    assert failed.code() is kind.grpc_status
    assert_same(from_rpc_error(failed), error)


@pytest.mark.parametrize("kind", CROSSING, ids=code_of)
def test_crosses_problem_json_as_itself(kind: type[PushstepError]) -> None:
    error = example(kind)
    problem = json.loads(json.dumps(to_problem(error)))
    assert problem["status"] == kind.http_status
    assert problem["code"] == kind.code
    assert problem["detail"] == error.message
    assert problem["title"]
    assert problem["type"] == f"urn:pushstep:error:{kind.code}"
    assert problem["help"] == f"docs/troubleshooting.md#{kind.code}"
    assert_same(from_problem(problem), error)


def test_a_traceback_says_where_to_read_on() -> None:
    """Notes that are added stay behind it, and the message is what it was."""
    error = errors.UnknownModel(model="m")
    error.add_note("of the third attempt")
    shown = traceback.format_exception_only(error)
    assert shown[1:] == [
        "see docs/troubleshooting.md#unknown_model, or: pushstep explain unknown_model\n",
        "of the third attempt\n",
    ]
    assert str(error) == error.message
    assert traceback.format_exception_only(errors.Broken("of no code"))[1:] == []


SECRET = "password=hunter2 /etc/shadow"


@pytest.mark.parametrize(
    "error",
    [RuntimeError(SECRET), KeyError(SECRET), OSError(5, SECRET), errors.NotAttached(problem=SECRET)],
    ids=lambda error: type(error).__name__,
)
def test_an_unknown_exception_says_nothing(
    error: Exception, door: _Door, caplog: pytest.LogCaptureFixture
) -> None:
    """Also a misuse: it is this side's own and must not reach the other."""
    with caplog.at_level(logging.ERROR, logger="test"):
        failed = door.call(error)
    got = from_rpc_error(failed)
    assert type(got) is InternalError
    (record,) = caplog.records
    assert got.fields["log_id"] in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    everything = repr((failed.details(), failed.trailing_metadata(), to_problem(got)))
    assert "hunter2" not in everything
    assert "shadow" not in everything


def test_a_call_that_fails_without_the_catalogue_has_no_error_of_it(door: _Door) -> None:
    with grpc.insecure_channel(door.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/test.Door/Nothing")(b"", timeout=10)
    assert isinstance(from_rpc_error(caught.value), InvalidRequest)
    with grpc.insecure_channel(door.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/test.Door/Fail")(bytes(5 << 20), timeout=10)
    assert isinstance(from_rpc_error(caught.value), MessageTooLarge)
    with grpc.insecure_channel("127.0.0.1:1") as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/test.Door/Fail")(b"", timeout=10)
    assert from_rpc_error(caught.value) is None


def test_a_code_of_a_newer_server_is_still_an_error() -> None:
    got = from_problem({"code": "of_the_future", "detail": "words", "fields": {"a": "b"}})
    assert isinstance(got, Broken)
    assert (got.message, got.fields) == ("words", {"a": "b"})
