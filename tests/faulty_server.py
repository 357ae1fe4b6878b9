"""A server whose calls to the operating system fail, or end it, as a test says.

    python faulty_server.py CALL PATH DEED [SERVER OPTIONS]

`CALL` is a function of `os`, `PATH` the end of a path: the one that the call is given, or that its descriptor is of. `DEED`
is the name of an errno, with which such calls fail, or `kill`. They do so once the file `armed` lies in the data folder,
or at once if PATH begins with "!".
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pushstep.server.__main__ import main


def _path_of(argument: Any) -> str:
    if isinstance(argument, int):
        try:
            return os.readlink(f"/proc/self/fd/{argument}")
        except OSError:
            return ""
    return os.fspath(argument) if isinstance(argument, (str, os.PathLike)) else ""


def faulty(
    real: Callable[..., Any], path: str, deed: str, is_armed: Callable[[], bool]
) -> Callable[..., Any]:
    """`real`, but for calls that are to fail."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        if any(_path_of(argument).endswith(path) for argument in arguments) and is_armed():
            if deed == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(getattr(errno, deed), os.strerror(getattr(errno, deed)))
        return real(*arguments, **keywords)

    return call


if __name__ == "__main__":
    name, where, what, *options = sys.argv[1:]
    armed = Path(options[options.index("--data") + 1]) / "armed"
    exists = os.path.exists
    setattr(
        os,
        name,
        faulty(getattr(os, name), where.lstrip("!"), what, lambda: where.startswith("!") or exists(armed)),
    )
    sys.argv = ["pushstep-server", *options]
    main()
