"""What `connect` is told, checked before anything is asked of a server."""

from __future__ import annotations

import logging
import os
import re
import socket
from functools import cache
from typing import Any, Final

from pushstep.proto.environment import unknown_variables
from pushstep.proto.errors import InvalidSettings
from pushstep.proto.identifiers import check_name

from .compression import Compression, Wire, push_and_pull

log = logging.getLogger("pushstep.client")

# What gRPC and the system's clocks take for sure.
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
    """What a session would be refused for later. `choices`: the values there are; `seconds`: the least there may be."""
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
    """A name that no other process has: the host's, as far as it makes one, and the pid."""
    host = re.sub(r"[^A-Za-z0-9._-]+", "-", socket.gethostname()).strip("._-")[:80]
    return f"{host or 'worker'}-{os.getpid()}"


@cache
def warn_of_environment() -> None:
    """Say, once in a process, which variables look like settings and are none."""
    for problem in unknown_variables(os.environ):
        log.warning("%s", problem)
