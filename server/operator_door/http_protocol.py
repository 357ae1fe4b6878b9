"""One HTTP connection: uvicorn's, with a time limit for whatever it waits for.

A head has to arrive within `stall_s`, and a body within BODY_STALLS times that, or else as much of it as a stream has to
bring in that time, and as much again in each such time. A caller that takes less than
PROGRESS_BYTES of its waiting answer in `stall_s` is dropped, also after the last of the answer was written. Bytes that
are no request are answered in the one shape of errors. A request that states its length in two ways ends its
connection: a proxy in front may have believed the other length, and taken what follows for another caller's request.
"""

from __future__ import annotations

import asyncio
import json
import weakref
from typing import Any, Final

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from pushstep.proto.errors import MalformedRequest, PushstepError, RequestTimeout
from pushstep.proto.errors.status import PROBLEM_TYPE, to_problem

from ..streams.readers import acked_bytes
from ..streams.timed_messages import PROGRESS_BYTES

# A body that is no file has at most 128 KiB (MAX_BODY_BYTES of app.py): 3.3 KB/s at the default `stall_s` of 10 s.
BODY_STALLS: Final = 4
# Of a file, in that time: as a stream of workers.
BODY_PROGRESS_BYTES: Final = BODY_STALLS * PROGRESS_BYTES
# Of a body whose request is refused before it is there: uvicorn reads and drops it, so that the connection goes on. Beyond so
# many bytes the connection ends, or a refused caller could send without an end, and have all of it decrypted.
MOST_UNWANTED_BYTES: Final = 1 << 20
LAST_LOOK_S: Final = 1.0
MAX_HEAD_BYTES: Final = 16 << 10
# Connections without a request under way, the longest idle first. They are ended to make room for new ones.
Idle = dict["HttpProtocol", None]


class _Connection(h11.Connection):
    """Refuses a request that states its length in two ways, so that its end is uncertain."""

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:
                raise h11.RemoteProtocolError("Content-Length beside Transfer-Encoding")
        return event


class HttpProtocol(H11Protocol):
    """One connection, with its timers. It is in `idle` while none of its requests is under way."""

    def __init__(self, config: Config, state: ServerState, idle: Idle, stall_s: float) -> None:
        super().__init__(config=config, server_state=state, app_state={})
        self.conn = _Connection(h11.SERVER, MAX_HEAD_BYTES)
        self.app = self._running(self.app)
        self._idle = idle
        self._stall_s = stall_s
        self._waits_for = ""
        # of a body behind its answer, which nobody reads
        self._unwanted_bytes = 0
        self._is_ending = False
        # bytes that came since the timer began
        self._came_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        # the timer while the caller has bytes to take, and how many it had taken when the timer began
        self._reading: asyncio.TimerHandle | None = None
        self._taken_bytes = 0

    def _running(self, app: ASGIApp) -> ASGIApp:
        """`app`; where it returns in the middle of an answer, which it does to cut its caller off, the connection ends."""
        weakly = weakref.ref(
            self
        )  # a cycle would keep a connection, and what it was sent, until a collection

        async def run(scope: Scope, receive: Receive, send: Send) -> None:
            await app(scope, receive, send)
            protocol = weakly()
            cycle = None if protocol is None else protocol.cycle
            if protocol is None or cycle is None:
                return
            if cycle.response_started and not cycle.response_complete:
                cycle.disconnected = True  # or uvicorn would log it as a defect
                protocol.transport.close()

        return run

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Start the clock: the caller may never send anything."""
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        """Bytes have arrived."""
        self._came_bytes += len(data)
        if self._is_refused():
            self._unwanted_bytes += len(data)
            if self._unwanted_bytes > MOST_UNWANTED_BYTES:
                self._end_unread()
                return
        super().data_received(data)
        self._look()

    def _is_refused(self) -> bool:
        """True while a body comes whose request was answered before it was there."""
        is_answered = self.cycle is not None and self.cycle.response_complete
        return is_answered and self.conn.their_state is h11.SEND_BODY

    def _end_unread(self) -> None:
        """Take nothing more, and end the connection once the caller has had time to read its answer."""
        if not self._is_ending:
            self._is_ending = True
            self.transport.pause_reading()
            self.loop.call_later(LAST_LOOK_S, self.transport.abort)

    def on_response_complete(self) -> None:
        """A request has been answered. The next one may have arrived already."""
        self._unwanted_bytes = 0
        super().on_response_complete()
        self._look()
        self._watch_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended: stop the clocks."""
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()
        self._rest()
        self._idle.pop(self, None)

    def _look(self) -> None:
        """Set the clock for the head or body that is waited for now, and keep `idle` up to date."""
        is_served = self.cycle is not None and not self.cycle.response_complete
        their_state = self.conn.their_state
        waits_for = ""
        if self.transport.is_closing():
            pass
        elif their_state is h11.SEND_BODY:
            waits_for = "body"
        elif their_state is h11.IDLE and not is_served and self._head_is_due():
            waits_for = "head"
        if is_served or self.transport.is_closing():
            self._idle.pop(self, None)
        else:
            self._idle.setdefault(self)
        if waits_for == self._waits_for:
            return
        self._waits_for = waits_for
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if waits_for:
            self._start_timer(waits_for)

    def _start_timer(self, waits_for: str) -> None:
        self._came_bytes = 0
        limit_s = self._stall_s if waits_for == "head" else BODY_STALLS * self._stall_s
        self._timer = self.loop.call_later(limit_s, self._too_late, waits_for, limit_s)

    def _head_is_due(self) -> bool:
        """Whether the first head, or the rest of a later one, is waited for.

        Between requests uvicorn has a clock of its own.
        """
        return self.cycle is None or bool(self.conn.trailing_data[0])

    def _too_late(self, what: str, limit_s: float) -> None:
        if what == "body" and self._body_moves():
            self._start_timer(what)
        else:
            self.refuse(RequestTimeout(what=what, seconds=limit_s))

    def _body_moves(self) -> bool:
        """Whether enough of a body came lately, or it is this side that does not read. Not once it is refused."""
        if self.cycle is None or self.cycle.response_complete:
            return False
        return bool(self.flow.read_paused) or self._came_bytes >= BODY_PROGRESS_BYTES

    def refuse(self, error: PushstepError) -> None:
        """Answer with an error, if nothing has been answered yet, and end the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(to_problem(error)).encode()
            length = str(len(body)).encode()
            headers = [
                (b"content-type", PROBLEM_TYPE.encode()),
                (b"content-length", length),
                (b"connection", b"close"),
            ]
            head = h11.Response(status_code=error.http_status, headers=headers, reason=b"")
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()
        self._watch_reader()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are no request; called by uvicorn."""
        self.refuse(MalformedRequest(problem=msg))

    # Callers that do not read.

    def pause_writing(self) -> None:
        """The write buffer is full: watch whether the caller reads."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """The caller has read enough: stop watching it."""
        super().resume_writing()
        self._rest()

    def _watch_reader(self) -> None:
        """Set the clock for a caller that has bytes to take."""
        if self._reading is None and self.transport.get_write_buffer_size():
            self._taken_bytes = self._acked_bytes()
            self._reading = self.loop.call_later(self._stall_s, self._look_at_reader)

    def _look_at_reader(self) -> None:
        self._reading = None
        taken_bytes = self._acked_bytes() - self._taken_bytes
        if self.transport.get_write_buffer_size() and taken_bytes < PROGRESS_BYTES:
            self.transport.abort()
        else:
            self._watch_reader()

    def _rest(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _acked_bytes(self) -> int:
        return acked_bytes(self.transport.get_extra_info("socket"))
