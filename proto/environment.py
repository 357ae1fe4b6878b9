"""Environment variables that begin with PUSHSTEP_ and are no setting: they are most likely misspelt."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Final

PREFIX: Final = "PUSHSTEP_"
# The server's settings. A worker's process reads none of them, but may run in a server's environment. A test compares
# them with the server's Config.
SETTINGS: Final = (
    "grpc",
    "http",
    "unix",
    "no_shared_memory",
    "data",
    "device",
    "insecure",
    "tokens_file",
    "tokens",
    "tls_cert",
    "tls_key",
    "tls_client_ca",
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
    "part_bytes",
    "durability",
    "snapshot_every_s",
    "snapshots",
    "snapshots_takeover",
    "webhook_hosts",
    "webhook_networks",
    "webhook_secrets",
    "advertise",
    "link_token_file",
    "link_ca",
    "otel",
    "log_format",
    "log_level",
)
# What a worker's process, and the commands, read.
OF_CLIENTS: Final = ("server", "token", "tls_ca", "tls_client_cert", "tls_client_key")
# Kubernetes and Docker's links set these in every container beside a service that is called pushstep.
_OF_A_SERVICE: Final = re.compile(r".*(SERVICE_(HOST|PORT)|PORT_\d+_(TCP|UDP|SCTP)).*")


def unknown_variables(environment: Mapping[str, str]) -> Iterable[str]:
    """A message for each variable that begins with PUSHSTEP_ and is no setting."""
    for name, value in environment.items():
        ours, ending = name[: len(PREFIX)].upper() == PREFIX, name[len(PREFIX) :].lower()
        if not ours or ending in (*SETTINGS, *OF_CLIENTS):
            continue
        if _OF_A_SERVICE.fullmatch(name) or "://" in value:
            continue
        close = difflib.get_close_matches(ending, (*SETTINGS, *OF_CLIENTS), 1)
        yield f"{name} in the environment is no setting and is ignored" + (
            f": {PREFIX}{close[0].upper()} is one" if close else ""
        )
