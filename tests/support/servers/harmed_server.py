"""A server of which parts fail, as a test says: `python harmed_server.py PARTS [SERVER OPTIONS]`.

`PARTS` are names of methods below a Service, joined by "+". Each fails from the moment when the file `armed` lies in the data
folder.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from pushstep.server import __main__ as command
from pushstep.server.service import Service

_parts = sys.argv.pop(1).split("+")
_armed = Path(sys.argv[sys.argv.index("--data") + 1]) / "armed"


class HarmedService(Service):
    """The service, whose parts are harmed once it serves."""

    async def _serve(self) -> None:
        for name in _parts:
            *path, last = name.split(".")
            owner: Any = self
            for step in path:
                owner = getattr(owner, step)
            setattr(owner, last, _harmed(getattr(owner, last)))
        await super()._serve()


def _harmed(real: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def call(*arguments: Any, **keywords: Any) -> Any:
        if _armed.exists():
            raise RuntimeError("harmed")
        return await real(*arguments, **keywords)

    return call


if __name__ == "__main__":
    command.Service = HarmedService
    command.main()
