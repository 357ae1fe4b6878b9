"""A CUDA device's streams on the model of them (see streams.py): a history of one model gives the CPU's bits.

What the model finds is as good as the mistakes that it finds: each of MISTAKES leaves out one wait, or one care, and
must show. What only hardware shows is not here; `test_devices.py` runs whole services on it.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from pushstep.proto.shared_memory.slots import Places
from pushstep.proto.training_pb2 import PullResponse, PushCommit, PushHeader, PushRequest
from pushstep.proto.types_pb2 import DType, Identity, Manifest, Parameter, ParamGroup
from pushstep.proto.wire.frames import CHUNK_BYTES, Assembly, Chunk, Piece, pack, unpack
from pushstep.proto.wire.layout import Layout
from pushstep.server.arenas.publisher import Published
from pushstep.server.config import Config
from pushstep.server.coordinator.policies import catalogue as policies
from pushstep.server.devices import cuda as cuda_device
from pushstep.server.devices.host_memory import HostMemory
from pushstep.server.models.catalog import Catalog
from pushstep.server.models.edits import Edits
from pushstep.server.models.model import Model
from pushstep.server.requests.push import answer, hand_in
from pushstep.server.requests.push_call import PushCall
from pushstep.server.requests.receiving import Receiving, admit
from pushstep.server.shared_memory.answer import SharedAnswer
from pushstep.server.shared_memory.region import Region
from tests.support.cuda import streams
from tests.support.servers.harness import wait_until

# Large enough for pinned memory and for several chunks and fetches; small enough for a hundred steps a second.
ELEMENTS: Final = 700_000
ROWS: Final = 50
LAYOUT: Final = Layout(
    Manifest(
        parameters=[
            Parameter(name="weight", shape=[ELEMENTS], dtype=DType.DTYPE_FLOAT32),
            Parameter(name="table", shape=[ROWS, 4], dtype=DType.DTYPE_FLOAT32, group=1),
        ],
        groups=[ParamGroup(rule="adadelta"), ParamGroup(rule="adagrad")],
    )
)
WEIGHT, TABLE = LAYOUT.slots
# In place of the norm in a receipt that came before its step was done.
TOO_EARLY: Final = -1.0
Body = list[tuple[Any, list[Piece]]]


class House:
    """One model with its doors taken off: pushes go in as frames, versions come out as frames and through a region."""

    def __init__(self, data: Path, device: str) -> None:
        config = Config(data=data, device=device, staging_bytes=64 << 20)
        self.catalog = Catalog(config)
        self.catalog.device.open()
        self.model: Model = self.catalog.new_model("m", LAYOUT)
        self.draw = torch.Generator().manual_seed(0)
        self.sequences: dict[str, int] = {}

    def identity(self, worker: str) -> Identity:
        known = self.model.sessions.workers.get(worker)
        if known is None:
            known, _ = self.model.coordinator.join(worker, time.monotonic(), takeover=False)
        self.sequences[worker] = self.sequences.get(worker, 0) + 1
        number = self.sequences[worker]
        return Identity(
            model_uid=self.model.uid, timeline=1, worker=worker, epoch=known.epoch, sequence=number
        )

    def dense(self, dtype: torch.dtype = torch.float32) -> Body:
        """A gradient of everything."""
        segments = LAYOUT.dense_segments(LAYOUT.slots, dtype)
        return [
            (segment, [Piece(torch.randn(int(segment.stop - segment.start), generator=self.draw), dtype)])
            for segment, _ in segments
        ]

    def rows(self, *ids: int) -> Body:
        """A gradient of some rows of the table."""
        ((segment, _),) = LAYOUT.dense_segments([TABLE])
        segment.rows = len(ids)
        rows = torch.randn(len(ids), 4, generator=self.draw)
        return [(segment, [Piece(torch.tensor(ids), torch.int64), Piece(rows, torch.float32)])]

    async def push(self, body: Body, worker: str = "a", *, whole: bool = True) -> float:
        """Push; the norm of what came. Not `whole`: the stream breaks before the last chunk."""
        header = PushHeader(
            identity=self.identity(worker),
            manifest_hash=LAYOUT.manifest_hash,
            segments=[segment for segment, _ in body],
            samples=1 + len(worker),
        )
        receiving = await admit(PushCall(self.model, header))
        try:
            frames = list(pack([pieces for _, pieces in body]))
            for frame in frames if whole else frames[:-1]:
                await placed(receiving, unpack(frame, PushRequest)[1])
            if not whole:
                self.sequences[worker] -= 1
                return 0.0
            await hand_in(receiving, PushCommit())
            receipt = await answer(receiving.call)
            stream = getattr(self.model.arenas.device_stream, "_stream", None)
            return receipt.gradient_norm if stream is None or stream.query() else TOO_EARLY
        finally:
            receiving.release()

    async def pull(self, have: int | None = None, wire: torch.dtype | None = None) -> bytes:
        published = await self.model.publisher.newest(1, have, wire)
        return await body_of(published)

    async def pull_late(self, wire: torch.dtype) -> bytes:
        """A version whose frames are made after the next one's step, where the device can do that."""
        published_by = getattr(self.catalog.device, "publisher", None)
        stepped = threading.Event()
        if published_by is not None:
            published_by.submit(stepped.wait, 60)
        published = await self.model.publisher.newest(1, None, wire)
        await self.push(self.dense())
        stepped.set()
        return await body_of(published)

    async def through_region(self) -> bytes:
        """The parameters as a worker on this host reads them."""
        places = Places(LAYOUT, None)
        memory = HostMemory(self.model.device)
        region = Region(
            self.model.uid,
            self.model.has_live,
            self.identity("a"),
            places,
            places,
            self.catalog.staging,
            memory,
        )
        self.sequences["a"] -= 1
        region.allocate()
        answer = SharedAnswer("m", self.model.arenas, self.model.writer, region, 1, None)
        await answer.newest()
        held = region.parameters.memory.clone().numpy().tobytes()
        region.bytes_reserved = 0  # nobody set them aside
        return held


async def placed(receiving: Receiving, chunk: Chunk | None) -> None:
    if chunk is not None and (moving := receiving.take(chunk)) is not None:
        await moving


async def body_of(published: Published) -> bytes:
    lengths = [LAYOUT.segment_bytes(segment) for segment in published.segments]
    body = Assembly(lengths)
    async for frame in published.frames():
        chunk = unpack(frame, PullResponse)[1]
        if chunk is not None:
            body.place(chunk)
    body.finish()
    return b"".join(body.part(k, torch.uint8).numpy().tobytes() for k in range(len(lengths)))


async def history(house: House) -> list[object]:
    """Every way into the model and out of it; what was seen, in order."""
    model = house.model
    seen: list[object] = [await house.push(house.dense())]
    seen += [await house.pull(), await house.through_region()]
    await house.push(house.dense(), whole=False)
    seen.append(await house.push(house.dense(torch.bfloat16)))
    seen.append(await house.pull_late(torch.bfloat16))
    seen.append(await house.push(house.rows(3, 1, 3)))
    seen += [await house.pull(have=4), await house.pull(have=3), await house.pull()]
    _, copy = await model.copy()
    seen.append([t.numpy().tobytes() for t in (*copy.parameters, *copy.states[0].values())])
    Edits(model).set_policy(policies.read({"policy": "sync", "min_workers": 2}), "test")
    for _ in range(2):
        bodies = house.dense(), house.dense(torch.float16)
        seen += await asyncio.gather(house.push(bodies[0], "a"), house.push(bodies[1], "bb"))
    seen += [await house.pull(), await house.through_region()]
    return seen


async def brief(house: House) -> list[object]:
    """The least of a history that takes every way."""
    seen: list[object] = [await house.push(house.dense())]
    seen += [await house.through_region(), await house.pull()]
    await house.push(house.dense(), whole=False)
    gc.collect()
    seen += [await house.push(house.dense()), await house.pull_late(torch.float32)]
    return seen


def run(data: Path, device: str, what: Callable[[House], Awaitable[list[object]]] = history) -> list[object]:
    async def through() -> list[object]:
        house = House(data, device)
        try:
            return await asyncio.wait_for(what(house), 60)
        finally:
            await house.model.close()

    return asyncio.run(through())


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> streams.Faults:
    """The model in CUDA's place for a test; what it finds wrong."""
    found = streams.install(monkeypatch.setattr)
    monkeypatch.setattr(cuda_device, "FETCH_BYTES", 1 << 20)
    return found


def test_a_history_has_the_cpus_bits(data: Path, faults: streams.Faults) -> None:
    expected = run(data / "cpu", "cpu")
    assert run(data / "cuda", "cuda") == expected
    assert faults == []
    assert all(isinstance(one, (float, bytes, list)) for one in expected)
    assert max(len(one) for one in expected if isinstance(one, bytes)) > CHUNK_BYTES
    gc.collect()  # what is used no more is pinned no more, in time
    wait_until(lambda: not faults.pending)


def test_memory_is_unpinned_by_the_runtime_that_pinned_it() -> None:
    """However late its last holder lets go: another runtime may be in place by then, and knows nothing of it."""
    with pytest.MonkeyPatch.context() as patch:
        faults = streams.install(patch.setattr)
        device = cuda_device.CudaDevice(0)
        device.open()
        memory = device.fresh_memory(4096)
        assert faults.pinned
    del memory
    gc.collect()
    wait_until(lambda: not faults.pinned)


def test_what_ends_late_is_waited_for_by_the_runtime_that_made_it() -> None:
    """As above, for a body whose copies are waited for when it is let go of."""
    with pytest.MonkeyPatch.context() as patch:
        streams.install(patch.setattr)
        device = cuda_device.CudaDevice(0)
        device.open()
        stream = device.inward
        memory = torch.zeros(4)
        held = weakref.ref(memory)
    device.retire(stream, (memory,))
    del memory
    wait_until(lambda: held() is None)


MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "streams do not wait for each other": (streams.Stream, "wait_event", lambda stream, event: None),
    "the host does not wait for a lane": (streams.Stream, "synchronize", lambda stream: None),
    "frames are made before they are fetched": (streams.Event, "synchronize", lambda event: None),
    "memory is given back at once": (cuda_device.CudaDevice, "retire", lambda *_: None),
    "what is fetched is not a copy": (Tensor, "to", lambda tensor, dtype, copy: tensor),
    "a step does not wait for its push": (
        cuda_device.CudaLane,
        "over",
        lambda device_stream, pushes: device_stream.here(),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_model_finds_mistakes(
    data: Path,
    faults: streams.Faults,
    monkeypatch: pytest.MonkeyPatch,
    expected_in_brief: list[object],
    mistake: str,
) -> None:
    monkeypatch.setattr(*MISTAKES[mistake])
    assert run(data, "cuda", brief) != expected_in_brief or faults


@pytest.fixture(scope="module")
def expected_in_brief(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Of the CPU."""
    return run(tmp_path_factory.mktemp("cpu"), "cpu", brief)
