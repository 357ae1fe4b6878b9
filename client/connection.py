"""`connect`: checks its options, finds the server and returns a session with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from .gradients.compression import Wire
from .options import MIN_TIMEOUT_S, check_options, default_worker, warn_of_environment
from .session import Session
from .shards.transport import ShardedTransport
from .transport.address import is_same_host
from .transport.dial import dial
from .transport.security import TLS, Security
from .transport.shield import shield
from .worker.options import WorkerOptions


@shield
def connect(
    address: str,
    *,
    model: str,
    worker: str | None = None,
    wire: Wire = None,
    top_k: float | None = None,
    timeout_s: float = 30.0,
    retry_for_s: float = 300.0,
    wait_s: float = 0.0,
    shared_memory: bool = True,
    takeover: bool = False,
    on_reject: Literal["raise", "skip"] = "raise",
    on_restore: Literal["continue", "raise"] = "continue",
    token: str | None = None,
    tls: TLS | bool | None = None,
    insecure: bool = False,
) -> Session:
    """Return a session with the server at "HOST:PORT" or "unix:/path".

    `wire`: the dtype of pushes and pulls, its name, or a pair (pushes, pulls); None: each parameter's own dtype.
    "int8" is for pushes only; pulls are then bfloat16. `top_k`: the fraction of each dense gradient's elements to push,
    the largest ones. What int8 or top_k leaves out of a push is added to the next gradient. `timeout_s`: how long an
    attempt may stand still. `retry_for_s`: how long a silent server is asked again; time in which bytes move does not
    count. `wait_s`: how long to wait for a server that has not started yet. Memory is shared with a server on this host, or
    on this GPU, unless `shared_memory` is False. `on_reject="skip"` warns where a rejected push would raise. `token`, `tls`,
    `insecure`: see `Security`. Raises ServerUnavailable, TlsFailed, TokenNotSent, and the errors of `check_options`.
    """
    name = worker if worker is not None else default_worker()
    check_options(
        model,
        name,
        wire,
        top_k,
        choices={
            "on_reject": (on_reject, ("raise", "skip")),
            "on_restore": (on_restore, ("continue", "raise")),
        },
        seconds={
            "timeout_s": (timeout_s, MIN_TIMEOUT_S),
            "retry_for_s": (retry_for_s, 0.0),
            "wait_s": (wait_s, 0.0),
        },
    )
    warn_of_environment()
    options = WorkerOptions(
        model, name, wire, top_k, retry_for_s, takeover, on_reject, on_restore, shared_memory
    )
    return session_at(address, Security(address, token, tls, insecure), options, timeout_s, wait_s)


def session_at(
    address: str, security: Security, options: WorkerOptions, timeout_s: float = 30.0, wait_s: float = 0.0
) -> Session:
    """A session with the server at an address, with options that were checked. Raises what `dial` raises."""
    transport, found = dial(ShardedTransport, address, timeout_s, wait_s, security)
    transport.joined_chunks = found.joined_chunks
    try:
        shares = options.shared_memory and bool(found.memory_path) and is_same_host(address)
        return Session(transport, replace(options, shared_memory=shares))
    except BaseException:
        transport.close()
        raise
