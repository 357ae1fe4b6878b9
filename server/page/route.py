"""GET /ui and the files below it. They say nothing about the server, so they need no token: the page asks for one.

A browser may run only scripts of this server, and send requests to nothing else. Whatever a name or an event holds, no
script of it can run, and none of it can leave.
"""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import RedirectResponse

from pushstep.proto.errors import UnknownRoute

from .served_files import INDEX, assets

router = APIRouter(tags=["page"], include_in_schema=False)
PATH: Final = "/ui"
_POLICY: Final = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # asked for again at each visit, and answered with 304: after an update no browser shows the page of before
    "Cache-Control": "no-cache",
}
IfNoneMatch = Annotated[str, Header(max_length=1000)]


@router.get(PATH, summary="The page", response_class=Response)
async def show_page(if_none_match: IfNoneMatch = "") -> Response:
    """The page of operators, for a browser."""
    return _answer(INDEX, if_none_match)


@router.get(PATH + "/{asset:path}", summary="A file of the page", response_class=Response)
async def show_asset(request: Request, asset: str, if_none_match: IfNoneMatch = "") -> Response:
    """A script, a style or an icon."""
    if not asset:  # its files are found relative to /ui
        return RedirectResponse("../ui", headers=HEADERS)
    if asset not in assets():
        raise UnknownRoute(method=request.method, path=request.url.path)
    return _answer(asset, if_none_match)


def _answer(name: str, if_none_match: str) -> Response:
    asset = assets()[name]
    headers = {**HEADERS, "ETag": asset.etag}
    if asset.etag in if_none_match:
        return Response(status_code=304, headers=headers)
    return Response(asset.content, headers=headers, media_type=asset.media_type)
