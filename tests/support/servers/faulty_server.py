"""A server whose calls to the operating system fail, or end it, as a test says.

    python faulty_server.py CALLS DEED [SERVER OPTIONS]

`CALLS` are joined by "+", each "name:path": a function of `os`, and the end of a path, as a pattern of fnmatch: of one that
the call is given, or that its descriptor is of. `DEED` is the name of an errno, with which such calls fail, or `kill`, or
`stop`, which has the server told to stop in the middle of the call; `kill-after` lets the call end first, and `kill-half` has it
write half of its bytes; `full` has `statvfs` find no room; `wait` has it wait while `armed` is there. They do so once the file `armed` lies in the data folder, or at once if the path begins with "!".
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pushstep.server.__main__ import main

# how long between two looks at whether a call may go on
WAIT_S = 0.01
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGTERM}


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
    """`real`, but for calls of which the path is one of them."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        if any(fnmatchcase(_path_of(argument), f"*{path}") for argument in arguments) and is_armed():
            if deed == "full":
                found = list(real(*arguments, **keywords))
                found[3] = found[4] = 0  # f_bfree and f_bavail
                return os.statvfs_result(found)
            while deed == "wait" and is_armed():
                time.sleep(WAIT_S)
            if deed == "wait":
                return real(*arguments, **keywords)
            if deed == "kill-half":
                descriptor, parts, at = arguments
                whole = b"".join(bytes(part) for part in parts)
                real(descriptor, [whole[: len(whole) // 2]], at)
            if deed == "kill-after":
                real(*arguments, **keywords)
            if deed.startswith("kill-"):
                os.kill(os.getpid(), signal.SIGKILL)
            if deed not in SIGNALS:
                number = getattr(errno, deed)
                raise OSError(number, os.strerror(number))
            os.kill(os.getpid(), SIGNALS[deed])
        return real(*arguments, **keywords)

    return call


def armed_by(data: Path) -> Callable[[], bool]:
    """Whether `armed` lies in a data folder."""
    armed, exists = data / "armed", os.path.exists
    return lambda: exists(armed)


def break_calls(calls: str, deed: str, is_armed: Callable[[], bool]) -> None:
    """Have this process's calls fail, or end it."""
    for each in calls.split("+"):
        name, _, where = each.partition(":")
        now = (lambda: True) if where.startswith("!") else is_armed
        setattr(os, name, faulty(getattr(os, name), where.lstrip("!"), deed, now))


if __name__ == "__main__":
    calls, what, *options = sys.argv[1:]
    break_calls(calls, what, armed_by(Path(options[options.index("--data") + 1])))
    sys.argv = ["pushstep-server", *options]
    main()
