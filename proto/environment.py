"""Variables of the environment that look like ours and are nothing that we read: most likely misspelt."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Final

PREFIX: Final = "PUSHSTEP_"
# The server's settings; a worker's process reads none, and may run beside a server's. A test holds the two together.
SETTINGS: Final = (
    "grpc",
    "http",
    "unix",
    "no_shared_memory",
    "data",
    "device",
    "insecure",
    "lease_s",
    "stall_s",
    "drain_s",
    "max_models",
    "max_bytes",
    "staging_bytes",
    "read_bytes",
    "max_workers",
    "worker_bytes",
    "max_connections",
    "log_level",
)
# What Kubernetes and Docker's links put into every container beside a service that is called pushstep.
_OF_A_SERVICE: Final = re.compile(r".*(SERVICE_(HOST|PORT)|PORT_\d+_(TCP|UDP|SCTP)).*")


def unknown_variables(environment: Mapping[str, str]) -> Iterable[str]:
    """In words, each variable that begins as ours do and is none of them."""
    for name, value in environment.items():
        ours, ending = name[: len(PREFIX)].upper() == PREFIX, name[len(PREFIX) :].lower()
        if not ours or ending in SETTINGS:
            continue
        if _OF_A_SERVICE.fullmatch(name) or "://" in value:
            continue
        close = difflib.get_close_matches(ending, SETTINGS, 1)
        yield f"{name} in the environment is no setting and is ignored" + (
            f": {PREFIX}{close[0].upper()} is one" if close else ""
        )
