"""gRPC by itself: streams of as many bytes, in messages and with options like ours, that are dropped when they arrive.

What it takes is a bound for whoever speaks gRPC from Python: nothing is encoded, checked, copied or stepped. Each exchange is
a call of its own, or one message each way of a call that stays open.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import grpc

from pushstep.client.transport.channel import OPTIONS
from pushstep.proto.wire.frames import CHUNK_BYTES
from pushstep.server.service import GRPC_OPTIONS

from .driver import Driver, End, end_all
from .side import Side, side_of

SERVICE = "bare.Stream"
WANTED = "wanted-bytes"
# what answers a push: about as much as a receipt
ANSWER_BYTES = 300
Way = Literal["calls", "open call"]


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


async def _keep(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    """Answer each message with as much as the call's metadata says."""
    answer = bytes(int(dict(context.invocation_metadata() or ())[WANTED]))
    async for _ in messages:
        yield answer


def _listen(folder: str) -> End:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def start() -> grpc.aio.Server:
        server = grpc.aio.server(options=GRPC_OPTIONS)
        methods = {
            name: grpc.stream_stream_rpc_method_handler(method)
            for name, method in (("Move", _move), ("Keep", _keep))
        }
        handler = grpc.method_handlers_generic_handler(SERVICE, methods)
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
        """Send all, get a little."""
        self._move(self._out, ANSWER_BYTES)

    def push_and_pull(self) -> None:
        """One after the other."""
        self.push()
        self.pull()

    def pull(self) -> None:
        """Ask, and get all."""
        self._move(self._nothing, self._bytes)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()


class OpenCallWorker(GrpcWorker):
    """One channel, and on it a call for each task that stays open. Only what fits into one message."""

    def __init__(self, folder: str, payload_bytes: int) -> None:
        super().__init__(folder, payload_bytes)
        self._open: dict[int, tuple[SimpleQueue[bytes | None], Any]] = {}

    def _move(self, out: list[bytes], back_bytes: int) -> None:
        if back_bytes not in self._open:
            requests: SimpleQueue[bytes | None] = SimpleQueue()
            call = self._channel.stream_stream(f"/{SERVICE}/Keep")
            answers = call(iter(requests.get, None), metadata=((WANTED, str(back_bytes)),))
            self._open[back_bytes] = requests, answers
        requests, answers = self._open[back_bytes]
        requests.put(out[0])
        next(answers)

    def close(self) -> None:
        """Hang up."""
        for requests, _ in self._open.values():
            requests.put(None)
        super().close()


KINDS: dict[Way, type[GrpcWorker]] = {"calls": GrpcWorker, "open call": OpenCallWorker}


def _workers(folder: str, payload_bytes: int, way: Way, count: int) -> Sequence[GrpcWorker]:
    return [KINDS[way](folder, payload_bytes) for _ in range(count)]


class Grpc:
    """Owns a process that serves and one or two that call."""

    def __init__(self, drivers: int = 1) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._server = Driver(_listen, self._folder.name)
        self._drivers = [Driver() for _ in range(drivers)]
        for driver in (self._server, *self._drivers):
            driver.answer()

    def side(self, payload_bytes: int, way: Way = "calls", workers: int = 1) -> Side:
        """Workers spread over the processes that move so many bytes each way."""
        drivers = self._drivers[:workers]
        share = -(-workers // len(drivers))
        return side_of(
            "gRPC tcp" if way == "calls" else f"gRPC tcp, {way}",
            _workers,
            drivers,
            [(self._folder.name, payload_bytes, way, share)] * len(drivers),
            servers=[self._server.pid],
        )

    def close(self) -> None:
        """End the processes."""
        end_all([*self._drivers, self._server])
        self._folder.cleanup()
