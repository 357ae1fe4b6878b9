"""torch.distributed.rpc: a process that holds torch's optimizer, called by workers over TensorPipe.

The call takes the gradient and returns the parameters, as torch's own parameter-server tutorial does. The answer is
the parameter itself, not a copy, and the gradient is used where TensorPipe received it: no faster way is known to us.
With several workers a pull may therefore be torn, which is this peer's to keep.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import rpc

from .driver import Driver, End, Make, end_all
from .peer_local import Rule, optimizer_of, parameter_of
from .side import Side, side_of

TIMEOUT_S = 60.0
# Transport and channels as TensorPipe names them; None: what it chooses by itself.
VARIANTS: dict[str, tuple[list[str] | None, list[str] | None]] = {
    "default": (None, None),
    "uv": (["uv"], ["basic"]),
    "uv mpt": (["uv"], ["mpt_uv"]),
    "shm": (["shm"], ["basic"]),
    "shm cma": (["shm"], ["cma"]),
}
_held: dict[str, tuple[torch.optim.Optimizer, torch.nn.Parameter, threading.Lock]] = {}


def _create(key: str, rule: Rule, elements: int) -> Tensor:
    if key not in _held:
        parameter = parameter_of(elements)
        _held[key] = optimizer_of(rule, parameter), parameter, threading.Lock()
    return _held[key][1].detach()


def _drop(key: str) -> None:
    _held.pop(key, None)


def _push(key: str, gradient: Tensor) -> None:
    optimizer, parameter, lock = _held[key]
    with lock:
        parameter.grad = gradient
        optimizer.step()


def _exchange(key: str, gradient: Tensor) -> Tensor:
    _push(key, gradient)
    return _held[key][1].detach()


def _pull(key: str) -> Tensor:
    return _held[key][1].detach()


def _join(name: str, rank: int, world: int, folder: str, variant: str) -> End:
    os.environ["TP_SOCKET_IFNAME"] = "lo"
    transports, channels = VARIANTS[variant]
    chosen: dict[str, Any] = {"_transports": transports, "_channels": channels}
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"file://{folder}/rendezvous",
        rpc_timeout=TIMEOUT_S,
        **{key: value for key, value in chosen.items() if value is not None},
    )
    rpc.init_rpc(name, rank=rank, world_size=world, rpc_backend_options=options)
    return rpc.shutdown


class RpcWorker:
    """Calls the server and takes over what it returns."""

    def __init__(self, key: str, rule: Rule, elements: int) -> None:
        self._key = key
        self._gradient = torch.randn(elements)
        self._parameter = torch.zeros(elements)
        self._parameter.copy_(rpc.rpc_sync("server", _create, args=(key, rule, elements)))

    def exchange(self) -> None:
        """Push, step, pull."""
        self._parameter.copy_(rpc.rpc_sync("server", _exchange, args=(self._key, self._gradient)))

    def push(self) -> None:
        """Push and step."""
        rpc.rpc_sync("server", _push, args=(self._key, self._gradient))

    def pull(self) -> None:
        """Pull."""
        self._parameter.copy_(rpc.rpc_sync("server", _pull, args=(self._key,)))

    def close(self) -> None:
        """Have the server forget the parameter."""
        rpc.rpc_sync("server", _drop, args=(self._key,))


def _workers(key: str, rule: Rule, elements: int, count: int) -> Sequence[RpcWorker]:
    return [RpcWorker(key, rule, elements) for _ in range(count)]


class Rpc:
    """Owns a server process and one or two processes of workers."""

    def __init__(self, variant: str, drivers: int = 1) -> None:
        self._variant = variant
        self._folder = tempfile.TemporaryDirectory()
        self._made = 0
        names = ["server", *(f"worker{n}" for n in range(drivers))]
        self._drivers = [
            Driver(_join, name, rank, len(names), self._folder.name, variant)
            for rank, name in enumerate(names)
        ]
        for driver in self._drivers:
            driver.answer()

    def side(self, rule: Rule, elements: int, workers: int = 1) -> Side:
        """Workers spread over the processes, all of one parameter."""
        self._made += 1
        server, *drivers = self._drivers[: 1 + workers]
        share = -(-workers // len(drivers))
        return side_of(
            f"rpc {self._variant}",
            _workers,
            drivers,
            [(f"{self._made}", rule, elements, share)] * len(drivers),
            servers=[server.pid],
        )

    def of(self, make: Make, workers: int, *arguments: object) -> Side:
        """Workers of another load: `make(key, first, count, *arguments)` makes those of a process."""
        self._made += 1
        server, *drivers = self._drivers[: 1 + workers]
        share = -(-workers // len(drivers))
        own = [(f"of{self._made}", number * share, share, *arguments) for number in range(len(drivers))]
        return side_of(f"rpc {self._variant}", make, drivers, own, servers=[server.pid])

    def close(self) -> None:
        """End the processes together, as rpc.shutdown wants it."""
        end_all(self._drivers)
        self._folder.cleanup()
