"""How a quarantined worker is refused: slowly, and then its connection ends.

To refuse a header costs the loop about as much as to take a small push, so a worker that asks again and again would slow
the others. Its first call is answered after ANSWER_S, and then the connection ends. Whatever else it sends is kept
waiting for HOLD_S and never answered: a connection has room for so many calls and no more (service.py says how many), and
each that ends makes room for as many, so a worker that comes again is answered later every time. Only when very many
wait are connections ended at once.

Calls beyond that room gRPC refuses by itself, 170,000 a second here, which took most of a core. So what the kernel takes in of
such a connection is narrowed to its least, some hundred calls a second, and 0.02 of a core is left of that.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Final

from pushstep.proto.errors import Quarantined

from .connections import connections_to, place_of

ANSWER_S: Final = 0.5
# Twice as long for each answer in one quarantine, up to this.
LONGEST_ANSWER_S: Final = 10.0
HOLD_S: Final = 60.0
# Some ten kilobytes each.
MOST_HELD: Final = 2000
# What an answer that gRPC has written may take to arrive before its connection ends.
LEAVE_S: Final = 0.1
# Of which model which worker, and for which time.
Quarantine = tuple[str, str, str]


class Tarpit:
    """Owns who is being kept waiting."""

    def __init__(self) -> None:
        self._answering: set[Quarantine] = set()
        self._answers: dict[Quarantine, int] = {}
        self._held = 0
        # by connection, how many of its calls are kept waiting
        self._slowed: Counter[str] = Counter()

    async def hold(self, error: Quarantined) -> bool:
        """Keep a worker's call waiting. Whether it is to be answered then: one of them is, at a time."""
        who = error.fields["model"], error.fields["worker"], error.fields["times"]
        is_first = who not in self._answering
        if not is_first and self._held >= MOST_HELD:
            return False
        self._answering.add(who)
        self._held += 1
        try:
            await asyncio.sleep(self._answer_s(who) if is_first else HOLD_S)
        finally:
            self._held -= 1
            if is_first:
                self._answering.discard(who)
        return is_first

    def _answer_s(self, who: Quarantine) -> float:
        if len(self._answers) >= MOST_HELD:
            self._answers.clear()
        answers = self._answers.get(who, 0)
        self._answers[who] = answers + 1
        return float(min(ANSWER_S * 2.0 ** min(answers, 16), LONGEST_ANSWER_S))

    @contextlib.asynccontextmanager
    async def refusing(self, error: Quarantined, peer: str) -> AsyncIterator[None]:
        """Around a call's answer: entered when it may leave. Its connection ends when it has left, or has ended."""
        if not self._slowed[peer]:
            narrow(peer)
        self._slowed[peer] += 1
        try:
            is_answered = await self.hold(error)
        finally:
            self._slowed[peer] -= 1
            if not self._slowed[peer]:
                del self._slowed[peer]
        if not is_answered:
            disconnect(peer)
        try:
            yield
        finally:
            if is_answered:
                asyncio.get_running_loop().call_later(LEAVE_S, disconnect, peer)


def disconnect(peer: str) -> None:
    """End the TCP connection of this process whose other end is `peer`, in gRPC's words. Others are left alone."""
    _do(peer, lambda connection: connection.shutdown(socket.SHUT_RDWR))


def narrow(peer: str) -> None:
    """Take in as little of a connection as the kernel allows: what is not taken in cannot be sent."""

    def clamp(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, 1)

    _do(peer, clamp)


def _do(peer: str, act: Callable[[socket.socket], None]) -> None:
    place = place_of(peer)
    if place is None:
        return
    for _, connection in connections_to((place,)):
        with contextlib.closing(connection), contextlib.suppress(OSError):
            act(connection)
        return
