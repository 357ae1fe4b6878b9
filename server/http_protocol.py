"""One HTTP connection: uvicorn's, with a time limit for whatever it waits for.

A head has to arrive within `stall_s`, a body within BODY_STALLS times that, and a caller that takes less than PROGRESS_BYTES of
what there is for it in `stall_s` is dropped, also after the last of it was handed over. What is no request is answered in the one shape that errors have here. A request that states its length in two ways ends its connection,
since a proxy in front may have believed the other one and taken what follows for another caller's.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from pushstep.proto.errors import MalformedRequest, PushstepError, RequestTimeout
from pushstep.proto.status import PROBLEM_TYPE, to_problem

from .readers import acked_bytes
from .timed_messages import PROGRESS_BYTES

# A body has at most 1 MiB: 26 KB/s at the default of 10 s.
BODY_STALLS: Final = 4
MAX_HEAD_BYTES: Final = 16 << 10
# Connections that nobody is served on, longest so first: they make room for new ones.
Idle = dict["HttpProtocol", None]


class _Connection(h11.Connection):
    """Refuses a request whose end could be understood in two ways."""

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:
                raise h11.RemoteProtocolError("Content-Length beside Transfer-Encoding")
        return event


class HttpProtocol(H11Protocol):
    """One connection. It is in `idle` while no request of it is under way."""

    def __init__(self, config: Config, state: ServerState, idle: Idle, stall_s: float) -> None:
        super().__init__(config=config, server_state=state, app_state={})
        self.conn = _Connection(h11.SERVER, MAX_HEAD_BYTES)
        self._idle = idle
        self._stall_s = stall_s
        self._waits_for = ""
        self._timer: asyncio.TimerHandle | None = None
        # set while a reader is waited for, who had taken so much then
        self._reading: asyncio.TimerHandle | None = None
        self._taken_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """A caller has connected, who may send nothing."""
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        """Something has come."""
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """A request has been answered; the next one may be there already."""
        super().on_response_complete()
        self._look()
        self._watch_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        """The caller is gone, or was sent away."""
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()
        self._rest()
        self._idle.pop(self, None)

    def _look(self) -> None:
        """Set the clock for what is waited for now."""
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
            limit_s = self._stall_s if waits_for == "head" else BODY_STALLS * self._stall_s
            self._timer = self.loop.call_later(limit_s, self._too_late, waits_for, limit_s)

    def _head_is_due(self) -> bool:
        """Whether the first head, or some of a further one, is waited for: between two, uvicorn has a clock of its own."""
        return self.cycle is None or bool(self.conn.trailing_data[0])

    def _too_late(self, what: str, limit_s: float) -> None:
        self.refuse(RequestTimeout(what=what, seconds=limit_s))

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
        """What came is no request."""
        self.refuse(MalformedRequest(problem=msg))

    # Callers that do not read.

    def pause_writing(self) -> None:
        """The caller has to read before more is written."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """It has."""
        super().resume_writing()
        self._rest()

    def _watch_reader(self) -> None:
        """Set the clock for a caller that has something to take."""
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
