"""A model's events as server-sent events (`text/event-stream`), which a listener goes on with by Last-Event-ID.

A listener has no queue of its own: it reads on in the model's log, which is bounded. One that is too far behind is cut off
with a last event that says so, and comes again for what it has missed.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from pushstep.proto.errors import Busy

from ...access.caller import was_cut
from ...models.events import Events

MEDIA_TYPE: Final = "text/event-stream"
# Each counts as a request under way.
MOST_LISTENERS: Final = 64
# Of events that a listener has not been sent yet, once it has caught up.
MOST_BEHIND: Final = 256
# Events that are sent at once.
SENT_TOGETHER: Final = 32
KEEP_ALIVE_S: Final = 10.0
# When a listener comes again, in ms and in s.
AGAIN_MS: Final = 2000
RETRY_AFTER_S: Final = 2.0
_ID: Final = re.compile(r"([0-9a-f]{8})-([0-9]{1,18})", re.ASCII)

Event = Mapping[str, Any]


class Listeners:
    """How many streams of events there are now."""

    def __init__(self) -> None:
        self._count = 0

    def require_room(self) -> None:
        """Busy if there are MOST_LISTENERS."""
        if self._count >= MOST_LISTENERS:
            raise Busy(what="event streams", waiting=self._count, retry_after_s=RETRY_AFTER_S)

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """A block in which there is one more."""
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1


class EventStream(StreamingResponse):
    """The answer that streams the events of one model."""

    def __init__(self, listeners: Listeners, frames: AsyncIterator[str]) -> None:
        """Busy if there are too many."""
        listeners.require_room()
        self._listeners = listeners
        # proxies such as nginx would hold the events back
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(frames, headers=headers, media_type=MEDIA_TYPE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the listener goes, no more come, or its token is revoked."""
        with self._listeners.one_more():
            try:
                await super().__call__(scope, receive, send)
            except asyncio.CancelledError:
                cut = was_cut()
                if cut is None:
                    raise
                last = f"event: ended\ndata: {json.dumps({'why': cut.code})}\n\n"
                await send({"type": "http.response.body", "body": last.encode(), "more_body": False})


async def frames_of(
    events: Events, last_event_id: str, after: int, is_wanted: Callable[[Event], bool]
) -> AsyncIterator[str]:
    """The frames of a stream: the events behind `last_event_id`, or with an id above `after`, and all that follow."""
    yield f"retry: {AGAIN_MS}\n\n"
    known = _ID.fullmatch(last_event_id)
    if known is not None and known[1] == events.log:
        after = min(int(known[2]), events.newest)
    elif last_event_id:  # of the process before, whose events are gone
        yield _frame("restarted", _id(events, 0), {"log": events.log})
        after = 0
    if after < events.oldest - 1:
        yield _frame("missed", _id(events, events.oldest - 1), {"missed": events.oldest - 1 - after})
        after = events.oldest - 1
    caught_up = events.newest
    while True:
        fresh = events.since(after)
        if after < events.oldest - 1 or (after >= caught_up and len(fresh) > MOST_BEHIND):
            yield _frame("too_slow", _id(events, after), {"behind": events.newest - after})
            return
        for start in range(0, len(fresh), SENT_TOGETHER):
            some = fresh[start : start + SENT_TOGETHER]
            shown = [_frame("", _id(events, event["id"]), event) for event in some if is_wanted(event)]
            after = some[-1]["id"]
            if shown:
                yield "".join(shown)
        if fresh:
            continue
        if events.ended:
            yield _frame("ended", _id(events, after), {"why": events.ended})
            return
        if not await events.wait(after, KEEP_ALIVE_S):
            # the id moves on over events that are not wanted, or they would count as missed
            yield f": keep-alive\nid: {_id(events, after)}\n\n"


def _id(events: Events, number: int) -> str:
    return f"{events.log}-{number}"


def _frame(kind: str, event_id: str, data: Event) -> str:
    named = f"event: {kind}\n" if kind else ""
    return f"id: {event_id}\n{named}data: {json.dumps(data, default=str)}\n\n"
