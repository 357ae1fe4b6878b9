"""`python -m pushstep.server.rest_door`: write the description of the REST interface into the file that is committed."""

from __future__ import annotations

from ..catalog import Catalog
from ..config import Config
from .app import create_app
from .openapi import FILE, as_committed

if __name__ == "__main__":
    FILE.write_text(as_committed(create_app(Catalog(Config.read({}, None)), None).openapi()))
