"""The link of a rank above 0 to rank 0: what it says, and the orders that it gets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import grpc

from pushstep.proto.errors import PushstepError, RankLost
from pushstep.proto.errors.status import from_rpc_error
from pushstep.proto.shards_pb2 import RankHello, RankMessage, RankOrder
from pushstep.proto.wire.frames import MAX_MESSAGE_BYTES

from .hub import ALIVE_S, SERVICE, SILENCE_S

log = logging.getLogger("pushstep.ranks")
# Orders bring whole manifests.
LONGEST_ORDER_BYTES: Final = 1 << 30
OPTIONS: Final = (
    ("grpc.max_receive_message_length", LONGEST_ORDER_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 60_000),
)
# How long a rank tries to reach rank 0, whose door may open later.
REACH_S: Final = 120.0


class RankLink:
    """One rank's link to rank 0."""

    def __init__(
        self,
        hello: RankHello,
        on_order: Callable[[RankOrder], Awaitable[None]],
        on_lost: Callable[[PushstepError], None],
        token: str | None = None,
        ca: Path | None = None,
        own: tuple[Path, Path] | None = None,
    ) -> None:
        """`ca`: whose certificate rank 0's is checked against; None: no TLS. `own`: certificate and key of this rank."""
        self._hello = hello
        self._on_order = on_order
        self._on_lost = on_lost
        self._token = token
        self._ca = ca
        self._own = own
        self._said: asyncio.Queue[RankMessage] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._heard_s = 0.0
        # the job ends: the link may
        self.closing = False
        self._address = ""
        self.welcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def open(self, address: str) -> None:
        """Open it. Returns once all ranks have come to rank 0. Raises what it was refused with."""
        self._address = address
        channel = self._channel(address)
        try:
            async with asyncio.timeout(REACH_S):
                await channel.channel_ready()
        except TimeoutError as error:
            await channel.close()
            raise OSError(f"rank 0 is not reached at {address} within {REACH_S:.0f} s") from error
        method: Any = channel.stream_stream(
            f"/{SERVICE}/Link", request_serializer=None, response_deserializer=None
        )
        call = method(metadata=self._metadata())
        self._task = asyncio.create_task(self._run(channel, call))
        await self.welcome

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return () if self._token is None else (("authorization", f"Bearer {self._token}"),)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if self._ca is None:
            return grpc.aio.insecure_channel(address, options=OPTIONS)
        key, chain = (
            (None, None) if self._own is None else (self._own[1].read_bytes(), self._own[0].read_bytes())
        )
        return grpc.aio.secure_channel(
            address, grpc.ssl_channel_credentials(self._ca.read_bytes(), key, chain), options=OPTIONS
        )

    def say(self, message: RankMessage) -> None:
        """Say something to rank 0, behind everything said before."""
        self._said.put_nowait(message)

    async def give(self, contents: AsyncIterator[bytes]) -> None:
        """Send what rank 0 has asked for, over a connection of its own: what is said here waits for none of it."""
        async with self._channel(self._address) as channel:
            method: Any = channel.stream_unary(
                f"/{SERVICE}/Give", request_serializer=None, response_deserializer=None
            )
            try:
                await method(contents, metadata=self._metadata())
            except grpc.aio.AioRpcError as error:
                problem = error.details() or str(error.code())
                raise from_rpc_error(error) or RankLost(rank=0, problem=problem) from error

    async def _run(self, channel: grpc.aio.Channel, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        writing = asyncio.create_task(self._write(call))
        watching = asyncio.create_task(self._watch())
        try:
            while isinstance(message := await call.read(), bytes):
                self._heard_s = asyncio.get_running_loop().time()
                order = RankOrder.FromString(message)
                kind = order.WhichOneof("ordered")
                if kind == "welcome":
                    if not self.welcome.done():
                        self.welcome.set_result(None)
                elif kind != "alive":
                    await self._on_order(order)
            code = await call.code()
            self._lost(RankLost(rank=0, problem=f"its link has ended: {code}"))
        except grpc.aio.AioRpcError as error:
            self._lost(
                from_rpc_error(error) or RankLost(rank=0, problem=error.details() or str(error.code()))
            )
        except Exception as error:
            log.exception("the link to rank 0 has failed")
            self._lost(RankLost(rank=0, problem=repr(error)))
        finally:
            writing.cancel()
            watching.cancel()
            await channel.close()

    async def _write(self, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        await call.write(RankMessage(hello=self._hello).SerializeToString())
        while True:
            message = await self._said.get()
            await call.write(message.SerializeToString())

    async def _watch(self) -> None:
        self._heard_s = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(ALIVE_S)
            self.say(RankMessage(alive=True))
            if asyncio.get_running_loop().time() - self._heard_s > SILENCE_S:
                self._lost(RankLost(rank=0, problem=f"it has said nothing for {SILENCE_S:.0f} s"))

    def _lost(self, error: PushstepError) -> None:
        if not self.welcome.done():
            self.welcome.set_exception(error)
        elif not self.closing:
            self._on_lost(error)

    async def close(self) -> None:
        """End the link."""
        self.closing = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
