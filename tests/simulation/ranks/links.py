"""What carries messages: between rank 0 and the others, and between workers and ranks.

One way, messages keep their order, as on a stream of gRPC; on different links they overtake each other. A link that is cut
carries nothing any more, and its ends learn of it later, or never.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pushstep.proto.errors import PushstepError
from pushstep.proto.errors.status import untrace
from pushstep.server.links.link import RankLink

from .world import ProcessLoop, World

if TYPE_CHECKING:
    from .process import RankProcess

END: Final = object()
CANCEL: Final = object()
START: Final = object()


class Gone(Exception):
    """A call has ended without an answer."""


@dataclass
class Weather:
    """How bad it is: the longest delay of most messages and of the odd one, and chances for each call."""

    delay_s: float = 0.02
    stall: float = 0.02
    stall_s: float = 3.0
    # a call breaks before all of it has come; its answer does not come
    breaks: float = 0.03
    loses: float = 0.03


class Winds:
    """Draws what becomes of each message."""

    def __init__(self, chance: random.Random, weather: Weather) -> None:
        self.chance = chance
        self.weather = weather

    def delay_s(self) -> float:
        """How long a message takes."""
        longest_s = (
            self.weather.stall_s if self.chance.random() < self.weather.stall else self.weather.delay_s
        )
        return self.chance.uniform(0.0005, longest_s)

    def breaks(self) -> bool:
        """A call breaks off."""
        return self.chance.random() < self.weather.breaks

    def loses(self) -> bool:
        """An answer is lost."""
        return self.chance.random() < self.weather.loses

    def calm(self) -> None:
        """Nothing goes wrong from here on."""
        self.weather = Weather(stall=0.0, breaks=0.0, loses=0.0)


class Wire:
    """One way."""

    def __init__(self, world: World, winds: Winds, deliver: Callable[[Any], None]) -> None:
        self._world = world
        self._winds = winds
        self._deliver = deliver
        self._last_s = 0.0
        self.is_cut = False

    def send(self, message: Any) -> None:
        """Bring a message, behind those before it."""
        self._last_s = max(self._last_s, self._world.now_s + self._winds.delay_s())
        self._world.after(self._last_s - self._world.now_s, lambda: self._arrive(message))

    def _arrive(self, message: Any) -> None:
        if not self.is_cut:
            self._deliver(message)


class Inbox:
    """What has come for a process, in order."""

    def __init__(self, loop: ProcessLoop) -> None:
        self._loop = loop
        self._messages: deque[Any] = deque()
        self._comes: asyncio.Future[None] | None = None

    def put(self, message: Any) -> None:
        """One more."""
        self._messages.append(message)
        if self._comes is not None and not self._comes.done():
            self._comes.set_result(None)

    async def get(self) -> Any:
        """The next one."""
        while not self._messages:
            self._comes = self._loop.create_future()
            await self._comes
        return self._messages.popleft()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        message = await self.get()
        if message is END:
            raise StopAsyncIteration
        return bytes(message)


# The links between ranks.


class Line:
    """The link of a rank above 0, both ways, from the moment when it is opened."""

    def __init__(self, world: World, winds: Winds, zero: RankProcess, other: RankProcess) -> None:
        self.zero, self.other = zero, other
        self._come, self._ordered = Inbox(zero.loop), Inbox(other.loop)
        self._up = Wire(world, winds, self._come.put)
        self._down = Wire(world, winds, self._ordered.put)
        hub = zero.hub
        zero.loop.create_task(hub._link(self._come, self))

    # As rank 0's hub has it.

    async def abort(self, _: Any, details: str, trailers: Any) -> None:
        """End it with an error."""
        self._down.send(END)

    # As the other rank's RankLink has it, and the hub: one writes orders, the other what it says.

    async def write(self, message: bytes) -> None:
        """From rank 0."""
        self._down.send(message)

    # Faults.

    def cut(self, *, is_noticed: bool) -> None:
        """Nothing passes any more. Both ends see it break, or neither does."""
        if is_noticed:
            self._up.send(END)
            self._down.send(END)
        else:
            self._up.is_cut = self._down.is_cut = True

    def ends(self, process: RankProcess) -> None:
        """One of the two has ended: the other one hears of it."""
        if process is self.zero:
            self._down.send(END)
        else:
            self._up.send(END)


class _Call:
    """A line, as the rank above 0 has it."""

    def __init__(self, line: Line) -> None:
        self._line = line

    async def read(self) -> Any:
        """The next order; no bytes at its end."""
        return await self._line._ordered.get()

    async def write(self, message: bytes) -> None:
        """To rank 0."""
        self._line._up.send(message)

    async def code(self) -> str:
        """Why it has ended."""
        return "UNAVAILABLE"


class _Channel:
    """A channel of gRPC to rank 0."""

    def __init__(self, process: RankProcess) -> None:
        self._process = process

    async def channel_ready(self) -> None:
        """Wait until rank 0 has its door open."""
        while self._process.group.zero is None:
            await asyncio.sleep(0.05)

    def stream_stream(self, *_: Any, **__: Any) -> Callable[..., _Call]:
        return lambda metadata: _Call(self._process.group.opened(self._process))

    async def close(self) -> None:
        """Nothing is left open."""


class SimulatedLink(RankLink):
    """The link of a rank above 0, over such a channel."""

    process: RankProcess

    def _channel(self, _: str) -> Any:
        return _Channel(self.process)


# Calls of workers.


class Call:
    """One call to a rank's door. `answer` gets what comes back: a PushstepError, Gone, or the door's answer."""

    def __init__(
        self,
        world: World,
        winds: Winds,
        here: ProcessLoop,
        process: RankProcess | None,
        begin: Callable[[RankProcess, Inbox], Coroutine[Any, Any, Any]],
    ) -> None:
        self.answer: asyncio.Future[Any] = here.create_future()
        self._winds = winds
        self._process = process
        self._down = Wire(world, winds, self._told)
        self._task: asyncio.Task[None] | None = None
        self._begin = begin
        self._loses = winds.loses()
        if process is None:
            self._down.send(Gone())
            return
        self._inbox = Inbox(process.loop)
        self._up = Wire(world, winds, self._arrive)
        self._up.send(START)
        process.calls.append(self)

    def send(self, *messages: bytes) -> None:
        """Send more; the rank may have gone, or the call break."""
        for message in messages:
            if self._process is not None and self._winds.breaks():
                self._up.send(CANCEL)
                self._down.send(Gone())
                return
            self._put(message)

    def finish(self) -> None:
        """No more is sent."""
        self._put(END)

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        if self._process is not None:
            self._up.send(CANCEL)

    def _put(self, message: Any) -> None:
        if self._process is not None:
            self._up.send(message)

    def _arrive(self, message: Any) -> None:
        process = self._process
        if process is None or process.is_over:
            return
        if message is START:
            self._start()
        elif message is CANCEL:
            if self._task is not None:
                self._task.cancel()
        else:
            self._inbox.put(message)

    def _start(self) -> None:
        process = self._process
        if process is None:
            return

        async def answered() -> None:
            try:
                found = await self._begin(process, self._inbox)
            except PushstepError as error:
                untrace(error)
                found = error
            if not self._loses:
                self._down.send(found)

        self._task = process.loop.create_task(answered())

    def _told(self, found: Any) -> None:
        if self.answer.done():
            return
        if isinstance(found, Exception):
            self.answer.set_exception(found)
            self.answer.exception()
        else:
            self.answer.set_result(found)

    def ends(self) -> None:
        """Its process has ended. The caller hears of it, unless the answer is lost."""
        if not self._loses:
            self._down.send(Gone())
