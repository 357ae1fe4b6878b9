"""This service as its users meet it: a `pushstep-server` process, and workers whose optimizer is attached to it.

One server holds a model for each case, so that no case shares frames or memory with another. A case is a transport
(TCP frames, Unix frames, shared memory) and a wire dtype; int8 is of pushes, whose pulls are bfloat16.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from pushstep.client import connect
from pushstep.server.config import PART_BYTES
from tests.support.ranks.group import RankGroup
from tests.support.servers.harness import start_server

from . import training_side
from .driver import Driver, Make, end_all
from .peer_local import Rule, parameter_of
from .side import Side, side_of

REST_S = 0.5
# a server that has gone ends the benchmark
RETRY_FOR_S = 30.0
WIRES: dict[str, Any] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": ("int8", torch.bfloat16),
}


@dataclass(frozen=True)
class Case:
    """How a worker talks to the server."""

    transport: str  # tcp, unix or shm
    wire: str = "float32"

    @property
    def name(self) -> str:
        return f"pushstep {self.transport} {self.wire}"


CASES = [Case(transport, wire) for transport in ("tcp", "unix") for wire in WIRES] + [Case("shm")]


class PushstepWorker:
    """A session with an attached optimizer of one parameter."""

    def __init__(self, address: str, case: Case, model: str, worker: str, rule: Rule, elements: int) -> None:
        warnings.simplefilter("ignore")
        self._session = connect(
            address,
            model=model,
            worker=worker,
            wire=WIRES[case.wire],
            shared_memory=case.transport == "shm",
            retry_for_s=RETRY_FOR_S,
        )
        parameter = parameter_of(elements)
        kind = {"adadelta": torch.optim.Adadelta, "adagrad": torch.optim.Adagrad}[rule]
        self._optimizer = self._session.attach(kind([parameter]), names=["weight"])
        self._grads = {"weight": parameter.grad}

    def exchange(self) -> None:
        """`optimizer.step()`: push, step, pull."""
        self._optimizer.step()

    def push(self) -> None:
        """Push and step."""
        self._session.push(self._grads)

    def pull(self) -> None:
        """Get every parameter's bytes, though nothing is new."""
        self._session._worker.pull_message(None)

    def pull_sometimes(self) -> None:
        """Pull, and rest."""
        self.pull()
        time.sleep(REST_S)

    def close(self) -> None:
        """Leave."""
        self._session.close()


def _workers(
    address: str, case: Case, model: str, first: int, count: int, rule: Rule, elements: int
) -> Sequence[PushstepWorker]:
    return [
        PushstepWorker(address, case, model, f"w{first + number}", rule, elements) for number in range(count)
    ]


class Pushstep:
    """Owns a server, alone or in several ranks, and one or two processes of workers."""

    def __init__(
        self, drivers: int = 1, device: str = "cpu", ranks: int = 1, part_bytes: int = PART_BYTES
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._drivers = [Driver() for _ in range(drivers)]
        data = Path(self._folder.name) / "data"
        options = ("--log-level", "warning", "--device", device)
        parts = ("--part-bytes", str(part_bytes))
        self._group = RankGroup(data, ranks, *options, *parts) if ranks > 1 else None
        servers = [start_server(data, *options)] if self._group is None else self._group.ranks
        self._server = servers[0]
        self._pids = [server.process.pid for server in servers]
        self._in_ranks = "" if ranks == 1 else f", {ranks} ranks"
        self._models = itertools.count()
        for driver in self._drivers:
            driver.answer()

    def side(
        self, case: Case, rule: Rule, elements: int, workers: int = 1, *, in_rounds: bool = False
    ) -> Side:
        """Workers spread over the processes, all of one new model, which is deleted with the side.

        `in_rounds`: one step per round of a push from every worker (the sync policy), not one per push.
        """
        model = f"m{next(self._models)}"
        address = self._server.grpc if case.transport == "tcp" else f"unix:{self._server.unix}"
        drivers = self._drivers[:workers]
        share = -(-workers // len(drivers))
        side = Side(
            case.name + self._in_ranks,
            [],
            self._pids,
            address,
            model,
            lambda what, settings: self._patch(model, what, settings),
            lambda: self._delete(model),
        )
        for number, driver in enumerate(drivers):  # one after the other: the first creates the model
            made = side_of(
                "", _workers, [driver], [(address, case, model, number * share, share, rule, elements)]
            )
            side.crews = [*side.crews, *made.crews]
        if in_rounds:
            side.name += ", sync"
            self._patch(model, "policy", {"policy": "sync", "min_workers": workers})
        return side

    def of(self, name: str, make: Make, transport: str, workers: int, *arguments: object) -> Side:
        """Workers of another load: `make(address, model, first, count, *arguments)` makes those of a process."""
        model = f"m{next(self._models)}"
        address = self._server.grpc if transport == "tcp" else f"unix:{self._server.unix}"
        drivers = self._drivers[:workers]
        share = -(-workers // len(drivers))
        side = Side(
            name, [], [self._server.process.pid], address, model, on_close=lambda: self._delete(model)
        )
        for number, driver in enumerate(drivers):  # one after the other: the first creates the model
            made = side_of("", make, [driver], [(address, model, number * share, share, *arguments)])
            side.crews = [*side.crews, *made.crews]
        return side

    def training(self, how: training_side.How, elements: int) -> Side:
        """One worker that trains over TCP, of a new model."""
        model = f"m{next(self._models)}"
        made = side_of(
            f"pushstep tcp {how.name}",
            training_side.remote,
            self._drivers[:1],
            [(self._server.grpc, how, model, elements)],
        )
        made.servers, made.on_close = [self._server.process.pid], lambda: self._delete(model)
        return made

    def _patch(self, model: str, what: str, settings: dict[str, object]) -> None:
        self._server.rest("PATCH", f"/v1/models/{model}/{what}", json=settings).raise_for_status()

    def _delete(self, model: str) -> None:
        with contextlib.suppress(
            httpx.TransportError
        ):  # of a server that is gone: whatever ended it was raised
            self._server.rest("DELETE", f"/v1/models/{model}").raise_for_status()

    def close(self) -> None:
        """End the workers' processes, then the server."""
        end_all(self._drivers)
        if self._group is None:
            self._server.stop()
        else:
            self._group.stop()
        self._folder.cleanup()
