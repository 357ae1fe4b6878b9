"""A version that is read beside training is that version, bit for bit, whatever is written meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from pushstep.proto.errors import OutOfMemory
from pushstep.proto.types_pb2 import DType, GroupValues, Manifest, Parameter, ParamGroup, Ticket
from pushstep.proto.wire.hyperparameters import wire_values
from pushstep.proto.wire.layout import Layout, with_group
from pushstep.server.arenas.arena import Arenas
from pushstep.server.arenas.arenas_copy import ArenasCopy
from pushstep.server.arenas.extras import Extras
from pushstep.server.captures import capture as module
from pushstep.server.captures import captured_table as tables
from pushstep.server.captures.capture import AVERAGE, PARAMETER, Capture, spans_of
from pushstep.server.coordinator.groups import Group
from pushstep.server.devices import cuda as cuda_device
from pushstep.server.devices.device import Device
from pushstep.server.staging.gradient import DensePart, RowsPart
from tests.support.cuda import streams

FLOAT, HALF = DType.DTYPE_FLOAT32, DType.DTYPE_BFLOAT16
GROUPS = [ParamGroup(rule="adagrad"), ParamGroup(rule="adadelta")]
LAYOUT = Layout(
    Manifest(
        parameters=[
            Parameter(name="first", shape=[37], dtype=FLOAT, group=0),
            Parameter(name="table", shape=[61, 3], dtype=FLOAT, group=0),
            Parameter(name="between", shape=[5, 4], dtype=FLOAT, group=0),
            Parameter(name="other", shape=[40, 2], dtype=FLOAT, group=0),
            Parameter(name="half", shape=[19, 2], dtype=HALF, group=1),
            Parameter(name="empty", shape=[0, 2], dtype=HALF, group=1),
            Parameter(name="last", shape=[70], dtype=HALF, group=1),
        ],
        groups=GROUPS,
    )
)
VALUES = [Group.make(group).values for group in GROUPS]
BY_ROWS = ("table", "other", "half", "between")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the arenas were large: many blocks, chunks and scans."""
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 16)
    monkeypatch.setattr(module, "CHUNK_BYTES", 64)  # 8 elements
    monkeypatch.setattr(tables, "CHUNK_BYTES", 64)
    for where in (module, tables):
        monkeypatch.setattr(where, "SCANNED_ROWS", 7)


class House:
    """Arenas that are written in every way."""

    def __init__(self, seed: int, device: Device | None = None) -> None:
        self.draw = random.Random(seed)
        self.noise = torch.Generator().manual_seed(seed)
        self.arenas = Arenas(LAYOUT, device or Device())
        for flat in self.arenas.parameters:
            flat.copy_(torch.randn(flat.shape, generator=self.noise))
        self.arenas.fill_initial_state(VALUES)
        self.groups = list(VALUES)

    def _ticket(self) -> Ticket:
        groups = [GroupValues(values=wire_values(values)) for values in self.groups]
        return Ticket(version=self.arenas.version + 1, groups=groups, lr_scale=1.0, factor=1.0)

    def _randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.noise).to(dtype)

    def dense(self) -> None:
        slot = self.draw.choice([s for s in self.arenas.layout.slots if s.start < s.stop])
        gradient = self._randn(slot.stop - slot.start, dtype=slot.dtype)
        self.arenas.step(self._ticket(), [DensePart(slot.arena, slot.start, (slot,), gradient)])

    def all_dense(self) -> None:
        layout = self.arenas.layout
        parts = [
            DensePart(a.index, 0, tuple(a.slots), self._randn(a.elements, dtype=a.dtype))
            for a in layout.arenas
        ]
        self.arenas.step(self._ticket(), parts)

    def rows(self) -> None:
        parts = []
        for name in self.draw.sample(BY_ROWS, self.draw.randint(1, 2)):
            slot = self.arenas.layout.slot(name, "m")
            ids = torch.tensor(sorted(self.draw.sample(range(slot.rows), self.draw.randint(1, 5))))
            parts.append(RowsPart(slot, ids, self._randn(len(ids), slot.row_elements, dtype=slot.dtype)))
        self.arenas.step(self._ticket(), parts)

    def upload(self) -> None:
        slot, fresh = self.draw.sample([s for s in self.arenas.layout.slots if s.start < s.stop], 2)
        with self.arenas.writing(spans_of([], [slot, fresh])):
            self.arenas.version += 1
            self.arenas.view(slot).copy_(self._randn(*slot.shape))
            self.arenas.mark_changed(slot, self.arenas.version)
            self.arenas.begin_anew([fresh], self.groups)

    def average(self) -> None:
        """A step that moves an average, and perhaps puts it in the parameters' place; or an average that begins anew."""
        hook, groups = self.draw.choice([("ema", [0]), ("both", [0, 1])])
        if self.draw.random() < 0.2:
            self.arenas.begin_averages(hook, groups)
            return
        ticket = self._ticket()
        overwrite = self.draw.random() < 0.3
        ticket.averages.add(hook=hook, groups=groups, momentum=0.5, overwrite=overwrite)
        slot = self.arenas.layout.slot("table", "m")
        self.arenas.step(ticket, [RowsPart(slot, torch.tensor([3, 8]), self._randn(2, slot.row_elements))])

    def load(self) -> None:
        """An older version, on the next timeline."""
        copy = self.arenas.copy()
        for flat in copy.parameters:
            flat.add_(1)
        steps = [7] * len(copy.steps)
        older = ArenasCopy(copy.layout, 1, 0, copy.parameters, copy.states, steps, averages=copy.averages)
        self.arenas.load(older, self.arenas.timeline + 1, self.draw.choice([["ema"], ["ema", "both"]]))

    def grow(self) -> None:
        group = ParamGroup(rule="adagrad")
        added = Parameter(name=f"p{len(self.groups)}", shape=[9], dtype=FLOAT)
        layout = with_group(self.arenas.layout, Manifest(parameters=[added], groups=[group]))
        self.groups.append(Group.make(group).values)
        self.arenas.adopt(self.arenas.extended(layout, self.groups))

    def torn(self) -> None:
        """A step that breaks off after it has written, and the load that mends it."""
        slot = self.arenas.layout.slot("table", "m")
        ids = torch.arange(0, slot.rows, 2)
        part = RowsPart(slot, ids, torch.ones(len(ids), slot.row_elements))
        with pytest.raises(ZeroDivisionError), self.arenas.writing([part]):
            self.arenas.view(slot)[ids] = -1.0
            raise ZeroDivisionError
        self.load()


WRITES: dict[str, Callable[[House], None]] = {
    "dense": House.dense,
    "all dense": House.all_dense,
    "rows": House.rows,
    "upload": House.upload,
    "average": House.average,
    "load": House.load,
    "grow": House.grow,
    "torn": House.torn,
}


def expected_of(arenas: Arenas) -> dict[tuple[int, str], Tensor]:
    copy = arenas.copy()
    found = {
        (index, name): flat.clone()
        for index in range(len(copy.parameters))
        for name, flat in copy.flats(index).items()
    }
    for hook, kept in copy.averages.items():
        found |= {(index, AVERAGE + hook): flat.clone() for index, flat in kept.items()}
    return found


def read_beside(house: House, parts: Iterator[Tensor], writes: list[str], every: float) -> Tensor:
    """What is read while now and then something is written."""
    read = []
    for part in parts:
        read.append(part.clone().reshape(-1))
        if house.draw.random() < every:
            WRITES[house.draw.choice(writes)](house)
    return torch.cat(read) if read else torch.empty(0)


def check_whole(house: House, writes: list[str], every: float) -> None:
    expected, steps = expected_of(house.arenas), list(house.arenas.steps)
    capture = house.arenas.captured(Extras(), ())
    for _ in range(house.draw.randint(0, 2)):
        WRITES[house.draw.choice(writes)](house)
    for arena in LAYOUT.arenas:
        for name in capture.names(arena.index):
            found = read_beside(house, capture.whole(arena.index, name), writes, every)
            assert torch.equal(found, expected.pop((arena.index, name))), (arena.index, name)
    assert {arena for arena, _ in expected} <= {arena.index for arena in house.arenas.layout.arenas} - {
        arena.index for arena in LAYOUT.arenas
    }
    assert capture.steps == steps
    capture.close()


def check_link(house: House, since: dict[tuple[int, str], Tensor], version: int, writes: list[str]) -> None:
    """What is laid over an older version gives the one at the mark."""
    expected = expected_of(house.arenas)
    capture = house.arenas.captured(Extras(), ())
    WRITES[house.draw.choice(writes)](house)
    ids = {index: capture.touched(index, version) for index in capture.tables}
    for arena in LAYOUT.arenas:
        for name in capture.names(arena.index):
            whole, dense = since[arena.index, name], torch.ones(arena.elements, dtype=torch.bool)
            for index, rows in ids.items():
                slot = LAYOUT.slots[index]
                if slot.arena == arena.index:
                    dense[slot.start : slot.stop] = False
                    found = read_beside(house, capture.rows(index, name, rows), writes, 0.2)
                    table = whole[slot.start : slot.stop].view(slot.rows, -1)
                    table[rows] = found.view(len(rows), slot.row_elements).to(table.dtype)
            whole[dense] = read_beside(house, capture.dense(arena.index, name), writes, 0.2)
            assert torch.equal(whole, expected[arena.index, name]), (arena.index, name)
    capture.close()


TRAINING = ["dense", "all dense", "rows", "rows", "rows", "upload", "grow"]


@pytest.mark.parametrize("write", WRITES)
def test_a_version_is_read_beside_each_kind_of_write(write: str) -> None:
    house = House(1)
    house.rows()
    for every in (0.0, 0.1, 1.0):
        check_whole(house, [write], every)
        check_whole(house, [write, "rows"], every)


@pytest.mark.parametrize("seed", range(12))
def test_a_version_is_read_beside_any_of_them(seed: int) -> None:
    house = House(seed)
    for _ in range(3):
        check_whole(house, list(WRITES), house.draw.choice([0.02, 0.2, 0.7]))


@pytest.mark.parametrize("seed", range(12))
def test_the_rows_that_were_touched_lead_from_one_version_to_another(seed: int) -> None:
    house = House(seed)
    house.rows()
    for _ in range(3):
        since, version = expected_of(house.arenas), house.arenas.version
        for _ in range(house.draw.randint(0, 6)):
            WRITES[house.draw.choice(TRAINING)](house)
        check_link(house, since, version, TRAINING)


def test_only_rows_that_were_touched_are_of_a_link() -> None:
    """A dense push, an upload and a state that begins anew touch the whole table."""
    house, slot = House(3), LAYOUT.slot("table", "m")
    house.rows()

    def touched(since: int) -> list[int]:
        capture = house.arenas.captured(Extras(), ())
        try:
            return capture.touched(slot.index, since).tolist() if slot.index in capture.tables else []
        finally:
            capture.close()

    step, values = house.arenas.step, torch.ones(2, 3)
    step(house._ticket(), [RowsPart(slot, torch.tensor([4, 60]), values)])
    version = house.arenas.version
    assert touched(version) == []
    step(house._ticket(), [RowsPart(slot, torch.tensor([4, 9]), values)])
    step(house._ticket(), [RowsPart(slot, torch.tensor([0, 9]), values)])
    assert touched(version) == [0, 4, 9]
    assert touched(version - 1) == [0, 4, 9, 60]
    version = house.arenas.version
    with house.arenas.writing(spans_of([], [slot])):
        house.arenas.version += 1
        house.arenas.begin_anew([slot], house.groups)
    assert touched(version) == list(range(61))
    version = house.arenas.version
    gradient = torch.ones(slot.stop - slot.start)
    step(house._ticket(), [DensePart(slot.arena, slot.start, (slot,), gradient)])
    assert touched(version) == list(range(61))


def test_nothing_is_saved_that_was_read_or_that_nobody_overwrites(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = module.block_memory

    def memory(elements: int, dtype: torch.dtype) -> Tensor:
        taken.append(elements)
        return real(elements, dtype)

    monkeypatch.setattr(module, "block_memory", memory)
    house = House(4)
    capture = house.arenas.captured(Extras(), ())
    for arena in LAYOUT.arenas:
        for name in capture.names(arena.index):
            for _ in capture.whole(arena.index, name):
                pass
    before = len(taken)
    house.all_dense()
    house.upload()
    assert len(taken) == before
    capture.close()
    house.all_dense()
    assert house.arenas.capture is None


@pytest.mark.parametrize("reads", [True, False])
def test_what_is_saved_is_counted_and_is_no_more_than_the_model(reads: bool) -> None:
    house = House(8)
    house.rows()  # which makes tables
    capture = house.arenas.captured(Extras(), ())
    house.rows()
    by_rows = capture.saved_bytes
    assert by_rows > 0
    house.all_dense()
    house.upload()
    held = sum(flat.nbytes for flats in capture._held for flat in flats.values())
    assert held <= capture.saved_bytes <= held + by_rows
    if reads:
        for arena in LAYOUT.arenas:
            for name in capture.names(arena.index):
                for _ in capture.whole(arena.index, name):
                    pass
        tables_bytes = sum(t.nbytes for table in capture.tables.values() for t in table._tensors.values())
        assert tables_bytes <= capture.saved_bytes <= tables_bytes + by_rows
    capture.close()
    assert capture.saved_bytes == 0


def test_one_that_has_no_memory_fails_and_the_step_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(5)
    capture = house.arenas.captured(Extras(), ())
    parts = capture.whole(0, PARAMETER)
    next(parts)

    def refuse(*_: object) -> Tensor:
        raise OutOfMemory(what="it", need=1)

    monkeypatch.setattr(module, "block_memory", refuse)
    version = house.arenas.version
    house.all_dense()
    assert house.arenas.version == version + 1 and not house.arenas.torn
    with pytest.raises(OutOfMemory):
        next(parts)


def test_a_closed_one_is_read_no_more() -> None:
    capture: Capture = House(6).arenas.captured(Extras(), ())
    parts = capture.whole(0, PARAMETER)
    next(parts)
    capture.close()
    with pytest.raises(RuntimeError):
        next(parts)


def test_a_cuda_device_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the model of its streams."""
    faults = streams.install(monkeypatch.setattr)
    device = cuda_device.CudaDevice(0)
    device.open()
    house = House(7, device)
    house.arenas.device_stream.adopt()
    try:
        house.rows()
        for _ in range(3):
            check_whole(house, list(WRITES), 0.2)
        house = House(8, device)
        house.arenas.device_stream.adopt()
        house.rows()
        since, version = expected_of(house.arenas), house.arenas.version
        house.rows()
        check_link(house, since, version, TRAINING)
    finally:
        cuda_device.cuda.set_stream(None)
    assert faults == []
