"""How long a session waits: for one attempt, between two, and for all of them."""

from __future__ import annotations

import time

import grpc
import pytest

from pushstep.client import connect
from pushstep.client.transport.retry import Retry
from pushstep.client.transport.waiting import Wait
from pushstep.proto.errors import Draining, NoAnswer
from tests.support.servers.harness import RunningServer
from tests.support.servers.proxy import Proxy
from tests.support.workers.counting import counts, create, grads


def test_one_attempt_is_bounded_too(server: RunningServer, model_name: str) -> None:
    """A server that takes the bytes and never answers."""
    with Proxy(server.grpc) as proxy:
        session = connect(
            proxy.address, shared_memory=False, model=model_name, worker="w0", timeout_s=0.4, retry_for_s=1.0
        )
        create(session)
        proxy.hold("down")
        started_s = time.monotonic()
        with pytest.raises(NoAnswer, match=r"nothing moved for 0\.4 s"):
            session.push(grads(0))
        assert 0.4 < time.monotonic() - started_s < 5.0
        proxy.release()
        session.member()
        assert session.last_receipt is not None and session.last_receipt.version == 1
        assert session.push(grads(1)).version == 2
        assert counts(session, 2) == [1, 1]
        session.close()


# --- the loop itself


class Unanswered(grpc.RpcError):
    """What grpc raises when nobody answers."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "gone"

    def trailing_metadata(self) -> tuple[()]:
        return ()


def test_waits_grow_and_a_named_error_keeps_its_name() -> None:
    times_s: list[float] = []

    def attempt() -> None:
        times_s.append(time.monotonic())
        raise Unanswered

    with pytest.raises(NoAnswer, match="UNAVAILABLE: gone"):
        Retry(Wait("here"), 1.0).run(attempt)
    assert 3 <= len(times_s) <= 9
    assert times_s[-1] - times_s[0] >= 0.99, "the time that there is, is used"

    def draining() -> None:
        raise Draining

    with pytest.raises(Draining):
        Retry(Wait("here"), 0.1).run(draining)
    with pytest.raises(ZeroDivisionError):
        Retry(Wait("here"), 10.0).run(lambda: 1 // 0)
