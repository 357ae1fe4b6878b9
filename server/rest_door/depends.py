"""What routes ask for: the catalogue of models, the model that the path names, the exports."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import Depends, Request

from ..catalog import Catalog
from ..export import Exports
from ..model import Model

# Who is named in audit events for what comes through this door.
OPERATOR: Final = "operator"


def _catalog(request: Request) -> Catalog:
    found = request.app.state.catalog
    if not isinstance(found, Catalog):
        raise TypeError("the application has no catalog")
    return found


def _model(request: Request, m: str) -> Model:
    return _catalog(request).get(m)


def _exports(request: Request) -> Exports:
    found = request.app.state.exports
    if not isinstance(found, Exports):
        raise TypeError("the application has no exports")
    return found


CatalogHere = Annotated[Catalog, Depends(_catalog)]
ModelHere = Annotated[Model, Depends(_model)]
ExportsHere = Annotated[Exports, Depends(_exports)]
