"""`python -m pushstep.server.operator_door`: write the OpenAPI description, the committed `openapi.json`."""

from __future__ import annotations

from ..config import Config
from ..models.catalog import Catalog
from .app import create_app
from .openapi import FILE, as_committed

if __name__ == "__main__":
    FILE.write_text(as_committed(create_app(Catalog(Config.read({}, None)), None).openapi()))
