"""The options of `connect`, checked before any request to a server."""

from __future__ import annotations

import logging
import os
import re
import socket
from functools import cache
from typing import Any, Final

from pushstep.proto.environment import unknown_variables
from pushstep.proto.errors import InvalidSettings
from pushstep.proto.wire.names import check_name

from .gradients.compression import Compression, Wire, push_and_pull

log = logging.getLogger("pushstep.client")

# Limits that gRPC and the system's clocks accept.
MIN_TIMEOUT_S: Final = 1e-3
MAX_S: Final = 1e7


def check_options(
    model: str,
    worker: str,
    wire: Wire,
    top_k: float | None,
    *,
    choices: dict[str, tuple[Any, tuple[str, ...]]],
    seconds: dict[str, tuple[Any, float]],
) -> None:
    """Check the options now that would otherwise fail later in the session.

    `choices`: by option, its value and the values that it may have. `seconds`: by option, its value and the least that it
    may be. Raises InvalidName, InvalidSettings or WrongDtype.
    """
    check_name(model, "model name")
    check_name(worker, "worker name")
    Compression(push_and_pull(wire)[0], top_k)
    for option, (value, known) in choices.items():
        if value not in known:
            raise InvalidSettings(problem=f"{option}={value!r}: use {' or '.join(map(repr, known))}")
    for option, (value, least) in seconds.items():
        if not isinstance(value, (int, float)) or not least <= value <= MAX_S:
            raise InvalidSettings(problem=f"{option}={value!r}: use seconds, from {least:g} to {MAX_S:g}")


def default_worker() -> str:
    """A worker name that no other process has: the host's name, reduced to allowed characters, and the pid."""
    host = re.sub(r"[^A-Za-z0-9._-]+", "-", socket.gethostname()).strip("._-")[:80]
    return f"{host or 'worker'}-{os.getpid()}"


@cache
def warn_of_environment() -> None:
    """Log, once per process, the environment variables that look like settings and are none."""
    for problem in unknown_variables(os.environ):
        log.warning("%s", problem)
