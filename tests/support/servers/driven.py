"""One model of a server in this process, pushed to without a wire: for faults that no worker can cause."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pushstep.proto.training_pb2 import GroupEdit, PushCommit, PushHeader, PushRequest
from pushstep.proto.types_pb2 import Identity, Receipt, Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.frames import Piece, pack, unpack
from pushstep.proto.wire.layout import Slot
from pushstep.server.coordinator.groups import Group, ParamGroups
from pushstep.server.coordinator.sessions import Sessions
from pushstep.server.devices.device import Device
from pushstep.server.journal.durability import DurabilitySettings
from pushstep.server.journal.sync import JournalSync
from pushstep.server.models.model import Model
from pushstep.server.requests.push import answer, hand_in
from pushstep.server.requests.push_call import PushCall
from pushstep.server.requests.receiving import admit
from pushstep.server.staging.budget import Budget
from pushstep.server.staging.read_budget import ReadBudget
from tests.support.servers.judged import LAYOUT, UID

Gradients = Mapping[str, Tensor | tuple[Tensor, Tensor]]


def made() -> Model:
    """A model of `judged.LAYOUT`."""
    groups = ParamGroups(Group.make(group) for group in LAYOUT.manifest.groups)
    return Model(
        "m",
        UID,
        1,
        LAYOUT,
        groups,
        Sessions(30, 100, "m"),
        Device(),
        Budget(1 << 20),
        ReadBudget(1 << 20),
        JournalSync(),
        DurabilitySettings(),
    )


class Pusher:
    """One worker of a model."""

    def __init__(self, model: Model, name: str = "w") -> None:
        self.model = model
        self.name = name
        self.sequence = 0
        model.coordinator.join(name, time.monotonic(), takeover=False)

    async def push(
        self, gradients: Gradients, wire: torch.dtype = torch.float32, edits: Sequence[GroupEdit] = ()
    ) -> Receipt:
        """One push, by name: dense gradients, or (ids, rows)."""
        self.sequence += 1
        return await self.resend(gradients, wire, edits)

    async def resend(
        self, gradients: Gradients, wire: torch.dtype = torch.float32, edits: Sequence[GroupEdit] = ()
    ) -> Receipt:
        """The last push once more."""
        segments, bodies = [], []
        for name, gradient in gradients.items():
            segment, body = _segment(self.model.layout.slot(name, "m"), gradient, wire)
            segments.append(segment)
            bodies.append(body)
        identity = Identity(
            model_uid=UID, timeline=self.model.timeline, worker=self.name, epoch=1, sequence=self.sequence
        )
        header = PushHeader(
            model="m",
            identity=identity,
            base_version=self.model.version,
            manifest_hash=self.model.layout.manifest_hash,
            segments=segments,
        )
        receiving = await admit(PushCall(self.model, header))
        try:
            for frame in pack(bodies):
                _, chunk = unpack(frame, PushRequest)
                assert chunk is not None
                placed = receiving.take(chunk)
                if placed is not None:
                    await placed
            await hand_in(receiving, PushCommit(edits=edits))
            return await answer(receiving.call)
        finally:
            receiving.release()

    def later(self, gradients: Gradients) -> asyncio.Task[Receipt]:
        """A push that is under way."""
        self.sequence += 1
        return asyncio.ensure_future(self.resend(gradients))


def _segment(
    slot: Slot, gradient: Tensor | tuple[Tensor, Tensor], wire: torch.dtype
) -> tuple[Segment, list[Piece]]:
    segment = Segment(
        arena=slot.arena, start=slot.start, stop=slot.stop, dtype=dtypes.to_wire(wire, slot.name)
    )
    if isinstance(gradient, Tensor):
        return segment, [Piece(gradient.view(-1), wire)]
    ids, rows = gradient
    segment.rows = ids.numel()
    return segment, [Piece(ids, torch.int64), Piece(rows.reshape(-1), wire)]
