"""The door for workers on this host: single-message calls over a region's life line, onto the methods of the gRPC door.

Nothing is decided here and nothing is different behind it: a call is the same message, and walks through the same rooms.
A worker that goes away in the middle cancels its call, as a broken stream does.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator

from pushstep.proto.errors import MalformedFrame, PushstepError
from pushstep.proto.line import HEAD_BYTES, Method, Status, framed, method_of
from pushstep.proto.status import named, to_trailer

from .grpc_door import GrpcDoor

log = logging.getLogger("pushstep.line")


class LineDoor:
    """Serves life lines."""

    def __init__(self, door: GrpcDoor) -> None:
        self._door = door

    async def serve(self, connection: socket.socket) -> None:
        """Answer calls, one at a time, until the worker is gone or sends what is no call."""
        while (head := await _exactly(connection, HEAD_BYTES)) is not None:
            try:
                method, length = method_of(head)
            except PushstepError as error:
                await _send(connection, framed(Status.REFUSED, to_trailer(error)))
                return
            message = await _exactly(connection, length)
            if message is None or not await self._call(connection, method, message):
                return

    async def _call(self, connection: socket.socket, method: Method, message: bytes) -> bool:
        """Make one call and send its answer; False if the worker left meanwhile."""
        loop = asyncio.get_running_loop()
        answering = asyncio.ensure_future(self._answer(method, message))
        # a worker that waits for an answer has nothing to say: whatever comes means that it does not wait any more
        leaving = asyncio.ensure_future(loop.sock_recv(connection, 1))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left = leaving.done()
            leaving.cancel()
            if not answering.done():
                answering.cancel()
        if left:
            await asyncio.wait({answering})
            return False
        await _send(connection, answering.result())
        return True

    async def _answer(self, method: Method, message: bytes) -> bytes:
        try:
            if method is Method.PUSH:
                return framed(Status.ANSWERED, (await self._door.push(_alone(message))).SerializeToString())
            answers = [answer async for answer in self._door.exchange(_alone(message))]
            if len(answers) != 1:
                raise MalformedFrame(problem="only a push that names its region is answered in one message")
            return framed(Status.ANSWERED, answers[0])
        except Exception as error:  # noqa: BLE001 - the one place where errors become statuses
            known = named(error, log)
            log.debug("refused: %s", known.message)
            return framed(Status.REFUSED, to_trailer(known))


async def _alone(message: bytes) -> AsyncIterator[bytes]:
    yield message


async def _exactly(connection: socket.socket, length: int) -> bytes | None:
    """So many bytes; None if the other end closes before."""
    loop = asyncio.get_running_loop()
    received = bytearray()
    while len(received) < length:
        more = await loop.sock_recv(connection, length - len(received))
        if not more:
            return None
        received += more
    return bytes(received)


async def _send(connection: socket.socket, message: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(connection, message)
