"""The worker's end of a local socket, against a server that answers in every way that a socket allows."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pushstep.client.shared_memory.local_socket import SPIN_S, LocalSocket
from pushstep.client.transport.retry import TransportFailure
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import LeaseExpired, PushstepError
from pushstep.proto.errors.status import to_trailer
from pushstep.proto.shared_memory.local_socket import HEAD_BYTES, Method, Status, framed, method_of
from pushstep.proto.types_pb2 import Receipt

ANSWER = framed(Status.ANSWERED, pb.PushResponse(receipt=Receipt(version=7)).SerializeToString())
REFUSAL = framed(Status.REFUSED, to_trailer(LeaseExpired(worker="w0", seconds=1.0)))
Serve = Callable[[socket.socket], None]


def _asked(server: socket.socket) -> pb.PushRequest:
    head = server.recv(HEAD_BYTES, socket.MSG_WAITALL)
    method, length = method_of(head)
    assert method is Method.PUSH
    return pb.PushRequest.FromString(server.recv(length, socket.MSG_WAITALL))


def _whole(server: socket.socket) -> None:
    _asked(server)
    server.sendall(ANSWER)


def _in_pieces(server: socket.socket) -> None:
    _asked(server)
    for start in range(len(ANSWER)):
        server.sendall(ANSWER[start : start + 1])


def _late(server: socket.socket) -> None:
    _asked(server)
    time.sleep(20 * SPIN_S + 0.02)  # far beyond what it is watched for
    server.sendall(ANSWER)


def _refusing(server: socket.socket) -> None:
    _asked(server)
    server.sendall(REFUSAL)


def _gone(server: socket.socket) -> None:
    _asked(server)
    server.shutdown(socket.SHUT_RDWR)


def _cut_off(server: socket.socket) -> None:
    _asked(server)
    server.sendall(ANSWER[:-1])
    server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def ends() -> Iterator[tuple[LocalSocket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield LocalSocket(ours, timeout_s=60.0), theirs


def _push(
    local_socket: LocalSocket, server: socket.socket, serve: Serve, state: bytes = b""
) -> pb.PushResponse:
    serving = threading.Thread(target=serve, args=(server,))
    serving.start()
    try:
        return local_socket.push(pb.PushHeader(model="m"), pb.PushCommit(worker_state=state))
    finally:
        serving.join()


@pytest.mark.parametrize("serve", [_whole, _in_pieces, _late])
@pytest.mark.parametrize("before", [_whole, _late])
def test_an_answer_is_read_however_it_comes(
    ends: tuple[LocalSocket, socket.socket], before: Serve, serve: Serve
) -> None:
    for one in (before, serve, _whole):  # whether the last one came soon decides how the next is waited for
        assert _push(*ends, one).receipt.version == 7


@pytest.mark.parametrize(
    ("serve", "expected"),
    [
        (_refusing, LeaseExpired),
        (_gone, TransportFailure),
        (_cut_off, TransportFailure),
    ],
)
def test_a_call_that_fails_says_how(
    ends: tuple[LocalSocket, socket.socket], serve: Serve, expected: type[PushstepError | TransportFailure]
) -> None:
    _push(*ends, _whole)
    with pytest.raises(expected):
        _push(*ends, serve)


def test_a_server_that_says_nothing_is_not_waited_for(ends: tuple[LocalSocket, socket.socket]) -> None:
    with pytest.raises(TransportFailure):
        LocalSocket(ends[1], timeout_s=0.05).push(pb.PushHeader(), pb.PushCommit())


def test_a_request_goes_out_whole_though_the_socket_holds_less(
    ends: tuple[LocalSocket, socket.socket],
) -> None:
    state = bytes(range(256)) * 4000
    seen: list[pb.PushRequest] = []

    def serve(server: socket.socket) -> None:
        seen.append(_asked(server))
        server.sendall(ANSWER)

    _push(*ends, serve, state)
    assert seen[0].commit.worker_state == state
