"""torch.distributed.rpc: processes that hold torch's optimizer, called by workers over TensorPipe.

The call takes the gradient and returns the parameters, as torch's own parameter-server tutorial does. The answer is
the parameter itself, not a copy, and the gradient is used where TensorPipe received it: no faster way is known to us.
With several workers a pull may therefore be torn, which is this peer's to keep.

With several servers each holds an even part of the parameter, and a worker calls all at once. Its gradient lies cut already,
one tensor for each server: a view of a larger tensor would travel whole, or as a copy of its own. Nothing makes one step of
what the servers do, and nobody looks whether all have done it.
"""

from __future__ import annotations

import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import rpc

from .driver import Driver, End, Make, end_all
from .peer_local import Rule, optimizer_of, parameter_of
from .side import Side, side_of

TIMEOUT_S = 60.0
FIRST_SERVER = "server"
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
    warnings.simplefilter("ignore")  # torch warns of how its own rpc uses gloo
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
    """Calls the servers and takes over what they return."""

    def __init__(self, key: str, rule: Rule, elements: int, servers: Sequence[str]) -> None:
        self._key = key
        self._servers = servers
        self._parts = torch.zeros(elements).tensor_split(len(servers))
        self._gradients = [torch.randn_like(part) for part in self._parts]
        self._take_over(_create, [(rule, part.numel()) for part in self._parts])

    def _call(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """All servers' answers. `arguments`: of each, behind the key."""
        calls = [
            rpc.rpc_async(server, function, args=(self._key, *own))
            for server, own in zip(self._servers, arguments, strict=True)
        ]
        return [call.wait() for call in calls]

    def _take_over(self, function: Callable[..., Tensor], arguments: Sequence[tuple[Any, ...]]) -> None:
        for part, values in zip(self._parts, self._call(function, arguments), strict=True):
            part.copy_(values)

    def exchange(self) -> None:
        """Push, step, pull."""
        self._take_over(_exchange, [(gradient,) for gradient in self._gradients])

    def push(self) -> None:
        """Push and step."""
        self._call(_push, [(gradient,) for gradient in self._gradients])

    def pull(self) -> None:
        """Pull."""
        self._take_over(_pull, [()] * len(self._servers))

    def close(self) -> None:
        """Have the servers forget the parameter."""
        self._call(_drop, [()] * len(self._servers))


def _workers(key: str, rule: Rule, elements: int, count: int, servers: Sequence[str]) -> Sequence[RpcWorker]:
    return [RpcWorker(key, rule, elements, servers) for _ in range(count)]


class Rpc:
    """Owns processes of servers, and one or two of workers."""

    def __init__(self, variant: str, drivers: int = 1, servers: int = 1) -> None:
        self._variant = variant
        self._folder = tempfile.TemporaryDirectory()
        self._made = 0
        self._servers = [FIRST_SERVER, *(f"server{n}" for n in range(1, servers))]
        names = [*self._servers, *(f"worker{n}" for n in range(drivers))]
        self._drivers = [
            Driver(_join, name, rank, len(names), self._folder.name, variant)
            for rank, name in enumerate(names)
        ]
        for driver in self._drivers:
            driver.answer()

    def side(self, rule: Rule, elements: int, workers: int = 1) -> Side:
        """Workers spread over the processes, all of one parameter."""
        self._made += 1
        servers, drivers = self._processes(workers)
        share = -(-workers // len(drivers))
        in_servers = "" if len(servers) == 1 else f", {len(servers)} servers"
        return side_of(
            f"rpc {self._variant}{in_servers}",
            _workers,
            drivers,
            [(f"{self._made}", rule, elements, share, self._servers)] * len(drivers),
            servers=[server.pid for server in servers],
        )

    def of(self, make: Make, workers: int, *arguments: object) -> Side:
        """Workers of another load, which call the first server: `make(key, first, count, *arguments)` makes a process's."""
        self._made += 1
        servers, drivers = self._processes(workers)
        share = -(-workers // len(drivers))
        own = [(f"of{self._made}", number * share, share, *arguments) for number in range(len(drivers))]
        return side_of(f"rpc {self._variant}", make, drivers, own, servers=[server.pid for server in servers])

    def _processes(self, workers: int) -> tuple[list[Driver], list[Driver]]:
        """Those of the servers, and as many of the workers' as are needed."""
        servers = len(self._servers)
        return self._drivers[:servers], self._drivers[servers : servers + workers]

    def close(self) -> None:
        """End the processes together, as rpc.shutdown wants it."""
        end_all(self._drivers)
        self._folder.cleanup()
