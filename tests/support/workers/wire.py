"""A worker that controls every byte that it sends, and what a test needs to see that nothing came of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Event
from typing import Any, cast

import grpc
import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from pushstep.client import Session
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import PushstepError
from pushstep.proto.errors.status import from_rpc_error, from_status
from pushstep.proto.shared_memory.local_socket import HEAD_BYTES, Status, status_of
from pushstep.proto.types_pb2 import Identity, Segment
from pushstep.proto.wire.frames import BodyDigest, Piece, pack
from pushstep.proto.wire.layout import ID_BYTES, Layout, Slot
from tests.support.servers.harness import RunningServer

SERVICE = "/pushstep.v1.TrainingService/"
BULK_IN = ("Push", "Exchange", "TakeSteps", "Upload")
UNARY = ("Describe", "Join", "Heartbeat", "Leave")
STREAMED_OUT = ("Pull", "PullRows", "PullState", "PullExtras")
# Two rules, two groups, four parameters; the table takes row-sparse gradients, the scalar has no rows.
PARAMETERS = {
    "table": np.arange(15, dtype=np.float32).reshape(5, 3),
    "weight": np.linspace(-1, 1, 8, dtype=np.float32).reshape(4, 2),
    "bias": np.zeros(4, dtype=np.float32),
    "scale": np.ones((), dtype=np.float32),
}
GROUPS = [
    {"rule": "adagrad", "params": ["table"], "lr": 0.1},
    {"rule": "adadelta", "params": ["weight", "bias", "scale"], "lr": 1.0},
]


class NotRefused(AssertionError):
    """A call that was answered."""


class Unnamed(AssertionError):
    """A call that failed, but not with an error of the catalogue."""


class Wire:
    """A gRPC channel on which messages are bytes, with a connection of its own: the server may end another's."""

    def __init__(self, address: str, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        self._metadata = metadata
        limit, own = ("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)
        self.channel = grpc.insecure_channel(address, options=[limit, own, ("grpc.enable_http_proxy", 0)])

    def close(self) -> None:
        self.channel.close()

    def start(self, method: str, messages: Iterable[bytes], timeout_s: float = 20.0) -> Any:
        """A bulk call under way; iterating it gives the answers."""
        return self.channel.stream_stream(SERVICE + method)(
            iter(messages), timeout=timeout_s, metadata=self._metadata
        )

    def hold(self, method: str, first: bytes) -> Callable[[], None]:
        """Begin a call that sends one message and then nothing, until what is returned is called."""
        over = Event()

        def messages() -> Iterator[bytes]:
            yield first
            over.wait()

        call = self.start(method, messages(), timeout_s=60.0)

        def end() -> None:
            call.cancel()
            over.set()

        return end

    def answers(self, method: str, messages: Iterable[bytes], timeout_s: float = 20.0) -> list[bytes]:
        """Every message that a call of any kind answers with. grpc.RpcError if it fails."""
        return list(self.start(method, messages, timeout_s))

    def refused(self, method: str, messages: Iterable[bytes]) -> PushstepError:
        """The catalogue's error with which a call is refused."""
        try:
            answers = self.answers(method, messages)
        except grpc.RpcError as error:
            return named(error)
        raise NotRefused(f"{method} was not refused: {answers!r}")


def named(error: grpc.RpcError) -> PushstepError:
    """The catalogue's error inside a failed call, whose status is the error's own."""
    known = from_rpc_error(error)
    if known is None:
        raise Unnamed(f"no error of the catalogue: {error}") from error
    call = cast(grpc.Call, error)
    if known.fields and call.code() is not known.grpc_status:
        raise Unnamed(f"{known.code} came with status {call.code()}") from error
    return known


class RawWorker:
    """A worker of one model, joined by hand; its pushes are what the test makes of them."""

    def __init__(self, wire: Wire, model: str, worker: str = "raw", *, takeover: bool = False) -> None:
        self.wire = wire
        self.model = model
        request = pb.JoinRequest(model=model, worker=worker, takeover=takeover)
        (answer,) = wire.answers("Join", [request.SerializeToString()])
        self.member = pb.JoinResponse.FromString(answer).member
        self.layout = Layout(self.member.manifest)

    def identity(self, step: int = 1, **changes: Any) -> Identity:
        """The identity of the push `step` after the last one consumed, or one changed in some field."""
        identity = Identity()
        identity.CopyFrom(self.member.identity)
        identity.sequence += step
        for name, value in changes.items():
            setattr(identity, name, value)
        return identity

    def slot(self, name: str) -> Slot:
        return self.layout.slot(name, self.model)

    def dense(self, *names: str) -> Segment:
        """The segment that covers neighbouring parameters."""
        ((segment, _),) = self.layout.dense_segments([self.slot(name) for name in names])
        return segment

    def rows(self, name: str, count: int) -> Segment:
        segment = self.dense(name)
        segment.rows = count
        return segment

    def header(self, segments: Sequence[Segment], **changes: Any) -> pb.PushHeader:
        fields: dict[str, Any] = {
            "model": self.model,
            "identity": self.identity(),
            "base_version": self.member.version,
            "manifest_hash": self.member.manifest_hash,
            "segments": segments,
        }
        return pb.PushHeader(**{**fields, **changes})

    def whole(
        self, header: pb.PushHeader, values: Sequence[Sequence[Tensor]], digest: int | None = None
    ) -> list[bytes]:
        """A well-formed push: per segment the tensors that it carries. `digest` None: the right one."""
        taken = BodyDigest(header.segments)
        frames = list(pack([[Piece(v, v.dtype) for v in pieces] for pieces in values], taken))
        commit = pb.PushCommit(digest=taken.value if digest is None else digest)
        return [
            pb.PushRequest(header=header).SerializeToString(),
            *frames,
            pb.PushRequest(commit=commit).SerializeToString(),
        ]

    def good(self, fill: float = 1.0, name: str = "bias", **changes: Any) -> list[bytes]:
        """A push that works, of one dense gradient."""
        slot = self.slot(name)
        header = self.header([self.dense(name)], **changes)
        return self.whole(header, [[torch.full(slot.shape, fill, dtype=slot.dtype)]])

    def push(self, messages: Iterable[bytes]) -> pb.PushResponse:
        (answer,) = self.wire.answers("Push", messages)
        return pb.PushResponse.FromString(answer)

    def advance(self, consumed: int = 1) -> None:
        """Note that pushes were consumed."""
        self.member.identity.sequence += consumed


class RawLocalSocket:
    """A raw worker's region, and the connection over which it is called."""

    def __init__(self, raw: RawWorker) -> None:
        request = pb.OpenRegionRequest(
            model=raw.model, identity=raw.member.identity, manifest_hash=raw.member.manifest_hash
        )
        (answer,) = raw.wire.answers("OpenRegion", [request.SerializeToString()])
        opened = pb.OpenRegionResponse.FromString(answer)
        self.region = opened.region
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(opened.path)
        self._socket.sendall(opened.token)
        _, descriptors, _, _ = socket.recv_fds(self._socket, 1, 2)
        for descriptor in descriptors:
            os.close(descriptor)

    def call(self, method: int, message: bytes) -> tuple[Status, bytes]:
        """How a call ended, and what it was answered with."""
        self._socket.sendall(struct.pack("<BI", method, len(message)) + message)
        return self._answer()

    def send_head(self, method: int, length: int) -> tuple[Status, bytes]:
        """What a head by itself is answered with."""
        self._socket.sendall(struct.pack("<BI", method, length))
        return self._answer()

    def is_closed(self) -> bool:
        """Whether the server has nothing more to say."""
        return self._socket.recv(1) == b""

    def _answer(self) -> tuple[Status, bytes]:
        status, length = status_of(self._read(HEAD_BYTES))
        return status, self._read(length)

    def refused(self, method: int, message: bytes) -> PushstepError:
        """The catalogue's error with which a call is refused."""
        status, answer = self.call(method, message)
        if status is not Status.REFUSED:
            raise NotRefused(f"method {method} was not refused: {answer!r}")
        return from_status(answer)

    def _read(self, size: int) -> bytes:
        parts = b""
        while len(parts) < size:
            part = self._socket.recv(size - len(parts))
            if not part:
                raise ConnectionResetError("the server closed the line")
            parts += part
        return parts

    def close(self) -> None:
        self._socket.close()


def row_bytes(ids: Sequence[int], slot: Slot) -> int:
    """Payload bytes of a row-sparse segment of float32 rows."""
    return len(ids) * (ID_BYTES + slot.row_elements * 4)


def created(server: RunningServer, model: str, worker: str = "owner") -> Session:
    """A model of PARAMETERS, stepped once so that its state is not all zeros."""
    session = server.connect(model, worker)
    session.create(PARAMETERS, GROUPS)
    session.push({name: np.full(value.shape, 0.5, np.float32) for name, value in PARAMETERS.items()})
    return session


def state_of(server: RunningServer, model: str) -> dict[str, Any]:
    """Everything that a model is: versions, every byte of its parameters, state, steps, and its settings."""
    host, _, port = server.http.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)

    def get(path: str) -> bytes:
        connection.request("GET", f"/v1/models/{model}{path}", headers=server.headers)
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body
        return body

    with contextlib.closing(connection):
        shown = json.loads(get(""))
        export, groups, hooks = get("/export"), json.loads(get("/param-groups")), json.loads(get("/hooks"))
    wire = Wire(server.grpc, server.metadata)
    with contextlib.closing(wire):
        first, *frames = wire.answers("PullState", [pb.PullStateRequest(model=model).SerializeToString()])
    header = pb.PullResponse.FromString(first).header
    return {
        **{key: shown[key] for key in ("uid", "version", "timeline", "edit")},
        "export": {name: tensor.numpy().tobytes() for name, tensor in load(export).items()},
        "steps": list(header.steps),
        "body": b"".join(frames),
        "groups": groups,
        "hooks": hooks,
    }


@contextlib.contextmanager
def untouched(server: RunningServer, model: str) -> Iterator[None]:
    """Hold that a block leaves a model exactly as it was."""
    before = state_of(server, model)
    yield
    after = state_of(server, model)
    changed = [key for key in before if before[key] != after[key]]
    assert not changed, {key: (before[key], after[key]) for key in changed}
