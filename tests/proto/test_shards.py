"""The cut of a model into the parts of ranks: everything lies in one rank, on borders that change no norm."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pushstep.proto.errors import InvalidManifest
from pushstep.proto.types_pb2 import DType, Manifest, Parameter, ParamGroup
from pushstep.proto.wire.layout import Layout
from pushstep.proto.wire.names import check_names
from pushstep.proto.wire.shards import BLOCK_ELEMENTS, MAX_RANKS, Part, cut, stretch_rows, taking_part

SHAPES = [
    (),
    (0,),
    (3,),
    (4096,),
    (70_000,),
    (300_001,),
    (5, 7),
    (1000, 32),
    (90_000, 8),
    (64, 3, 7, 7),
    (0, 4),
    (9000, 1),
]
DTYPES = [DType.DTYPE_FLOAT32, DType.DTYPE_BFLOAT16, DType.DTYPE_FLOAT64]


def model(seed: int, parameters: int) -> Layout:
    draw = random.Random(seed)
    groups = draw.randint(1, 3)
    manifest = Manifest(groups=[ParamGroup(rule="adagrad") for _ in range(groups)])
    for index in range(parameters):
        manifest.parameters.append(
            Parameter(
                name=f"p{index}",
                shape=draw.choice(SHAPES),
                dtype=draw.choice(DTYPES),
                group=draw.randrange(groups),
            )
        )
    return Layout(manifest)


def held(part: Part) -> int:
    return sum(arena.elements * arena.dtype.itemsize for arena in part.layout.arenas)


@given(st.integers(0, 1 << 30), st.integers(1, 12), st.integers(1, 9))
def test_every_element_lies_in_one_rank(seed: int, parameters: int, ranks: int) -> None:
    whole = model(seed, parameters)
    parts = cut(whole, ranks)
    assert len(parts) == ranks
    assert parts[0] is not None
    covered: dict[int, list[tuple[int, int]]] = {slot.index: [] for slot in whole.slots}
    for rank, part in enumerate(parts):
        if part is None:
            continue
        assert part.rank == rank
        assert [g.SerializeToString() for g in part.layout.manifest.groups] == [
            g.SerializeToString() for g in whole.manifest.groups
        ]
        for piece, slot in zip(part.pieces, part.layout.slots, strict=True):
            of = whole.slots[piece.whole]
            covered[piece.whole].append((piece.start, piece.stop))
            assert (slot.name, slot.dtype, slot.group) == (of.name, of.dtype, of.group)
            assert slot.stop - slot.start == piece.stop - piece.start
            assert piece.is_whole == (slot.shape == of.shape)
            if not piece.is_whole:
                assert slot.shape[1:] == of.shape[1:]
                assert (slot.whole_rows, slot.first_row * of.row_elements) == (of.rows, piece.start)
                assert piece.start % BLOCK_ELEMENTS == 0
                assert slot.first_row % stretch_rows(of) == 0
                assert stretch_rows(slot) == stretch_rows(of)
    for slot in whole.slots:
        ends = sorted(covered[slot.index])
        assert [start for start, _ in ends] == [0, *(stop for _, stop in ends[:-1])]
        assert ends[-1][1] == slot.stop - slot.start


@given(st.integers(0, 1 << 30), st.integers(1, 12), st.integers(1, 9))
def test_a_rank_s_range_of_an_arena_has_no_gap(seed: int, parameters: int, ranks: int) -> None:
    whole = model(seed, parameters)
    for part in cut(whole, ranks):
        for arena in () if part is None else part.layout.arenas:
            ends = [
                (whole.slots[piece.whole].start + piece.start, whole.slots[piece.whole].start + piece.stop)
                for piece in (part.pieces[slot.index] for slot in arena.slots)
                if piece.stop > piece.start
            ]
            assert all(before[1] == after[0] for before, after in pairwise(ends))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    "shapes",
    [
        [(16_000_000,)],
        [(2_000_000, 32), (1000, 32)],
        [(1_000_000,), (3_000_000,), (100, 100), (10,)],
        [(50_257, 768), (768, 3072), (3072, 768), (768,)],
    ],
)
def test_ranks_hold_equal_bytes(shapes: list[tuple[int, ...]], ranks: int) -> None:
    parameters = [
        Parameter(name=f"p{index}", shape=shape, dtype=DType.DTYPE_FLOAT32)
        for index, shape in enumerate(shapes)
    ]
    whole = Layout(Manifest(parameters=parameters, groups=[ParamGroup(rule="adadelta")]))
    parts = cut(whole, ranks)
    found = [0 if part is None else held(part) for part in parts]
    total = sum(found)
    # a border is rounded up to the next stretch, which is at most 1/256 of its parameter and a few blocks more
    assert max(found) - total // ranks <= total // 128 + 64 * 4 * BLOCK_ELEMENTS


def test_many_ranks_of_a_small_model_get_nothing_and_rank_0_something() -> None:
    parameters = [Parameter(name="w", shape=[10], dtype=DType.DTYPE_FLOAT32)]
    whole = Layout(Manifest(parameters=parameters, groups=[ParamGroup(rule="adagrad")]))
    first, *others = cut(whole, MAX_RANKS)
    assert first is not None
    assert first.pieces[0].is_whole
    assert others == [None] * (MAX_RANKS - 1)


@pytest.mark.parametrize(
    ("elements", "expected"),
    [(10, 1), (10_000, 1), (1 << 19, 2), ((1 << 19) - 1, 1), (3 << 18, 3), (1 << 22, 4)],
)
def test_a_small_model_is_cut_among_fewer_ranks(elements: int, expected: int) -> None:
    """As if there were no more; and by the number of those alone, which is what workers are told."""
    parameters = [Parameter(name="w", shape=[elements], dtype=DType.DTYPE_FLOAT32)]
    manifest = Manifest(parameters=parameters, groups=[ParamGroup(rule="adagrad")])
    evenly = cut(Layout(manifest), expected)
    manifest.part_bytes = 1 << 20
    whole = Layout(manifest)
    assert taking_part(whole, 4) == expected
    for parts in (cut(whole, 4), cut(whole, expected)):
        assert [part and part.pieces for part in parts[:expected]] == [
            part and part.pieces for part in evenly
        ]
        assert not any(parts[expected:])


def test_groups_take_turns_so_that_small_ones_do_not_all_lie_in_rank_0() -> None:
    manifest = Manifest(groups=[ParamGroup(rule="adagrad") for _ in range(8)])
    for group in range(8):
        manifest.parameters.add(name=f"p{group}", shape=[1000], dtype=DType.DTYPE_FLOAT32, group=group)
    parts = cut(Layout(manifest), 4)
    assert [0 if part is None else len(part.pieces) for part in parts] == [2, 2, 2, 2]


def test_the_cut_stays_what_it_is() -> None:
    """Ranks, workers and snapshots of different releases cut alike."""
    parameters = [
        Parameter(name="emb", shape=[100_000, 16], dtype=DType.DTYPE_FLOAT32),
        Parameter(name="w", shape=[300_000], dtype=DType.DTYPE_FLOAT32, group=1),
        Parameter(name="b", shape=[10], dtype=DType.DTYPE_FLOAT32, group=1),
    ]
    whole = Layout(
        Manifest(parameters=parameters, groups=[ParamGroup(rule="adagrad"), ParamGroup(rule="adadelta")])
    )
    found = [
        [] if part is None else [(piece.whole, piece.start, piece.stop) for piece in part.pieces]
        for part in cut(whole, 3)
    ]
    assert found == [
        [(0, 0, 540_672), (1, 0, 94_208)],
        [(0, 540_672, 1_073_152), (1, 94_208, 196_608)],
        [(0, 1_073_152, 1_600_000), (1, 196_608, 300_000), (2, 0, 10)],
    ]


def test_the_manifest_of_a_piece_is_no_new_model() -> None:
    parameters = [Parameter(name="w", shape=[1_000_000], dtype=DType.DTYPE_FLOAT32)]
    whole = Layout(Manifest(parameters=parameters, groups=[ParamGroup(rule="adagrad")]))
    part = cut(whole, 2)[1]
    assert part is not None
    with pytest.raises(InvalidManifest, match="'w' is a piece"):
        check_names(part.layout.manifest)
    part.layout.manifest.parameters[0].whole_rows = 5
    with pytest.raises(InvalidManifest, match="the rows of 'w' do not lie within the 5 rows"):
        Layout(part.layout.manifest)
