"""The first contact with a server: is something listening, is it a pushstep server, and its description."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar, cast

import grpc

from pushstep.proto.errors import InvalidAddress, MalformedFrame, NoAnswer, ServerUnavailable, TlsFailed
from pushstep.proto.training_pb2 import DescribeResponse

from .address import Address
from .channel import Transport
from .retry import Retry, TransportFailure, answered
from .security import Security
from .shield import shield

T = TypeVar("T", bound=Transport)
# Interval of attempts to reach a server that is starting.
_LOOK_S: Final = 0.2
# To gRPC a server that refuses a certificate is one that is about to answer: so long, then it is looked at.
_FIRST_S: Final = 2.0


def dial(
    make: Callable[[str, float, Security], T],
    address: str,
    timeout_s: float,
    wait_s: float = 0.0,
    security: Security | None = None,
) -> tuple[T, DescribeResponse]:
    """A channel to the server at an address, and the server's description.

    `wait_s`: how long to wait until something listens there. A listener then has `timeout_s` to answer, however often
    connections break. ServerUnavailable if nothing listens or answers; InvalidAddress if the address is malformed or
    the listener is not a pushstep server; TlsFailed. `security` None: as the environment says.
    """
    checked = Address(address)
    security = security or Security(address)
    transport = make(address, timeout_s, security)
    try:
        with transport.wait:
            _wait_for_listener(checked, transport, wait_s)
            return transport, _described(checked, transport, security)
    except BaseException:
        transport.close()
        raise


def _wait_for_listener(address: Address, transport: Transport, wait_s: float) -> None:
    begun_s = time.monotonic()
    while (problem := address.why_nobody_listens()) is not None:
        if time.monotonic() >= begun_s + wait_s:
            raise ServerUnavailable(address=address.text, seconds=wait_s, problem=problem)
        transport.wait.told(problem)
        shield.pause(_LOOK_S)


def _described(address: Address, transport: Transport, security: Security) -> DescribeResponse:
    until_s = time.monotonic() + transport.timeout_s

    def describe(*, first: bool) -> DescribeResponse:
        # first without waiting: a broken connection is a reason to look at what listens there
        left_s = max(until_s - time.monotonic(), 0.0)
        if first and security.is_tls:
            left_s = min(left_s, _FIRST_S)
        return transport.describe(left_s, wait_for_ready=not first)

    try:
        try:
            return answered(lambda: describe(first=True))
        except TransportFailure:
            left_s = until_s - time.monotonic()
            context = security.context() if security.is_tls else None
            insecure = address.why_not_secure(context) if left_s > 0 else None
            what = address.what_speaks_http(context) if left_s > 0 and insecure is None else None
        if insecure is not None:
            raise TlsFailed(address=address.text, problem=insecure)
        if what is not None:
            raise InvalidAddress(address=address.text, problem=what)
        return Retry(transport.wait, left_s).run(lambda: describe(first=False))
    except MalformedFrame as error:
        problem = "it is a gRPC server, and not one of pushstep"
        raise InvalidAddress(address=address.text, problem=problem) from error
    except (NoAnswer, grpc.RpcError) as error:
        # what answers there may not be a pushstep server at all
        why = error.__cause__ if isinstance(error, NoAnswer) else cast(grpc.Call, error).details()
        raise ServerUnavailable(address=address.text, seconds=transport.timeout_s, problem=why) from error
