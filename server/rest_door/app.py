"""The application: routers, the one error shape, and the limits on what is let in."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection
from importlib.metadata import version as installed_version
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pushstep.proto.errors import (
    HostNotAllowed,
    InvalidSettings,
    MessageTooLarge,
    MethodNotAllowed,
    PushstepError,
    UnknownRoute,
)
from pushstep.proto.status import named, to_problem

from ..catalog import Catalog
from ..export import Exports
from . import (
    events,
    export,
    health,
    hooks,
    models,
    param_groups,
    parameters,
    policy,
    root,
    snapshots,
    workers,
)

log = logging.getLogger("pushstep.rest")
MAX_BODY_BYTES: Final = 1 << 20
PROBLEM: Final = "application/problem+json"


def create_app(catalog: Catalog, allowed_hosts: Collection[str] | None, grpc_address: str = "") -> FastAPI:
    """The REST interface over `catalog`. `allowed_hosts` None answers whatever Host is sent."""
    app = FastAPI(
        title="pushstep",
        version=installed_version("pushstep"),
        description="Look at and steer the models of a pushstep server.",
        # FastAPI's pages load their scripts from elsewhere, onto the origin of what steers the models
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # or a wrong path would be answered in another shape
    )
    app.state.catalog = catalog
    app.state.grpc_address = grpc_address
    app.state.exports = Exports()
    app.include_router(health.router)
    resources = (root, models, param_groups, parameters, hooks, policy, workers, snapshots, export, events)
    for resource in resources:
        app.include_router(resource.router, prefix="/v1")
    app.add_exception_handler(PushstepError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_middleware(Entrance, allowed_hosts=allowed_hosts)
    return app


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    return problem_response(_translated(request, error))


def _translated(request: Request, error: Exception) -> PushstepError:
    if isinstance(error, RequestValidationError):
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        return InvalidSettings(problem="; ".join(problems))
    if isinstance(error, HTTPException):
        if isinstance(error.__cause__, PushstepError):  # a body over the limit, as FastAPI passes it on
            return error.__cause__
        kind = {404: UnknownRoute, 405: MethodNotAllowed}.get(error.status_code)
        if kind is None:
            return InvalidSettings(problem=str(error.detail))
        return kind(method=request.method, path=request.url.path)
    return named(error, log)


def problem_response(error: PushstepError) -> JSONResponse:
    """An error in the one shape that this door has."""
    wait_s = error.retry_after_s
    headers = {} if wait_s is None else {"Retry-After": str(max(1, round(wait_s)))}
    return JSONResponse(to_problem(error), error.http_status, headers, media_type=PROBLEM)


class Entrance:
    """Turns away bodies over the limit and foreign Host headers, and names errors that nobody else has.

    A page in an operator's browser can be made to send requests to this address, under another host name or its own;
    without the checks of Host and Origin it could steer the server.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Collection[str] | None) -> None:
        self._app = app
        self._allowed_hosts = allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            headers = dict(scope["headers"])
            host = headers.get(b"host", b"").decode("latin-1")
            self._check_host(host)
            origin = headers.get(b"origin")
            if origin is not None and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                self._check_origin(origin.decode("latin-1"), host)
            declared = headers.get(b"content-length", b"0")
            if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
                raise MessageTooLarge(got=int(declared), limit=MAX_BODY_BYTES)
            await self._app(scope, _limited(receive), watched_send)
        except Exception as error:
            if started:
                raise
            await problem_response(named(error, log))(scope, receive, send)

    def _check_host(self, host: str) -> None:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self._allowed_hosts is not None and name.strip("[]").lower() not in self._allowed_hosts:
            raise HostNotAllowed(host=host[:200])

    def _check_origin(self, origin: str, host: str) -> None:
        """A browser says where a page came from that changes something; programs send no Origin."""
        came_from = origin.partition("://")[2]
        if came_from.lower() != host.lower():
            raise HostNotAllowed(host=origin[:200])


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
