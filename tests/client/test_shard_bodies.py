"""A body that is cut for ranks, and answers that come in parts: together they are what a server alone gets and gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pushstep.client.attachment.received import Into
from pushstep.client.gradients.body import PushBodies, push_body, values_body
from pushstep.client.gradients.compression import Compression
from pushstep.client.shards.bodies import Cutting
from pushstep.client.shards.joined import Joined
from pushstep.client.shards.parts import Part
from pushstep.client.transport.streams import Body, Pulled
from pushstep.proto import training_pb2 as pb
from pushstep.proto.types_pb2 import DType, Manifest, Parameter, ParamGroup
from pushstep.proto.wire.bodies import check_body
from pushstep.proto.wire.buffers import BufferPool
from pushstep.proto.wire.frames import Assembly, pack, unpack
from pushstep.proto.wire.layout import Layout
from pushstep.proto.wire.shards import cut
from pushstep.server.staging.unpack import dense_part, rows_parts

WHOLE = Layout(
    Manifest(
        parameters=[
            Parameter(name="table", shape=[3000, 32], dtype=DType.DTYPE_FLOAT32),
            Parameter(name="scalar", dtype=DType.DTYPE_FLOAT32),
            Parameter(name="empty", shape=[0, 3], dtype=DType.DTYPE_FLOAT32),
            Parameter(name="flat", shape=[50_001], dtype=DType.DTYPE_FLOAT32),
            Parameter(name="half", shape=[70, 1024], dtype=DType.DTYPE_BFLOAT16),
            Parameter(name="other", shape=[300, 33], dtype=DType.DTYPE_FLOAT32, group=1),
            *(
                Parameter(name=f"small{k}", shape=[k + 1, 700], dtype=DType.DTYPE_FLOAT32, group=2)
                for k in range(12)
            ),
        ],
        groups=[ParamGroup(rule="adagrad"), ParamGroup(rule="adadelta"), ParamGroup(rule="adadelta")],
    )
)
SLOTS = {slot.name: slot for slot in WHOLE.slots}
RANKS = [1, 2, 3, 4, 7]


def parts_of(ranks: int) -> list[Part]:
    return [Part(each, WHOLE) for each in cut(WHOLE, ranks) if each is not None]


def noise(name: str, seed: int = 0) -> Tensor:
    slot = SLOTS[name]
    generator = torch.Generator().manual_seed(seed + slot.index)
    return torch.randn(slot.shape, generator=generator).to(slot.dtype)


def arrived(layout: Layout, body: Body, *, of_push: bool = True) -> Assembly:
    """A body after it was sent."""
    assembly = Assembly(check_body(layout, body.segments, 1 << 30, of_push=of_push))
    for frame in pack(body.pieces):
        chunk = unpack(frame, pb.PushRequest)[1]
        assert chunk is not None
        assembly.place(chunk)
    assembly.finish()
    return assembly


def unpacked(layout: Layout, body: Body) -> dict[str, Any]:
    """What a server makes of a push: dense gradients, and (ids, rows), by parameter."""
    assembly = arrived(layout, body)
    found: dict[str, Any] = {}
    covered = [layout.slots_of(segment) for segment in body.segments]
    by_rows = rows_parts(body.segments, covered, assembly, BufferPool(0).take)
    for index, segment in enumerate(body.segments):
        slots = covered[index]
        if segment.HasField("rows"):
            rows = by_rows[index]
            found[slots[0].name] = rows.ids, rows.rows
        elif segment.HasField("parameter"):
            found[slots[0].name] = torch.empty(slots[0].shape)
        else:
            part, _ = dense_part(segment, slots, assembly, index, BufferPool(0).take)
            for slot in slots:
                flat = part.gradient[slot.start - segment.start : slot.stop - segment.start]
                found[slot.name] = flat.view(slot.shape)
    return found


def put_together(parts: Sequence[Part], bodies: Sequence[Body]) -> dict[str, Any]:
    """The parts' gradients as the whole model's."""
    pieces: dict[str, list[tuple[int, Any]]] = {}
    for part, body in zip(parts, bodies, strict=True):
        for name, gradient in unpacked(part.layout, body).items():
            held = part.of[SLOTS[name].index]
            pieces.setdefault(name, []).append((held.first_row, gradient))
    whole: dict[str, Any] = {}
    for name, found in pieces.items():
        found.sort(key=lambda piece: piece[0])
        if isinstance(found[0][1], tuple):
            ids = torch.cat([ids + first for first, (ids, _) in found])
            whole[name] = ids, torch.cat([rows for _, (_, rows) in found])
        else:
            whole[name] = torch.cat([values for _, values in found]) if len(found) > 1 else found[0][1]
    return whole


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return all(map(torch.equal, one, other))
    return torch.equal(one, other)


def touched(seed: int, rows: int, count: int) -> Tensor:
    return torch.randint(0, rows, (count,), generator=torch.Generator().manual_seed(seed))


GRADIENTS: dict[str, Any] = {
    "all": lambda: {SLOTS[name]: noise(name) for name in SLOTS},
    "some": lambda: {SLOTS[name]: noise(name) for name in ("flat", "other")},
    "one piece": lambda: {SLOTS["scalar"]: noise("scalar")},
    "strided": lambda: {SLOTS["half"]: noise("half").t().contiguous().t(), SLOTS["flat"]: noise("flat")},
    "rows": lambda: {
        SLOTS["table"]: (touched(1, 3000, 500), drawn(500, 32)),
        SLOTS["flat"]: noise("flat"),
    },
    "rows at one end": lambda: {SLOTS["table"]: (torch.tensor([2999, 2998]), torch.ones(2, 32))},
    "no rows": lambda: {SLOTS["table"]: (torch.empty(0, dtype=torch.int64), torch.empty(0, 32))},
}
WIRES: dict[str, tuple[Any, float | None]] = {
    "own": (None, None),
    "bfloat16": (torch.bfloat16, None),
    "int8": (torch.int8, None),
    "top_k": (None, 0.01),
}


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("gradients", GRADIENTS)
def test_the_parts_of_a_push_are_the_push(gradients: str, wire: str) -> None:
    """So are the residuals, which are kept whole: they do not depend on the number of ranks."""
    given = GRADIENTS[gradients]()
    alone = Compression(*WIRES[wire])
    expected = unpacked(WHOLE, PushBodies(alone).of(WHOLE, given))
    alone.settle(applied=True)
    for ranks in RANKS:
        compression = Compression(*WIRES[wire])
        parts = parts_of(ranks)
        got = put_together(parts, Cutting(WHOLE, parts).of(PushBodies(compression).of(WHOLE, given)))
        compression.settle(applied=True)
        assert got.keys() == expected.keys(), ranks
        assert all(same(got[name], expected[name]) for name in got), ranks
        assert compression.residuals.keys() == alone.residuals.keys()
        assert all(map(torch.equal, compression.residuals.values(), alone.residuals.values())), ranks


def test_a_dense_cut_copies_nothing() -> None:
    given = {SLOTS[name]: noise(name) for name in ("table", "flat")}
    parts = parts_of(3)
    memory = [(g.data_ptr(), g.data_ptr() + g.nbytes) for g in given.values()]
    cutting = Cutting(WHOLE, parts)
    for body in cutting.of(push_body(WHOLE, given, Compression(None, None))):
        for piece in (piece for pieces in body.pieces for piece in pieces):
            at = piece.source.data_ptr()  # type: ignore[attr-defined]
            assert any(start <= at < stop for start, stop in memory)


def answer_of(
    layout: Layout, values: dict[str, Tensor], rows: dict[str, Tensor], parts: Part | None
) -> Pulled:
    """A pull's answer: whole parameters, and some rows of others, which a part has where they are its own."""
    held = {
        slot.name: (slot, 0 if parts is None else parts.held[slot.index].first_row) for slot in layout.slots
    }
    dense = {}
    sparse: dict[Any, Any] = {}
    for name, (slot, first) in held.items():
        own = values[name].narrow(0, first, slot.rows) if slot.shape else values[name]
        chosen = rows.get(name)
        if chosen is None:
            dense[slot, ""] = own
        else:
            ids = chosen[(chosen >= first) & (chosen < first + slot.rows)] - first
            if len(ids) < slot.rows:
                sparse[slot] = ids, own[ids]
            else:
                dense[slot, ""] = own
    body = values_body(layout, dense)
    by_rows = push_body(layout, sparse, Compression(None, None)) if sparse else Body((), ())
    whole = Body([*body.segments, *by_rows.segments], [*body.pieces, *by_rows.pieces])
    header = pb.PullHeader(version=7, timeline=1, segments=whole.segments)
    return Pulled(header, layout, arrived(layout, whole, of_push=False))


@pytest.mark.parametrize("case", ["whole", "rows", "rows of which one rank has all"])
@pytest.mark.parametrize("ranks", RANKS)
def test_answers_in_parts_read_as_one(ranks: int, case: str) -> None:
    values = {name: noise(name, 5) for name in SLOTS}
    parts = parts_of(ranks)
    rows: dict[str, Tensor] = {}
    if case != "whole":
        rows = {"table": touched(2, 3000, 40).unique(), "other": torch.tensor([0, 299])}
    if case == "rows of which one rank has all":
        first = parts[0].of[SLOTS["table"].index].slot.rows
        rows["table"] = torch.arange(0, min(first + 3, 2999))
    alone = answer_of(WHOLE, values, rows, None)
    found = [(part, answer_of(part.layout, values, rows, part)) for part in parts]
    joined = Joined(found[0][1].header, WHOLE, found[0][1].body, found)

    def by_name(pulled: Pulled) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        dense = {slot.name: v for slot, _, v in pulled.dense()}
        targets = {name: torch.full(SLOTS[name].shape, -1, dtype=SLOTS[name].dtype) for name in SLOTS}
        into = Into()
        into.take(pulled, targets)
        assert all(torch.equal(targets[name], dense[name]) for name in dense)
        assert all((targets[name] == -1).all() for name in targets.keys() - dense.keys())
        return dense, {slot.name: (ids, rows) for slot, ids, rows in pulled.rows()}

    got, expected = by_name(joined), by_name(alone)
    assert got[0].keys() == expected[0].keys()
    assert all(torch.equal(got[0][name], expected[0][name]) for name in got[0])
    assert got[1].keys() == expected[1].keys()
    for name, (ids, own) in got[1].items():
        order = ids.argsort()
        assert torch.equal(ids[order], expected[1][name][0])
        assert torch.equal(own[order], expected[1][name][1])
