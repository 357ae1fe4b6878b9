"""What the routes depend on: the catalogue of models, the model that the path names, copies, downloads, files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, Request
from starlette.requests import ClientDisconnect

from ..imports.incoming_file import IncomingFile
from ..models.catalog import Catalog
from ..models.copies import Copies, ModelCopies
from ..models.events import OPERATOR
from ..models.model import Model
from ..parts.looks import Look
from ..parts.refusals import refuse_route
from ..reports.job_view import JobView
from .answers.downloads import Downloads
from .header_fields import claimed_digest


def _catalog(request: Request) -> Catalog:
    found = request.app.state.catalog
    if not isinstance(found, Catalog):
        raise TypeError("the application has no catalog")
    return found


def _model(request: Request, m: str) -> Model:
    model = _catalog(request).get(m)
    # FastAPI gives the path with the prefix of the router, or without it
    path = f"/v1{request.scope['route'].path.removeprefix('/v1')}"
    refuse_route(model.shard, m, f"{request.method.replace('HEAD', 'GET')} {path}")
    return model


def _view(request: Request) -> JobView:
    view: JobView = request.app.state.view
    return view


def _copies(request: Request) -> ModelCopies:
    copies: ModelCopies = request.app.state.copies
    return copies


def _downloads(request: Request) -> Downloads:
    downloads: Downloads = request.app.state.downloads
    return downloads


async def _edited(request: Request, m: str) -> Model:
    """A model that is about to be changed. JournalFull if its journal could not take the change."""
    model = _model(request, m)
    await model.recorder.require_room()
    return model


ViewHere = Annotated[JobView, Depends(_view)]
CatalogHere = Annotated[Catalog, Depends(_catalog)]
ModelHere = Annotated[Model, Depends(_model)]
EditedModel = Annotated[Model, Depends(_edited)]
Looks = Copies[Look]


def _looks(request: Request) -> Looks:
    looks: Looks = request.app.state.looks
    return looks


LooksHere = Annotated[Looks, Depends(_looks)]
CopiesHere = Annotated[ModelCopies, Depends(_copies)]
DownloadsHere = Annotated[Downloads, Depends(_downloads)]


def declared_bytes(request: Request) -> int | None:
    """The length of a request's body; None if the request does not say it."""
    text = request.headers.get("content-length")
    return None if text is None else int(text)


async def received(request: Request, catalog: Catalog, model: str) -> IncomingFile:
    """Receive a request's body as a file in memory, whose room is taken before it is read. The caller releases it."""
    sha256 = claimed_digest(request.headers.get("repr-digest", ""))
    file = IncomingFile(catalog.staging, declared_bytes(request), catalog.config.max_bytes)
    try:
        await file.receive(f"{model}/{OPERATOR}", _parts(request), sha256)
    except BaseException:
        file.release()
        raise
    return file


async def _parts(request: Request) -> AsyncIterator[bytes]:
    """A body as it comes. It ends early if its sender goes away."""
    try:
        async for part in request.stream():
            yield part
    except ClientDisconnect:
        return
