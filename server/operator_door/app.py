"""The application: the routers, the one shape of errors, and the limits on requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import cache, singledispatch
from importlib.metadata import version as installed_version
from re import Pattern
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pushstep.proto.errors import (
    Busy,
    InvalidSettings,
    MessageTooLarge,
    MethodNotAllowed,
    PushstepError,
    RangeNotSatisfiable,
    UnknownRoute,
    UnsupportedEncoding,
)
from pushstep.proto.errors.status import PROBLEM_TYPE, named, to_problem, untrace

from ..access.caller import CALLER, was_cut
from ..access.guard import Guard
from ..access.request_rate import MOST_WAITING, RequestRate
from ..access.routes import RouteAccess, challenge
from ..coordinator.settings import problems, read_json
from ..counters.server_counts import OPERATORS_DOOR, ServerCounts
from ..metrics import route as metrics
from ..metrics.exposition import Exposition
from ..models.catalog import Catalog
from ..models.copies import COPIES_AT_ONCE, Copies, ModelCopies
from ..models.events import ACTOR
from ..page import route as page
from ..page.served_files import assets
from ..process.request_log import RequestLog, about
from ..process.threads import REQUESTS, RETRY_AFTER_S
from ..reports.job_view import Alone, JobView
from ..streams.received import INLINE_MESSAGE_BYTES
from . import openapi
from .answers.downloads import Downloads
from .answers.event_stream import Listeners
from .answers.outlet import Outlet
from .header_fields import codings, is_json
from .pages import check_host, check_page
from .resources import (
    durability,
    events,
    export,
    health,
    hooks,
    models,
    param_groups,
    parameters,
    policy,
    server,
    snapshots,
    workers,
)

log = RequestLog("pushstep.rest")
# Twice the size of a policy that names every group that a model may have. A body of 256 KiB with as many parts as
# possible would hold the event loop for 90 ms while it is validated.
MAX_BODY_BYTES: Final = 128 << 10
OPENAPI_PATH: Final = "/openapi.json"
# The most requests under way at once, downloads included.
MOST_REQUESTS: Final = 200
# Methods whose requests have none that anyone reads.
WITHOUT_BODY: Final = frozenset({"GET", "HEAD", "OPTIONS"})
LOOPBACK: Final = frozenset({"127.0.0.1", "::1"})
# Health checks and metrics are answered however many requests are under way.
ALWAYS_ANSWERED: Final = frozenset({"/healthz", "/readyz", metrics.PATH})


# What is not below /v1.
AT_ROOT: Final = (health, metrics, page)
RESOURCES: Final = (
    server,
    models,
    param_groups,
    parameters,
    hooks,
    policy,
    workers,
    snapshots,
    durability,
    export,
    events,
)


def create_app(
    catalog: Catalog,
    allowed_hosts: Collection[str] | None,
    grpc_address: str = "",
    guard: Guard | None = None,
    view: JobView | None = None,
) -> FastAPI:
    """The REST interface over `catalog`. With `allowed_hosts` None, requests for any Host are answered.

    `guard` None: everyone may do everything. `view`: of the ranks of a job; None: this server is alone. RuntimeError for a route without an entry in the table of access.
    """
    app = FastAPI(
        title="pushstep",
        version=installed_version("pushstep"),
        description="Look at and steer the models of a pushstep server.",
        # FastAPI's pages run scripts from other sites in this origin, where they could steer the models
        docs_url=None,
        redoc_url=None,
        openapi_url=OPENAPI_PATH,
        redirect_slashes=False,  # a redirect is no answer in the shape of errors
    )
    openapi.describe(app)
    app.state.catalog = catalog
    app.state.grpc_address = grpc_address
    app.state.copies = ModelCopies(COPIES_AT_ONCE)
    app.state.looks = Copies(COPIES_AT_ONCE)
    app.state.downloads = Downloads()
    app.state.listeners = Listeners()
    view = view or JobView(catalog, Alone(catalog), grpc_address)
    app.state.view = view
    app.state.exposition = Exposition(catalog, view)
    assets()  # read now, while nobody waits
    for at_root in AT_ROOT:
        app.include_router(at_root.router)
    for resource in RESOURCES:
        app.include_router(resource.router, prefix="/v1")
    app.add_exception_handler(PushstepError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_middleware(Outlet, budget=catalog.reading)
    access = RouteAccess(guard or Guard(None), all_routes())
    app.add_middleware(Entrance, allowed_hosts=allowed_hosts, counts=catalog.counts, access=access)
    return app


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    about(str(request.path_params.get("m", "")))
    problem = _translated(error, request)
    request.app.state.catalog.counts.refused(OPERATORS_DOOR, problem.code)
    answer = problem_response(problem)
    if answer.status_code == MethodNotAllowed.http_status:
        answer.headers["Allow"] = ", ".join(_methods(request))
    return answer


def _methods(request: Request) -> list[str]:
    """The methods of the resource at a request's path, of all its routes together."""
    path = request.scope["path"]
    return sorted(
        {method for pattern, methods in _methods_by_path() if pattern.match(path) for method in methods}
    )


@cache
def _methods_by_path() -> list[tuple[Pattern[str], Collection[str]]]:
    return [(compile_path(path)[0], methods) for path, methods in all_routes()]


def all_routes() -> list[tuple[str, Collection[str]]]:
    """Every route: its path, as it was written, and its methods."""
    routers = [
        *(("", at_root.router) for at_root in AT_ROOT),
        *(("/v1", resource.router) for resource in RESOURCES),
    ]
    routes: list[tuple[str, Collection[str]]] = [
        (prefix + route.path, route.methods or ())
        for prefix, router in routers
        for route in router.routes
        if isinstance(route, APIRoute)
    ]
    routes.append((OPENAPI_PATH, ("GET", "HEAD")))
    return routes


@cache
def _file_routes() -> list[tuple[Pattern[str], Collection[str]]]:
    """The routes whose body is a file: it is as long as --max-bytes allows, and no JSON."""
    return _routes_with([openapi.FILE_BODY, openapi.FILE_OR_JSON_BODY])


def _routes_with(bodies: Sequence[object]) -> list[tuple[Pattern[str], Collection[str]]]:
    return [
        (compile_path(f"/v1{route.path}")[0], route.methods or ())
        for resource in RESOURCES
        for route in resource.router.routes
        if isinstance(route, APIRoute) and any(route.openapi_extra is body for body in bodies)
    ]


def _is_route(scope: Scope) -> bool:
    return _is_among(_methods_by_path(), scope)


def _takes_file(scope: Scope) -> bool:
    return _is_among(_file_routes(), scope) and not (
        _is_among(_file_or_json_routes(), scope) and is_json(Headers(scope=scope).get("content-type", ""))
    )


@cache
def _file_or_json_routes() -> list[tuple[Pattern[str], Collection[str]]]:
    return _routes_with([openapi.FILE_OR_JSON_BODY])


def _is_among(routes: Sequence[tuple[Pattern[str], Collection[str]]], scope: Scope) -> bool:
    return any(scope["method"] in methods and pattern.match(scope["path"]) for pattern, methods in routes)


@singledispatch
def _translated(error: Exception, request: Request) -> PushstepError:
    """The error of the catalogue that stands for what a route, FastAPI or Starlette raised."""
    return named(error, log)


@_translated.register
def _(error: RequestValidationError, request: Request) -> PushstepError:
    untrace(error)
    return InvalidSettings(problem=problems(error.errors()))


@_translated.register
def _(error: HTTPException, request: Request) -> PushstepError:
    untrace(error)
    # such as a body over the limit, which FastAPI passes on in this way
    if isinstance(error.__cause__, PushstepError):
        return named(error.__cause__, log)
    kind = {404: UnknownRoute, 405: MethodNotAllowed}.get(error.status_code)
    if kind is None:
        return InvalidSettings(problem=str(error.detail))
    return kind(method=request.method, path=request.url.path)


def problem_response(error: PushstepError) -> JSONResponse:
    """An error as problem+json, with Retry-After, Content-Range and Accept-Encoding where they apply."""
    wait_s = error.retry_after_s
    headers = {} if wait_s is None else {"Retry-After": str(max(1, round(wait_s)))}
    if isinstance(error, RangeNotSatisfiable):
        headers["Content-Range"] = f"bytes */{error.fields['size']}"
    if isinstance(error, UnsupportedEncoding):
        headers["Accept-Encoding"] = "identity"
    headers |= challenge(error)
    return JSONResponse(to_problem(error), error.http_status, headers, media_type=PROBLEM_TYPE)


class Entrance:
    """Refuses too many requests at once, who has no token for it, bodies over the limit, and other sites' pages.

    It also answers the errors that the application has not answered.
    """

    def __init__(
        self,
        app: ASGIApp,
        allowed_hosts: Collection[str] | None,
        counts: ServerCounts,
        access: RouteAccess,
    ) -> None:
        self._app = app
        self._counts = counts
        self._access = access
        self._allowed_hosts = allowed_hosts
        self._under_way = 0
        self._rate = RequestRate()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        way = self._counts.http
        started = False
        self._under_way += 1
        actor = ACTOR.set(_actor(scope))

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            way.sent_bytes += len(message.get("body", b""))
            await send(message)

        async def counted_receive() -> Message:
            message = await receive()
            way.received_bytes += len(message.get("body", b""))
            return message

        try:
            await self._pass_on(scope, counted_receive, watched_send)
            return
        except asyncio.CancelledError:
            cut = was_cut()
            if cut is None:
                raise
            if started:
                return  # which ends the connection
            refusal: PushstepError = cut
        except Exception as error:
            if started:
                raise
            refusal = named(error, log)
        finally:
            self._under_way -= 1
            ACTOR.reset(actor)
        self._counts.refused(OPERATORS_DOOR, refusal.code)
        await problem_response(refusal)(scope, receive, watched_send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on that may come in; else HostNotAllowed, Busy, MessageTooLarge, and what `admit` raises.

        UnsupportedEncoding for a body that would have to be unpacked.
        """
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        check_host(host, self._allowed_hosts)
        if self._under_way > MOST_REQUESTS and scope["path"] not in ALWAYS_ANSWERED:
            raise Busy(what="requests", waiting=self._under_way - 1, retry_after_s=RETRY_AFTER_S)
        self._access.admit(scope)
        if (caller := CALLER.get()) is not None:
            ACTOR.set(caller.actor)
        if scope["path"] not in ALWAYS_ANSWERED:
            await self._turn(ACTOR.get())
        check_page(scope["method"], scope["headers"], host)
        if scope["method"] not in WITHOUT_BODY and (packed := codings(scope["headers"])) and _is_route(scope):
            raise UnsupportedEncoding(got=packed)
        if not _takes_file(scope):  # the route of a file takes room for it before it reads it
            declared = headers.get(b"content-length", b"0")
            if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
                raise MessageTooLarge(got=int(declared), limit=MAX_BODY_BYTES)
            receive = _limited(receive)
            if _is_route(scope):  # what is at no route is refused unread, whatever it holds
                receive = await _read(scope, receive)
        await self._app(scope, receive, send)

    async def _turn(self, who: str) -> None:
        """Wait for a caller's turn, as none of the requests under way. Busy if too many wait already."""
        wait_s = self._rate.wait_s(who)
        if wait_s is None:
            raise Busy(what="requests of yours", waiting=MOST_WAITING, retry_after_s=RETRY_AFTER_S)
        if wait_s:
            self._under_way -= 1
            try:
                await asyncio.sleep(wait_s)
            finally:
                self._under_way += 1


def _actor(scope: Scope) -> str:
    """Who sends a request, for events, as long as nobody is asked: the address that it comes from."""
    address = (scope.get("client") or ("local",))[0]
    return "local" if address in LOOPBACK else str(address)


async def _read(scope: Scope, receive: Receive) -> Receive:
    """Read the whole body and check it, and return a `receive` that gives it to the application.

    InvalidSettings or InvalidText for a body that is no JSON or has two meanings.
    """
    if scope["method"] in WITHOUT_BODY:
        return receive
    message = await receive()
    parts = [message.get("body", b"")]
    while message.get("more_body"):
        message = await receive()
        parts.append(message.get("body", b""))
    body = b"".join(parts)
    if body.strip():
        await REQUESTS.run_unless(len(body) <= INLINE_MESSAGE_BYTES, read_json, body)
    whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    if message["type"] == "http.disconnect":
        whole = [message]

    async def replay() -> Message:
        return whole.pop() if whole else await receive()

    return replay


def _limited(receive: Callable[[], Awaitable[Any]]) -> Receive:
    seen = 0

    async def receive_limited() -> Message:
        nonlocal seen
        message: Message = await receive()
        seen += len(message.get("body", b""))
        if seen > MAX_BODY_BYTES:
            raise MessageTooLarge(got=seen, limit=MAX_BODY_BYTES)
        return message

    return receive_limited
