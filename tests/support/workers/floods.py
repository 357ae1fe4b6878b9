"""Floods, each in a process of its own: `python -m tests.support.workers.floods KIND GRPC HTTP CA COUNT`.

The operator's and the worker's token come in the environment (OPERATOR_TOKEN, WORKER_TOKEN): whoever floods has one, so that a
flood gets as far as it can. A line says that all of it is there; it goes on until the process is ended, at nice 19.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc

MODEL: Final = "m"
CALLS_A_CONNECTION: Final = 60  # the server's limit is 64
MANY_RANGES: Final = 10_000
BLOCK_BYTES: Final = 1 << 20
RESETS_AT_ONCE: Final = 100


@dataclass(frozen=True)
class Target:
    """A server, and how to speak to it."""

    grpc: str
    http: str
    ca: bytes
    tls: ssl.SSLContext

    def connected(self, address: str, *, speaks: bool = True) -> socket.socket:
        """A connection, behind its TLS handshake if it `speaks`."""
        host, _, port = address.rpartition(":")
        plain = socket.create_connection((host, int(port)), timeout=60)
        return self.tls.wrap_socket(plain, server_hostname=host) if speaks else plain

    def request(self, method: str, path: str, *lines: str) -> bytes:
        """The head of a request of an operator's."""
        token = f"Authorization: Bearer {os.environ['OPERATOR_TOKEN']}"
        return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", token, *lines, "", ""]).encode()


def in_place() -> None:
    print("in place", flush=True)


def slow_heads(target: Target, count: int) -> None:
    """Heads of requests of which a byte comes now and then, and none ever ends."""
    begun = target.request("GET", "/v1/models")[:-2] + b"X-Slow: "
    opened: list[socket.socket] = []
    while True:
        while len(opened) < count:
            with contextlib.suppress(OSError):
                opened.append(target.connected(target.http))
                opened[-1].sendall(begun)
        in_place()
        time.sleep(0.5)
        for connection in list(opened):
            try:
                connection.sendall(b"x")
            except OSError:
                connection.close()
                opened.remove(connection)


def large_body(target: Target, count: int) -> None:
    """A file of this many MiB that is none, again and again; and as many at the route of a small body."""
    block = bytes(BLOCK_BYTES)
    while True:
        for path in ("/v1/models?name=large", f"/v1/models/{MODEL}/hooks"):
            head = target.request("POST", path, f"Content-Length: {count * BLOCK_BYTES}")
            with contextlib.suppress(OSError), target.connected(target.http) as connection:
                connection.sendall(head)
                for _ in range(count):
                    connection.sendall(block)
                connection.recv(1 << 16)
            in_place()
            time.sleep(0.5)


def ranges(target: Target, count: int) -> None:
    """This many requests for a byte each, on one connection; and as many ranges as a head takes, and more, in one."""
    while True:
        for spec in ("bytes=0-0" + ",2-2" * 3000, "bytes=0-0" + ",2-2" * MANY_RANGES):
            with contextlib.suppress(OSError), target.connected(target.http) as connection:
                connection.sendall(target.request("GET", f"/v1/models/{MODEL}/export", f"Range: {spec}"))
                connection.recv(1 << 16)
        done = 0
        while done < count:
            with contextlib.suppress(OSError), target.connected(target.http) as connection:
                while done < count:
                    asked = f"Range: bytes={done % 8}-{done % 8}"
                    connection.sendall(target.request("GET", f"/v1/models/{MODEL}/export", asked))
                    if not connection.recv(1 << 16):
                        break
                    done += 1
            in_place()
        in_place()


def idle_streams(target: Target, count: int) -> None:
    """This many calls that are open and send nothing."""
    asyncio.run(_idle_streams(target, count))


async def _idle_streams(target: Target, count: int) -> None:
    credentials = grpc.ssl_channel_credentials(root_certificates=target.ca)
    options = [("grpc.use_local_subchannel_pool", 1)]
    metadata = (("authorization", f"Bearer {os.environ['WORKER_TOKEN']}"),)
    channels: list[grpc.aio.Channel] = []
    calls: dict[int, Any] = {}

    async def open_all(number: int) -> None:
        push = channels[number // CALLS_A_CONNECTION].stream_stream("/pushstep.v1.TrainingService/Push")
        calls[number] = push(metadata=metadata)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            await calls[number].wait_for_connection()

    needed = -(-count // CALLS_A_CONNECTION)
    channels += [grpc.aio.secure_channel(target.grpc, credentials, options) for _ in range(needed)]
    await asyncio.gather(*map(open_all, range(count)))
    in_place()
    await asyncio.sleep(3600)


def idle_connections(target: Target, count: int) -> None:
    """This many connections without a request, at both ports, every second one behind its handshake."""
    opened = []
    for number in range(count):
        address = target.http if number % 4 < 2 else target.grpc
        with contextlib.suppress(OSError):
            opened.append(target.connected(address, speaks=number % 2 == 0))
    in_place()
    while True:
        time.sleep(60)


def resets(target: Target, count: int) -> None:
    """Calls of HTTP/2 that are reset as soon as they are begun, this many and then more, on one connection."""
    tls = ssl.create_default_context(cadata=target.ca.decode())
    tls.set_alpn_protocols(["h2"])
    host, _, port = target.grpc.rpartition(":")
    done = 0
    while True:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((host, int(port)), timeout=60) as plain,
            tls.wrap_socket(plain, server_hostname=host) as connection,
        ):
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0))
            # half of the numbers that a connection has for its streams
            for first in range(1, 1 << 30, 2 * RESETS_AT_ONCE):
                streams = range(first, first + 2 * RESETS_AT_ONCE, 2)
                pairs = [_frame(1, 4, each, _CALL) + _frame(3, 0, each, _CANCEL) for each in streams]
                connection.sendall(b"".join(pairs))
                connection.settimeout(0.0)
                with contextlib.suppress(ssl.SSLWantReadError):
                    while connection.recv(1 << 16):
                        pass
                connection.settimeout(60)
                if done < count <= done + RESETS_AT_ONCE:
                    in_place()
                done += RESETS_AT_ONCE


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _text(value: str) -> bytes:
    """A text of HPACK, plain, of less than 127 bytes."""
    return bytes([len(value)]) + value.encode()


# POST, https; a path, an authority, and further fields, none of them kept in the table
_CALL: Final = (
    b"\x83\x87\x04" + _text("/pushstep.v1.TrainingService/Push") + b"\x01" + _text("127.0.0.1")
    + b"\x0f\x10" + _text("application/grpc") + b"\x00" + _text("te") + _text("trailers")
    + b"\x0f\x08" + _text(f"Bearer {os.environ.get('WORKER_TOKEN', '')}")
)  # fmt: skip
_CANCEL: Final = (8).to_bytes(4, "big")


FLOODS: Final[dict[str, Callable[[Target, int], None]]] = {
    "slow-heads": slow_heads,
    "large-body": large_body,
    "ranges": ranges,
    "idle-streams": idle_streams,
    "idle-connections": idle_connections,
    "resets": resets,
}


def main(kind: str, grpc_address: str, http_address: str, ca: str, count: str) -> None:
    """Flood a server."""
    os.nice(19)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with open(ca, "rb") as file:
        content = file.read()
    tls = ssl.create_default_context(cafile=ca)
    FLOODS[kind](Target(grpc_address, http_address, content, tls), int(count))


if __name__ == "__main__":
    main(*sys.argv[1:])
