"""One server process after the other, each with what the last one left on the disk, and what the witness sees of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from pushstep.proto.errors import PushstepError, UnknownWorker
from pushstep.proto.training_pb2 import Membership, PushHeader, PushRequest
from pushstep.proto.types_pb2 import Identity
from pushstep.server.coordinator.gate import GateSettings
from pushstep.server.coordinator.gate import read as read_gate
from pushstep.server.coordinator.groups import OperatorEdit
from pushstep.server.coordinator.policies.policy import PolicySettings
from pushstep.server.devices.device import Device
from pushstep.server.models.edits import Edits
from pushstep.server.models.model import Model

from .disk import Disk
from .intent import Intent
from .loop import SimulatedLoop
from .server import Answer, Server, Stream
from .watch import watch
from .witness import Witness

OPERATOR = "operator"


class House:
    """The server as its workers and operators know it."""

    def __init__(
        self, loop: SimulatedLoop, max_workers: int, settings: dict[str, Any], device: Device
    ) -> None:
        self.loop = loop
        self.max_workers = max_workers
        self.device = device
        self.witness = Witness(loop)
        self.server = Server(loop, Disk(), max_workers, device)
        gate = read_gate(settings, GateSettings())
        loop.complete(self.server.create(gate, lambda model: watch(self.server, model, self.witness)))

    @property
    def model(self) -> Model:
        """The model of the process that runs."""
        return self.server.model

    @property
    def timeline(self) -> int:
        """That of the model."""
        return self.model.timeline

    def stop_and_start(self, *, orderly: bool) -> None:
        """Another process: with everything, or with what the last snapshot held, on a new timeline."""
        if orderly:
            self.loop.complete(self.server.stop())
        else:
            self.server.kill()
            self.witness.fenced.clear()  # what it held of that may be lost
        disk = self.server.disk.left()
        self.server = Server(self.loop, disk, self.max_workers, self.device)
        self.loop.complete(self.server.load())
        loaded = [event["snapshot"] for event in self.model.events if event["kind"] == "loaded"]
        self.witness.goes_back(disk.books[loaded[-1]], self.timeline)
        watch(self.server, self.model, self.witness)

    # What comes from workers.

    def join(
        self,
        name: str,
        takeover: bool,
        epoch: int | None,
        attempt: int,
        reply: Callable[[Membership | PushstepError], None],
    ) -> None:
        """A worker asks to join, with the `epoch` that it had."""
        self.witness.heard(name)
        self.server.join(name, takeover, epoch, attempt, reply)

    def heartbeat(self, identity: Identity) -> None:
        """A sign of life."""
        self.witness.heard(identity.worker)
        self.server.heartbeat(identity)

    def push(self, header: PushHeader, pulls: bool, reply: Callable[[Answer], None]) -> Stream:
        """A push's header."""
        self.witness.heard(header.identity.worker)

        def told(answer: Answer) -> None:
            if answer.receipt is not None and answer.version:
                self.witness.exchanged(answer.receipt, answer.version)
            reply(answer)

        return self.server.push(PushRequest(header=header).SerializeToString(), pulls, told)

    def body(self, name: str, stream: Stream, intent: Intent) -> None:
        """The rest of it."""
        self.witness.heard(name)
        stream.put(intent.body())

    # What its machine does.

    def fail_step(self) -> None:
        """The next step that is taken finds no memory, before it has written anything."""
        arenas = self.model.arenas

        def planned(*_: Any) -> Any:
            del arenas._planned
            raise MemoryError("none for a simulated step")

        arenas._planned = planned

    # What an operator does.

    def take_snapshot(self) -> None:
        """Behind everything that has been decided."""
        catalog = self.server.catalog
        self.server.order(lambda: catalog.snapshot("m", OPERATOR, automatic=True))

    def restore(self) -> None:
        """Bring the last snapshot back on a new timeline while workers are at work."""
        catalog, newest = self.server.catalog, self.server.disk.newest
        self.server.order(lambda: catalog.restore("m", newest, OPERATOR))

    def switch(self, settings: PolicySettings) -> None:
        """Another policy, or other settings of this one."""
        self.loop.within(lambda: Edits(self.model).set_policy(settings, OPERATOR))

    def patch(self, lr: float, *, hold: bool) -> None:
        """An operator's lr, held against the workers' schedulers or not."""
        self.loop.within(lambda: Edits(self.model).patch_group(0, OperatorEdit({"lr": lr}, hold), OPERATOR))
        self.witness.patched(lr, held=hold)

    def evict(self, name: str) -> None:
        """Fence a worker, if it is known."""
        worker = self.model.sessions.workers.get(name)
        if worker is not None:
            self.witness.evicted.add((self.timeline, name, worker.epoch))
            self.witness.fenced.add((name, worker.epoch))
            self.loop.within(lambda: Edits(self.model).evict(name, OPERATOR))

    def release(self, name: str) -> None:
        """Let a worker out of quarantine. It may not have come yet, or was forgotten."""
        with contextlib.suppress(UnknownWorker):
            self.loop.within(lambda: Edits(self.model).release(name, OPERATOR))
