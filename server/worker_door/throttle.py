"""Refuses a quarantined worker slowly, and then ends its connection.

A refused header costs the event loop about as much as a small push, so a worker that asks again and again would slow
the others. Its first call is answered after ANSWER_S, and then the connection ends. Its other calls wait for HOLD_S and
are never answered. A connection has room for a fixed number of calls (`grpc.max_concurrent_streams` in
`grpc_options.py`). Each new connection has room for as many again, so a worker that comes again is answered later
every time. A connection ends at once only when MOST_HELD calls wait.

gRPC itself refuses calls beyond that room: 170,000 a second on two cores, which take most of one core. So the receive
window of such a connection is narrowed to the kernel's minimum: some hundred calls a second, and 0.02 of a core.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Final

from pushstep.proto.errors import Quarantined

from ..streams.connections import connections_to, place_of

ANSWER_S: Final = 0.5
# The delay doubles with each answer in one quarantine, up to this.
LONGEST_ANSWER_S: Final = 10.0
HOLD_S: Final = 60.0
# Calls that wait at once. Each takes some ten kilobytes.
MOST_HELD: Final = 2000
# Time for an answer that gRPC has written to arrive, before its connection ends.
LEAVE_S: Final = 0.1
# Model, worker, and how often the worker has been quarantined.
Quarantine = tuple[str, str, str]


class Throttle:
    """Owns the list of calls that are kept waiting."""

    def __init__(self) -> None:
        self._answering: set[Quarantine] = set()
        self._answers: dict[Quarantine, int] = {}
        self._held = 0
        # by connection: how many of its calls wait
        self._slowed: Counter[str] = Counter()

    async def hold(self, error: Quarantined) -> bool:
        """Keep a worker's call waiting. True if it is to be answered then.

        One call per quarantine is answered at a time. Any other gets False: after HOLD_S, or at once if MOST_HELD wait.
        """
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
        """A block around a call's answer: it begins when the answer may leave.

        The connection ends LEAVE_S after the block, or before the block if the call is not to be answered.
        """
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
    """End the TCP connection of this process whose peer is `peer`, in gRPC's text form. Others stay."""
    _do(peer, lambda connection: connection.shutdown(socket.SHUT_RDWR))


def narrow(peer: str) -> None:
    """Set a connection's receive window to the kernel's minimum: a peer cannot send what is not taken in."""

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
