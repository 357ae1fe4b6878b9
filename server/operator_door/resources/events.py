"""Events: who changed what in a model, and after which version; as a list, or as a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response

from ...models.events import EVENTS_KEPT, Events
from ..answers.event_stream import MEDIA_TYPE, Event, EventStream, Listeners, frames_of
from ..answers.pages import Cursor, cursor_of, key_in
from ..depends import ModelHere
from ..queries import Index, Offset

router = APIRouter(tags=["events"])
LONGEST_FILTER: Final = 200
Filter = Annotated[str | None, Query(max_length=LONGEST_FILTER)]


@router.get(
    "/models/{m}/events",
    summary="List the last events, or stream them",
    response_class=JSONResponse,
    responses={200: {"content": {MEDIA_TYPE: {"schema": {"type": "string"}}}}},
)
async def list_events(
    request: Request,
    model: ModelHere,
    after: Annotated[Offset, Query(description="only events with an id above this")] = 0,
    kind: Filter = None,
    actor: Filter = None,
    worker: Filter = None,
    limit: Annotated[Index, Query(ge=1, le=EVENTS_KEPT)] = EVENTS_KEPT,
    cursor: Cursor = None,
    last_event_id: Annotated[str, Header(max_length=LONGEST_FILTER)] = "",
) -> Response:
    """The last events, oldest first; of one kind, actor or worker if asked for.

    With `Accept: text/event-stream` the answer is a stream of server-sent events that goes on until the model is deleted or
    the server stops. Each has its event as JSON in `data`. With `Last-Event-ID` (browsers send it by themselves) a stream goes
    on behind that event. Named events say more: `restarted` (the server was started anew, and earlier events are gone),
    `missed` (so many events are no longer kept), `too_slow` (this listener was cut off: come again with the id), `ended`.
    """

    def is_wanted(event: Event) -> bool:
        return (
            kind in (None, event["kind"])
            and actor in (None, event["actor"])
            and worker in (None, event.get("worker"), event["by"])
        )

    if MEDIA_TYPE in request.headers.get("accept", ""):
        listeners: Listeners = request.app.state.listeners
        return EventStream(listeners, frames_of(model.events, last_event_id, after, is_wanted))
    return JSONResponse(_page(model.events, max(after, _position(model.events, cursor)), limit, is_wanted))


def _page(events: Events, after: int, limit: int, is_wanted: Callable[[Event], bool]) -> dict[str, Any]:
    wanted = (event for event in events.since(after) if is_wanted(event))
    shown: list[Event] = []
    more = None
    for event in wanted:
        if len(shown) == limit:
            more = cursor_of("events", f"{events.log}-{shown[-1]['id']}")
            break
        shown.append(event)
    return {"events": shown, "next": more, "log": events.log}


def _position(events: Events, cursor: str | None) -> int:
    """The id behind which a page begins: the first, if the cursor is of the process before."""
    log, _, after = (key_in(cursor, "events", str) or "").partition("-")
    return int(after) if log == events.log and after.isdigit() else 0
