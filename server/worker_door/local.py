"""The local socket: calls of one message each by workers on this host, over the socket of their region.

A call has the same message as over gRPC, and goes through the same methods of the gRPC door. A worker that goes away
during a call cancels it, as a broken stream does. A call runs at once up to its first wait. A small call never waits,
and is answered in the turn of the event loop in which it came.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Final

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import MalformedFrame, PushstepError, Quarantined
from pushstep.proto.errors.status import named, to_trailer
from pushstep.proto.shared_memory.local_socket import (
    HEAD_BYTES,
    READ_BYTES,
    SPINS,
    Method,
    Status,
    framed,
    method_of,
)

from ..access.caller import CALLER
from ..access.table import LOCAL_SOCKET
from ..counters.server_counts import WORKERS_DOOR
from ..process.request_log import RequestLog, about
from ..streams.bulk import OneMessage
from ..traces.request_spans import trace_of
from .servicer import GrpcDoor

log = RequestLog("pushstep.line")
# If a call comes this soon after the last answer, the socket is polled for as long after the next: to wake a sleeping
# core with cold caches costs 0.1 ms of an exchange of 0.7. A worker that computes for longer between its calls is not
# polled for, and costs nothing.
SPIN_S: Final = 500e-6 if SPINS else 0.0


class LocalDoor:
    """Serves the local sockets of regions."""

    def __init__(self, door: GrpcDoor) -> None:
        self._door = door

    async def serve(self, connection: socket.socket) -> None:
        """Answer calls, one at a time, until the worker is gone or sends something that is not a call."""
        await _LocalSocket(connection, self._answer, self._door.stall_s).run()

    async def _answer(self, method: Method, message: bytes) -> bytes:
        about()  # the calls of one socket run in one context
        traceparent = ""
        try:
            if (caller := CALLER.get()) is not None:
                caller.require(LOCAL_SOCKET[method], f"{method.name} over the local socket")
            stream = OneMessage(message, pb.PushRequest, self._door.budget)
            asked = (await stream.header()).header
            # frames wait in ways that need a task; and an exchange would be stepped before its answer failed
            if not asked.region or (method is Method.EXCHANGE and not asked.pull.region):
                raise MalformedFrame(
                    problem="a call over the local socket names its region; send frames by gRPC"
                )
            traceparent = asked.traceparent
            if self._door.traces is None:
                return await self._answered(method, stream)
            with self._door.traces.span(method.name.lower(), traceparent):
                return await self._answered(method, stream)
        except Exception as error:  # noqa: BLE001 - the one place where errors become statuses
            refusal = named(error, log)
        log.debug(
            "refused: %s", refusal.message, extra={"code": refusal.code, "trace_id": trace_of(traceparent)}
        )
        self._door.counts.refused(WORKERS_DOOR, refusal.code)
        if isinstance(refusal, Quarantined):
            await self._door.throttle.hold(refusal)
        return framed(Status.REFUSED, to_trailer(refusal))

    async def _answered(self, method: Method, stream: OneMessage[pb.PushRequest]) -> bytes:
        if method is Method.PUSH:
            return framed(Status.ANSWERED, (await self._door.pushes.push(stream)).SerializeToString())
        _, header = await self._door.pushes.exchange(stream)
        return framed(Status.ANSWERED, pb.PullResponse(header=header).SerializeToString())


class _LocalSocket:
    """One connection. A callback reads it; a call that has to wait goes on in a task."""

    def __init__(
        self,
        connection: socket.socket,
        answer: Callable[[Method, bytes], Awaitable[bytes]],
        stall_s: float,
    ) -> None:
        self._connection = connection
        self._answer = answer
        self._loop = asyncio.get_running_loop()
        self._stall_s = stall_s
        self._received = b""
        # ends the connection unless the rest of a call comes, or the rest of an answer goes, in `stall_s`
        self._clock: asyncio.TimerHandle | None = None
        self._calling: asyncio.Task[None] | None = None
        self._answered_s = 0.0
        self._comes_soon = False
        self._ended: asyncio.Future[None] = self._loop.create_future()

    async def run(self) -> None:
        """Serve until the worker is gone, or has sent something that is not a call."""
        self._loop.add_reader(self._connection, self._readable)
        try:
            await self._ended
        finally:
            self._loop.remove_reader(self._connection)
            self._stop_clock()
            if self._calling is not None:
                self._calling.cancel()
                await asyncio.wait({self._calling})

    def _readable(self) -> None:
        try:
            more = self._connection.recv(READ_BYTES)
            # a worker sends nothing while it waits for an answer: if anything comes, it no longer waits
            if not more or self._calling is not None:
                self._end()
                return
            self._received += more
            if len(self._received) < HEAD_BYTES:
                self._start_clock()
                return
            method, length = method_of(self._received[:HEAD_BYTES])
        except BlockingIOError:
            return
        except OSError:
            self._end()
            return
        except PushstepError as error:
            self._start(self._refuse(error))
            return
        if len(self._received) > HEAD_BYTES + length:
            self._end()
        elif len(self._received) == HEAD_BYTES + length:
            message, self._received = self._received[HEAD_BYTES:], b""
            self._stop_clock()
            self._comes_soon = time.monotonic() - self._answered_s < SPIN_S
            self._start(self._call(method, message))
        else:
            self._start_clock()

    def _start_clock(self) -> None:
        if self._clock is None:
            self._clock = self._loop.call_later(self._stall_s, self._end)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work now; if it has to wait, a task does the rest. A task for each call costs 0.05 ms."""
        try:
            waits_for = work.send(None)
        except StopIteration:
            return
        self._calling = self._loop.create_task(_Begun(work, waits_for))

    def _end(self) -> None:
        self._loop.remove_reader(self._connection)
        if not self._ended.done():
            self._ended.set_result(None)

    async def _call(self, method: Method, message: bytes) -> None:
        await self._send(await self._answer(method, message))
        self._calling = None
        self._answered_s = time.monotonic()
        if self._comes_soon:
            self._loop.call_soon(self._watch, self._answered_s)

    def _watch(self, answered_s: float) -> None:
        """Poll for the next call at every turn of the loop, for SPIN_S, so that the loop does not sleep."""
        if self._ended.done() or self._calling is not None:
            return
        self._readable()
        if self._answered_s == answered_s > time.monotonic() - SPIN_S:
            self._loop.call_soon(self._watch, answered_s)

    async def _refuse(self, error: PushstepError) -> None:
        await self._send(framed(Status.REFUSED, to_trailer(error)))
        self._calling = None
        self._end()

    async def _send(self, message: bytes) -> None:
        try:
            sent = self._connection.send(message)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._end()
            return
        if sent < len(message):
            # a worker that does not take its answer counts as gone; `asyncio.timeout` would need a task
            self._start_clock()
            try:
                await self._loop.sock_sendall(self._connection, message[sent:])
            except OSError:
                self._end()
            finally:
                self._stop_clock()


class _Begun(Coroutine[Any, Any, None]):
    """A coroutine that has run up to its first wait, in the form that a task takes.

    The first `send` hands the task what the coroutine waits for.
    """

    def __init__(self, work: Coroutine[Any, Any, None], waits_for: Any) -> None:
        self._work = work
        self._first = [waits_for]

    def send(self, value: Any, /) -> Any:
        return self._first.pop() if self._first else self._work.send(value)

    def throw(self, *error: Any) -> Any:
        self._first.clear()
        return self._work.throw(*error)

    def close(self) -> None:
        self._work.close()

    def __await__(self) -> Generator[Any, Any, None]:
        return (yield from self._work.__await__())
