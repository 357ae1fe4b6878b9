"""A worker that means harm, in a process of its own: `hostile.py ADDRESS MODEL [CONNECTIONS]`.

Joins as `hostile` and pushes one of every kind of rubbish; what each was refused with is its first line on stdout, as JSON.
Then it pushes NaN until it is quarantined, says so, and from then on, at nice 19, sends headers of further pushes as fast as the
server takes them, on one or more connections that it opens anew whenever they are closed. It speaks HTTP/2 by itself:
frames made ahead cost it next to nothing, so that the server has the work.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import selectors
import socket
import struct
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from pushstep.proto import training_pb2 as pb
from pushstep.proto.types_pb2 import Segment
from tests.support.workers.wire import SERVICE, RawWorker, Wire

NAME = "hostile"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, DATA, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 1, 0, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
# Streams that a connection opens before it looks whether the server has answered, and at most without an answer.
BURST, UNANSWERED = 20, 100
LAST_STREAM = 1 << 30


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One HTTP/2 frame."""
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def header_block(authority: str, method: str, metadata: Iterable[tuple[str, str]] = ()) -> bytes:
    """The headers of a gRPC call, without compression. Each text is shorter than 127 bytes."""

    def text(value: str) -> bytes:
        return bytes([len(value)]) + value.encode()

    path = b"\x04" + text(SERVICE + method)
    kind = b"\x0f\x10" + text("application/grpc")
    more = b"".join(b"\x00" + text(key) + text(value) for key, value in (("te", "trailers"), *metadata))
    return b"\x83\x86" + path + b"\x01" + text(authority) + kind + more


class Connection:
    """One HTTP/2 connection that opens streams and hears what becomes of them."""

    def __init__(self, address: str, message: bytes) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=5)
        self.socket.sendall(PREFACE + frame(SETTINGS, 0, 0))
        self.socket.setblocking(False)
        self._block = header_block(address, "Push")
        self._data = b"\x00" + struct.pack(">I", len(message)) + message
        self._next = 1
        self.unanswered = 0
        self.answered = 0
        self._held = b""
        self.due = b""

    def open(self, streams: int) -> None:
        """Open further streams, and send what of them goes out at once."""
        for _ in range(streams):
            self.due += frame(HEADERS, END_HEADERS, self._next, self._block)
            self.due += frame(DATA, END_STREAM, self._next, self._data)
            self._next += 2
        self.unanswered += streams
        self.send()

    def send(self) -> None:
        """Send what is due and goes out at once."""
        with contextlib.suppress(BlockingIOError):
            while self.due:
                self.due = self.due[self.socket.send(self.due) :]

    def hear(self) -> None:
        """Read what has come. ConnectionError when the server has closed it."""
        with contextlib.suppress(BlockingIOError):
            more = self.socket.recv(1 << 20)
            if not more or self._next > LAST_STREAM:
                raise ConnectionError
            self._held += more
        at = 0
        while len(self._held) >= at + 9:
            size = int.from_bytes(self._held[at : at + 3], "big")
            if len(self._held) < at + 9 + size:
                break
            kind, flags = self._held[at + 3], self._held[at + 4]
            if kind == SETTINGS and not flags & ACK:
                self.due += frame(SETTINGS, ACK, 0)
            elif kind == PING and not flags & ACK:
                self.due += frame(PING, ACK, 0, self._held[at + 9 : at + 9 + size])
            elif kind == GOAWAY:
                raise ConnectionError
            elif kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM):
                self.unanswered -= 1
                self.answered += 1
            at += 9 + size
        self._held = self._held[at:]

    def close(self) -> None:
        """End it."""
        self.socket.close()


def rubbish(raw: RawWorker) -> Iterator[tuple[str, list[bytes]]]:
    """Pushes by what is wrong with them, each made when the one before has been refused."""
    slot = raw.layout.slots[0]
    name, full = slot.name, slot.shape

    def of(value: float, **changes: Any) -> list[bytes]:
        return raw.good(value, name, **changes)

    def header(segment: Segment, **changes: Any) -> bytes:
        return pb.PushRequest(header=raw.header([segment], **changes)).SerializeToString()

    yield "garbage", [random.Random(1).randbytes(5000)]
    yield "garbage behind a header", [of(1)[0], random.Random(2).randbytes(5000)]
    yield "no commit", of(1)[:-1]
    yield "a short body", [of(1)[0], pb.PushRequest(payload=bytes(4)).SerializeToString(), of(1)[-1]]
    yield "a long body", [of(1)[0], pb.PushRequest(payload=bytes(1 << 20)).SerializeToString(), of(1)[-1]]
    yield "beyond the arena", [header(Segment(arena=0, start=0, stop=1 << 50, dtype=raw.dense(name).dtype))]
    yield "endless rows", [header(raw.rows(name, 1 << 50))]
    yield "another manifest", [header(raw.dense(name), manifest_hash=1)]
    yield "wild samples", of(1, samples=math.inf)
    yield "a version to come", of(1, base_version=1 << 40)
    yield "NaN", of(math.nan)
    yield "infinity", of(-math.inf)
    yield "a huge norm", of(1e18)
    yield "another digest", raw.whole(raw.header([raw.dense(name)]), [[torch.ones(full)]], digest=12345)
    yield "a gap", of(1, identity=raw.identity(5))
    yield "an epoch to come", of(1, identity=raw.identity(epoch=99))
    yield "another timeline", of(1, identity=raw.identity(timeline=99))
    yield "another model's", of(1, identity=raw.identity(model_uid=bytes(16)))
    old = raw.identity()
    raw.member.CopyFrom(RawWorker(raw.wire, raw.model, NAME, takeover=True).member)
    yield "a stale epoch", of(1, identity=old)


def said_to(raw: RawWorker, messages: list[bytes]) -> str:
    """The code with which a push is refused; whether it was consumed is taken note of."""
    error = raw.wire.refused("Push", messages)
    if error.consumed:
        raw.advance()
    return error.code


def until_quarantined(raw: RawWorker) -> bytes:
    """Push NaN until nothing is taken any more; the header of a push like those."""
    while said_to(raw, nan := raw.good(math.nan, raw.layout.slots[0].name)) != "quarantined":
        pass
    return nan[0]


def flood(address: str, message: bytes, connections: int) -> Iterator[tuple[int, int]]:
    """Send headers for ever; now and then, how many were answered and how often a connection was closed."""
    answered = closed = 0
    opened: list[Connection] = []
    said_s = time.monotonic()
    while True:
        with contextlib.suppress(OSError):
            while len(opened) < connections:
                opened.append(Connection(address, message))
        with selectors.DefaultSelector() as ready:
            for connection in opened:
                ready.register(connection.socket, selectors.EVENT_READ)
            ready.select(0.002)
        for connection in list(opened):
            try:
                connection.hear()
                connection.send()
                if connection.unanswered < UNANSWERED:
                    connection.open(BURST)
            except OSError:
                closed += 1
                connection.close()
                opened.remove(connection)
            answered += connection.answered
            connection.answered = 0
        if time.monotonic() > said_s + 0.5:
            said_s = time.monotonic()
            yield answered, closed


def main(address: str, model: str, connections: int = 1) -> None:
    """Become quarantined, say so, and go on."""
    raw = RawWorker(Wire(address), model, NAME)
    print(json.dumps({what: said_to(raw, messages) for what, messages in rubbish(raw)}), flush=True)
    message = until_quarantined(raw)
    raw.wire.close()
    os.nice(19)
    print("quarantined", flush=True)
    for answered, closed in flood(address, message, connections):
        print(answered, closed, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
