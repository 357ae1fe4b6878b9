"""One process of the real server, from its doors for workers inwards, in the simulation's loop.

What is not real is around it: the loop with its clock and threads (loop.py), gRPC, the disk (disk.py) and the device's
willingness to do small work at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import PushstepError
from pushstep.proto.errors.status import untrace
from pushstep.proto.types_pb2 import Identity, Receipt
from pushstep.proto.wire.hyperparameters import wire_values
from pushstep.server.arenas.arena import Arenas
from pushstep.server.config import Config
from pushstep.server.coordinator.gate import GateSettings
from pushstep.server.devices.device import Device, DeviceStream
from pushstep.server.models import catalog
from pushstep.server.models.catalog import Catalog
from pushstep.server.models.creations import Proposal
from pushstep.server.models.model import Model
from pushstep.server.models.saved_models import SavedModels
from pushstep.server.shared_memory.regions import SharedMemory
from pushstep.server.storage.model_folder import ModelFolder
from pushstep.server.streams.bulk import BulkStream
from pushstep.server.worker_door.servicer import GrpcDoor

from .disk import NOWHERE, Disk, MemoryFolder
from .intent import LAYOUT
from .loop import SimulatedLoop

LEASE_S = 10.0
STALL_S = 10.0
# How long an answer is waited for before the worker is told to ask again.
HOLD_S = 1.0
BODY_BYTES = 200
STAGING_BYTES = 12 * BODY_BYTES
CONFIG = Config(
    data=NOWHERE.parent,
    no_shared_memory=True,
    lease_s=LEASE_S,
    stall_s=STALL_S,
    staging_bytes=STAGING_BYTES,
    read_bytes=16 << 20,
)


@dataclass
class Answer:
    """What goes back to a worker: an error, or a receipt with the version that its exchange brings."""

    error: PushstepError | None = None
    receipt: Receipt | None = None
    version: int = 0


class Busy(Device):
    """A device for which the event loop does no work itself, however small it is."""

    def device_stream(self) -> DeviceStream:
        stream = DeviceStream(self.where)
        stream.takes_small = False
        return stream


class Stream:
    """The messages of one attempt of a push, as gRPC hands them to the server. Its end is what ends its call."""

    def __init__(self, loop: SimulatedLoop, header: bytes) -> None:
        self._loop = loop
        self._messages = deque([header])
        self._comes: asyncio.Future[None] | None = None
        self.call: asyncio.Task[None] | None = None

    def put(self, messages: Iterable[bytes]) -> None:
        """More have come."""
        self._messages.extend(messages)
        if self._comes is not None and not self._comes.done():
            self._comes.set_result(None)

    def break_off(self) -> None:
        """Its worker has gone, or does not wait any more."""
        if self.call is not None:
            self.call.cancel()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> bytes:
        while not self._messages:
            self._comes = self._loop.create_future()
            await self._comes
        return self._messages.popleft()


class MemoryCatalog(Catalog):
    """A catalog on a disk in memory."""

    def __init__(self, config: Config, loop: SimulatedLoop, disk: Disk, device: Device) -> None:
        # to look for what is installed takes as long as the rest of a run
        with patch.object(catalog, "register"):
            super().__init__(config, loop.time)
        self.device = device
        self._folder = MemoryFolder(disk)

    def folder(self, name: str) -> ModelFolder:
        return self._folder


class Server:
    """One process, until it ends or is killed."""

    def __init__(self, loop: SimulatedLoop, disk: Disk, max_workers: int, device: Device) -> None:
        self.loop = loop
        self.disk = disk
        self.catalog = MemoryCatalog(
            CONFIG.model_copy(update={"max_workers": max_workers}), loop, disk, device
        )
        self.door = GrpcDoor(self.catalog, SharedMemory(self.catalog.staging, "", 1), STALL_S)
        # calls that are under way
        self.calls: dict[asyncio.Task[Any], None] = {}
        self.is_over = False

    @property
    def model(self) -> Model:
        """The one model that it serves."""
        return self.catalog.models["m"]

    # Its life.

    async def create(self, gate: GateSettings, begin: Callable[[Model], None]) -> None:
        """Start with nothing; the first worker's model. `begin` is called before anything happens to it."""
        catalog, now_s = self.catalog, self.loop.now_s
        catalog.loaded = catalog.ready = True
        model = catalog.new_model("m", LAYOUT)
        model.coordinator.gate.settings = gate
        begin(model)
        proposal = Proposal(LAYOUT, b"", Arenas.bytes_charged(LAYOUT), BODY_BYTES)
        creation = catalog.begin_creation("m", "creator", proposal, now_s, 0, pb.Process())
        catalog.take_place("m", creation)
        await catalog.finish_creation("m", creation, model)

    async def load(self) -> None:
        """Start with what is on the disk."""
        await SavedModels(self.catalog)._load_model("m")
        self.catalog.loaded = self.catalog.ready = True

    async def stop(self) -> None:
        """End in order, and keep everything."""
        self.catalog.draining = True
        if not await SavedModels(self.catalog).save():
            raise RuntimeError("the model was not saved")
        self.kill()

    def kill(self) -> None:
        """The process ends: nobody hears of it again."""
        self.is_over = True
        self.model.executor.close()
        for call in self.calls:
            call.cancel()

    # Its door.

    def join(
        self,
        name: str,
        takeover: bool,
        epoch: int | None,
        attempt: int,
        reply: Callable[[pb.Membership | PushstepError], None],
    ) -> None:
        """A worker asks to join, with the `epoch` that it had."""
        uid = b"" if epoch is None else self.model.uid
        request = pb.JoinRequest(
            model="m", worker=name, takeover=takeover, model_uid=uid, epoch=epoch or 0, attempt=attempt
        )

        async def join() -> pb.Membership:
            return (await self.door.join(request)).member

        self._call(join, reply)

    def heartbeat(self, identity: Identity) -> None:
        """A sign of life. The worker's next push finds out what is wrong with it."""
        request = pb.HeartbeatRequest(model="m", identity=identity)
        self._call(lambda: self.door.heartbeat(request))

    def leave(self, identity: Identity, lr: float | None = None) -> None:
        """A worker goes, with an lr that no push of its has carried."""
        edits = [] if lr is None else [pb.GroupEdit(group=0, values=wire_values({"lr": lr}))]
        request = pb.LeaveRequest(model="m", identity=identity, edits=edits)
        self._call(lambda: self.door.leave(request))

    def push(self, header: bytes, pulls: bool, reply: Callable[[Answer], None]) -> Stream:
        """One attempt of a push, or of an exchange if it `pulls`."""
        stream = Stream(self.loop, header)
        messages = BulkStream(stream, pb.PushRequest, STALL_S, self.door.budget)

        async def push() -> Answer:
            if not pulls:
                return Answer(None, (await self.door.pushes.push(messages)).receipt)
            _, answer = await self.door.pushes.exchange(messages)
            same = answer.timeline == answer.receipt.identity.timeline
            return Answer(None, answer.receipt, answer.version if same else 0)

        def told(found: Answer | PushstepError) -> None:
            reply(Answer(found) if isinstance(found, PushstepError) else found)

        stream.call = self._call(push, told)
        return stream

    def _call(
        self, work: Callable[[], Coroutine[Any, Any, Any]], reply: Callable[[Any], None] = lambda _: None
    ) -> asyncio.Task[None]:
        async def call() -> None:
            try:
                found = await work()
            except PushstepError as error:
                untrace(error)
                found = error
            if not self.is_over:
                reply(found)

        task = self.loop.create_task(call())
        self.calls[task] = None
        task.add_done_callback(self.calls.pop)
        return task

    # What an operator does.

    def order(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Something that takes time. It may be refused."""
        self._call(work)
