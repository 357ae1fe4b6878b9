"""gRPC by itself: streams of as many bytes, in messages and with options like ours, that are dropped when they arrive.

What it takes is a bound for whoever speaks gRPC from Python: nothing is encoded, checked, copied or stepped.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import grpc

from pushstep.client.transport.channel import OPTIONS
from pushstep.proto.wire.frames import CHUNK_BYTES
from pushstep.server.service import GRPC_OPTIONS

from .driver import Driver, End, end_all
from .side import Side, side_of

SERVICE = "bare.Stream"
WANTED = "wanted-bytes"


def _messages(total_bytes: int) -> list[bytes]:
    whole, rest = divmod(total_bytes, CHUNK_BYTES)
    return [bytes(CHUNK_BYTES)] * whole + ([bytes(rest)] if rest or not whole else [])


async def _move(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    """Read all, then send as much as the call's metadata says."""
    async for _ in messages:
        pass
    wanted = dict(context.invocation_metadata() or ())[WANTED]
    for message in _messages(int(wanted)):
        yield message


def _listen(folder: str) -> End:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def start() -> grpc.aio.Server:
        server = grpc.aio.server(options=GRPC_OPTIONS)
        handler = grpc.method_handlers_generic_handler(
            SERVICE, {"Move": grpc.stream_stream_rpc_method_handler(_move)}
        )
        server.add_generic_rpc_handlers((handler,))
        Path(folder, "port").write_text(str(server.add_insecure_port("127.0.0.1:0")))
        await server.start()
        return server

    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    return lambda: asyncio.run_coroutine_threadsafe(server.stop(None), loop).result()


class GrpcWorker:
    """One channel."""

    def __init__(self, folder: str, payload_bytes: int) -> None:
        self._channel = grpc.insecure_channel(
            f"127.0.0.1:{Path(folder, 'port').read_text()}", options=OPTIONS
        )
        self._bytes = payload_bytes
        self._out = _messages(payload_bytes)
        self._nothing = [b""]

    def _move(self, out: list[bytes], back_bytes: int) -> None:
        # as the client does: what fits into one message is no stream
        stream = len(out) > 1
        make = self._channel.stream_stream if stream else self._channel.unary_stream
        call = make(f"/{SERVICE}/Move")
        answer: Iterator[bytes] = call(iter(out) if stream else out[0], metadata=((WANTED, str(back_bytes)),))
        for _ in answer:
            pass

    def exchange(self) -> None:
        """Send all, get as much back."""
        self._move(self._out, self._bytes)

    def push(self) -> None:
        """Send all, get one byte."""
        self._move(self._out, 1)

    def pull(self) -> None:
        """Ask, and get all."""
        self._move(self._nothing, self._bytes)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()


def _workers(folder: str, payload_bytes: int) -> Sequence[GrpcWorker]:
    return [GrpcWorker(folder, payload_bytes)]


class Grpc:
    """Owns a process that serves and one that calls."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._server = Driver(_listen, self._folder.name)
        self._driver = Driver()
        self._server.answer()
        self._driver.answer()

    def side(self, payload_bytes: int) -> Side:
        """One worker that moves so many bytes each way."""
        return side_of(
            "gRPC tcp",
            _workers,
            [self._driver],
            [(self._folder.name, payload_bytes)],
            servers=[self._server.pid],
        )

    def close(self) -> None:
        """End the processes."""
        end_all([self._driver, self._server])
        self._folder.cleanup()
