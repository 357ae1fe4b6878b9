"""The worker's end of a region's life line: calls whose bytes lie in the region; see proto/line.py."""

from __future__ import annotations

import socket
import time

from pushstep.proto import training_pb2 as pb
from pushstep.proto.line import HEAD_BYTES, READ_BYTES, Method, Status, framed, status_of
from pushstep.proto.status import from_status

from .retry import TransportFailure


class Line:
    """One connection, one call at a time. A call that raises TransportFailure leaves it unusable."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        connection.setblocking(False)

    def is_open(self) -> bool:
        """Whether the server still holds it, as far as anybody can know."""
        try:
            return self._connection.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def push(self, header: pb.PushHeader, commit: pb.PushCommit) -> pb.PushResponse:
        """Push of what lies in the region."""
        return pb.PushResponse.FromString(self._call(Method.PUSH, header, commit))

    def exchange(self, header: pb.PushHeader, commit: pb.PushCommit) -> pb.PullHeader:
        """Exchange through the region."""
        return pb.PullResponse.FromString(self._call(Method.EXCHANGE, header, commit)).header

    def _call(self, method: Method, header: pb.PushHeader, commit: pb.PushCommit) -> bytes:
        """The answer; the catalogue's error if the server refused, TransportFailure if there was none in time."""
        request = pb.PushRequest(header=header, commit=commit).SerializeToString()
        until_s = time.monotonic() + self._timeout_s
        try:
            self._connection.settimeout(self._timeout_s)
            self._connection.sendall(framed(method, request))
            status, message = self._answer(until_s)
            self._connection.setblocking(False)
        except OSError as error:
            raise TransportFailure(
                f"the line to the server broke: {error or type(error).__name__}"
            ) from error
        if status is Status.REFUSED:
            raise from_status(message)
        return message

    def _answer(self, until_s: float) -> tuple[Status, bytes]:
        """One answer, nearly always read at once: each further read would be a turn of the other threads, too."""
        received = self._connection.recv(READ_BYTES)
        while received:
            if len(received) >= HEAD_BYTES:
                status, length = status_of(received[:HEAD_BYTES])
                if len(received) >= HEAD_BYTES + length:
                    return status, received[HEAD_BYTES : HEAD_BYTES + length]
            self._connection.settimeout(max(0.001, until_s - time.monotonic()))
            more = self._connection.recv(READ_BYTES)
            received = received + more if more else b""
        raise ConnectionResetError("the server closed it")

    def close(self) -> None:
        """Cut it."""
        self._connection.close()
