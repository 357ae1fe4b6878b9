"""A worker that is killed at a chosen point of a step through shared memory: `python shared_memory_victim.py ADDRESS`.

Each line on stdin is a model and a point. A child of this process joins, takes one whole step, and dies at that point of
the next one; then the line is echoed. Only children speak gRPC, so forking here is safe and nothing is imported twice.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from pushstep.client import connect
from pushstep.client.shared_memory import region
from pushstep.client.shared_memory.local_socket import LocalSocket
from pushstep.client.worker.cache import ParameterCache
from pushstep.optim.cpu import copies as cpu_copies  # noqa: F401 - each child would import numba

ELEMENTS = 1_000_000
SOON_S = 0.001  # a step takes 3 ms and more
GRADIENT = np.full(ELEMENTS, 0.5, np.float32)


def die(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("survived")


def die_soon() -> None:
    time.sleep(SOON_S)
    die()


def arm(point: str) -> None:
    """Have this process die when it next comes to `point`."""
    exchange = LocalSocket.exchange

    def sent(*args: Any) -> Any:
        threading.Thread(target=die_soon).start()
        return exchange(*args)

    match point:
        case "opened":
            region._fetch = die
        case "handed over":
            region._mapped = die
        case "written":
            LocalSocket.exchange = die  # type: ignore[method-assign]
        case "sent":
            LocalSocket.exchange = sent  # type: ignore[method-assign]
        case "answered":
            region.Region.answer_of = die  # type: ignore[method-assign]
        case "copying out":
            ParameterCache.take = die  # type: ignore[method-assign]


def live_and_die(address: str, model: str, point: str) -> None:
    early = point in ("opened", "handed over")
    if early:
        arm(point)
    session = connect(address, model=model, worker="victim", timeout_s=20, retry_for_s=20, takeover=True)
    session.create({"w": np.zeros(ELEMENTS, np.float32)})
    session.exchange({"w": GRADIENT})
    arm(point)
    session.exchange({"w": GRADIENT})
    time.sleep(5)  # a quick step is over before whoever kills it has woken


def serve(live: Callable[[str, str, str], None]) -> None:
    """Have a child for each line live, and die."""
    for line in sys.stdin:
        model, point = line.rstrip("\n").split(" ", 1)
        child = os.fork()
        if child == 0:
            live(sys.argv[1], model, point)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        print(line.rstrip("\n") if os.WIFSIGNALED(status) else f"ended with {status}", flush=True)


if __name__ == "__main__":
    serve(live_and_die)
