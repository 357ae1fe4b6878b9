"""What the routes depend on: the catalogue of models, the model that the path names, copies and downloads."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import Depends, Request
from torch import Tensor

from ..models.catalog import Catalog
from ..models.copies import Copies, ModelCopies
from ..models.model import Model
from .downloads import Downloads

# The author of changes through this door, in audit events.
OPERATOR: Final = "operator"


def _catalog(request: Request) -> Catalog:
    found = request.app.state.catalog
    if not isinstance(found, Catalog):
        raise TypeError("the application has no catalog")
    return found


def _model(request: Request, m: str) -> Model:
    return _catalog(request).get(m)


def _copies(request: Request) -> ModelCopies:
    copies: ModelCopies = request.app.state.copies
    return copies


def _downloads(request: Request) -> Downloads:
    downloads: Downloads = request.app.state.downloads
    return downloads


CatalogHere = Annotated[Catalog, Depends(_catalog)]
ModelHere = Annotated[Model, Depends(_model)]
Looks = Copies[tuple[dict[str, int], dict[str, Tensor]]]


def _looks(request: Request) -> Looks:
    looks: Looks = request.app.state.looks
    return looks


LooksHere = Annotated[Looks, Depends(_looks)]
CopiesHere = Annotated[ModelCopies, Depends(_copies)]
DownloadsHere = Annotated[Downloads, Depends(_downloads)]
