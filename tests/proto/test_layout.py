"""Layouts: where parameters lie, which segments that allows, what two workers must agree on, and hostile manifests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pushstep.proto import layout as public
from pushstep.proto.errors import (
    InvalidManifest,
    MalformedFrame,
    PushstepError,
    UnknownParameter,
    WrongDtype,
    WrongLength,
)
from pushstep.proto.types_pb2 import DType, Manifest, Parameter, ParamGroup, Segment
from pushstep.proto.wire.bodies import check_body
from pushstep.proto.wire.layout import MAX_DIMENSIONS, Layout, with_group

F32, F64, BF16, F16 = (
    DType.DTYPE_FLOAT32,
    DType.DTYPE_FLOAT64,
    DType.DTYPE_BFLOAT16,
    DType.DTYPE_FLOAT16,
)
MANY = 1 << 62


def test_programs_outside_find_it_by_its_public_path() -> None:
    assert public.Layout is Layout


def parameter(name: str, shape: Sequence[int], group: int = 0, dtype: int = F32, **more: Any) -> Parameter:
    return Parameter(name=name, shape=shape, dtype=dtype, group=group, **more)


def manifest(*parameters: Parameter, rules: Sequence[str] = ("adadelta", "adagrad")) -> Manifest:
    return Manifest(parameters=parameters, groups=[ParamGroup(rule=rule) for rule in rules])


def mixed() -> Manifest:
    """Two groups, two dtypes, interleaved; an empty parameter, a scalar, and a tied one."""
    return manifest(
        parameter("a", [2, 3]),
        parameter("table", [5, 4], 1),
        parameter("half", [3], 0, BF16),
        parameter("b", [4], aliases=["b.tied"]),
        parameter("empty", [0, 7]),
        parameter("scale", []),
        parameter("table2", [2, 2], 1),
    )


def test_arenas_are_group_and_dtype_back_to_back() -> None:
    layout = Layout(mixed())
    assert [(a.group, a.dtype, a.elements) for a in layout.arenas] == [
        (0, torch.float32, 11),
        (1, torch.float32, 24),
        (0, torch.bfloat16, 3),
    ]
    assert [(s.name, s.arena, s.start, s.stop) for s in layout.slots] == [
        ("a", 0, 0, 6),
        ("table", 1, 0, 20),
        ("half", 2, 0, 3),
        ("b", 0, 6, 10),
        ("empty", 0, 10, 10),
        ("scale", 0, 10, 11),
        ("table2", 1, 20, 24),
    ]
    assert [(s.rows, s.row_elements) for s in layout.slots] == [
        (2, 3),
        (5, 4),
        (3, 1),
        (4, 1),
        (0, 7),
        (0, 1),
        (2, 2),
    ]


def test_what_the_sender_says_about_places_does_not_count() -> None:
    lying = mixed()
    lying.arenas.add(group=7, dtype=F64, elements=MANY)
    for entry in lying.parameters:
        entry.arena, entry.offset = 9, MANY
    assert Layout(lying).manifest == Layout(mixed()).manifest


def test_names_and_aliases_find_their_slot() -> None:
    layout = Layout(mixed())
    assert layout.slot("b", "m") is layout.slot("b.tied", "m")
    with pytest.raises(UnknownParameter) as caught:
        layout.slot("B", "m")
    assert caught.value.fields == {"model": "m", "parameter": "B"}


CHANGES: dict[str, Callable[[Manifest], Any]] = {
    "name": lambda m: setattr(m.parameters[0], "name", "a2"),
    "shape": lambda m: m.parameters[0].shape.__setitem__(slice(None), [3, 2]),
    "one more dimension": lambda m: m.parameters[0].shape.append(1),
    "dtype": lambda m: setattr(m.parameters[0], "dtype", F64),
    "group": lambda m: setattr(m.parameters[0], "group", 1),
    "alias": lambda m: m.parameters[0].aliases.append("other"),
    "rule": lambda m: setattr(m.groups[0], "rule", "adagrad"),
    "optimizer": lambda m: setattr(m.groups[1], "optimizer", 1),
    "order": lambda m: m.parameters.reverse(),
    "one fewer": lambda m: m.parameters.pop(),
    "name moved into an alias": lambda m: (
        setattr(m.parameters[3], "name", "b.tied"),
        m.parameters[3].aliases.__setitem__(0, "b"),
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_hash_sees_what_workers_must_agree_on(change: Callable[[Manifest], Any]) -> None:
    changed = mixed()
    change(changed)
    assert Layout(changed).manifest_hash != Layout(mixed()).manifest_hash


def test_hash_does_not_see_hyperparameters() -> None:
    changed = mixed()
    changed.groups[0].values["lr"].number = 0.5
    assert Layout(changed).manifest_hash == Layout(mixed()).manifest_hash


def segment(start: int, stop: int, arena: int = 0, dtype: int = F32, **more: Any) -> Segment:
    return Segment(arena=arena, start=start, stop=stop, dtype=dtype, **more)


LEGAL = [
    (segment(0, 6), ["a"], 24),
    (segment(0, 11), ["a", "b", "scale"], 44),
    (segment(6, 11, dtype=BF16), ["b", "scale"], 10),
    (segment(10, 11, dtype=F64), ["scale"], 8),
    (segment(0, 20, 1, rows=3), ["table"], 3 * (8 + 16)),
    (segment(0, 20, 1, rows=0), ["table"], 0),
    (segment(20, 24, 1, dtype=F16, rows=1), ["table2"], 8 + 4),
    (segment(6, 10, rows=2**64 - 1), ["b"], (2**64 - 1) * 12),
]


@pytest.mark.parametrize(("legal", "names", "size"), LEGAL, ids=lambda v: v if isinstance(v, int) else None)
def test_legal_segments(legal: Segment, names: list[str], size: int) -> None:
    layout = Layout(mixed())
    assert [slot.name for slot in layout.slots_of(legal)] == names
    assert layout.segment_bytes(legal) == size


ILLEGAL = {
    "starts inside": segment(1, 6),
    "stops inside": segment(0, 7),
    "backwards": segment(6, 0),
    "empty": segment(6, 6),
    "empty in mid-parameter": segment(3, 3),
    "empty and far away": segment(MANY, MANY),
    "past the end": segment(0, 12),
    "far past the end": segment(0, 2**64 - 1),
    "begins past the end": segment(11, 12),
    "no such arena": segment(0, 6, 3),
    "huge arena": segment(0, 6, 2**32 - 1),
    "rows of several": segment(0, 10, rows=1),
    "rows of a scalar": segment(10, 11, rows=1),
    "rows of part of a table": segment(0, 4, 1, rows=1),
    "rows of nothing": segment(10, 10, rows=1),
}


@pytest.mark.parametrize("illegal", ILLEGAL.values(), ids=ILLEGAL)
def test_illegal_segments(illegal: Segment) -> None:
    with pytest.raises(MalformedFrame):
        Layout(mixed()).slots_of(illegal)
    with pytest.raises(MalformedFrame):
        check_body(Layout(mixed()), [illegal], MANY)


@pytest.mark.parametrize("dtype", [0, 5, 99, -1])
def test_unknown_dtype_of_a_segment(dtype: int) -> None:
    with pytest.raises(WrongDtype):
        check_body(Layout(mixed()), [segment(0, 6, dtype=dtype)], MANY)


@pytest.mark.parametrize(
    "segments",
    [
        [segment(0, 6), segment(0, 6)],
        [segment(0, 10), segment(6, 11)],
        [segment(0, 20, 1), segment(0, 20, 1, rows=1)],
        [segment(0, 20, 1, rows=1), segment(0, 20, 1, rows=1)],
        [segment(0, 6, state="sum"), segment(0, 11, state="sum")],
    ],
    ids=["twice", "overlap", "dense and rows", "rows twice", "a state twice"],
)
def test_a_parameter_is_sent_once(segments: list[Segment]) -> None:
    with pytest.raises(MalformedFrame, match="two segments"):
        check_body(Layout(mixed()), segments, MANY)


@pytest.mark.parametrize(
    "wrong",
    [
        segment(10, 10, parameter=99),
        segment(10, 10, parameter=5),  # which has elements
        segment(9, 9, parameter=4),
        segment(10, 10, 1, parameter=4),
        segment(10, 11, parameter=4),
        segment(10, 10, parameter=4, rows=0),
        segment(10, 10, parameter=4, elements=0),
        segment(10, 10),
    ],
)
def test_a_segment_without_elements_names_a_parameter_that_has_none(wrong: Segment) -> None:
    layout = Layout(mixed())
    right = segment(10, 10, parameter=4)
    assert (check_body(layout, [right], 0, of_push=True), layout.slots_of(right)[0].name) == ([0], "empty")
    for segments, of_push in (([wrong], True), ([right, right], True), ([right], False)):
        with pytest.raises(MalformedFrame):
            check_body(layout, segments, MANY, of_push=of_push)


def test_a_parameter_and_its_state_may_come_together() -> None:
    assert check_body(Layout(mixed()), [segment(0, 6), segment(0, 6, state="sum")], 48) == [24, 24]


def test_the_body_is_limited_as_a_whole() -> None:
    segments = [segment(0, 6), segment(6, 10)]
    assert check_body(Layout(mixed()), segments, 40) == [24, 16]
    for limit, huge in ((39, segments), (MANY, [segment(0, 20, 1, rows=2**64 - 1)])):
        with pytest.raises(WrongLength):
            check_body(Layout(mixed()), huge, limit)


@settings(max_examples=200, deadline=None)
@given(wanted=st.sets(st.sampled_from([s.name for s in Layout(mixed()).slots])))
def test_dense_segments_cover_exactly_what_is_asked(wanted: set[str]) -> None:
    layout = Layout(mixed())
    found = layout.dense_segments([slot for slot in layout.slots if slot.name in wanted])
    check_body(layout, [segment for segment, _ in found], MANY)
    covered = [slot.name for segment, _ in found for slot in layout.slots_of(segment)]
    assert sorted(covered) == sorted(wanted - {"empty"})
    assert covered == [slot.name for _, run in found for slot in run]
    pushed = layout.dense_segments([slot for slot in layout.slots if slot.name in wanted], of_push=True)
    check_body(layout, [segment for segment, _ in pushed], MANY, of_push=True)
    named = [slot.name for segment, _ in pushed for slot in layout.slots_of(segment)]
    assert named == covered + ["empty"] * ("empty" in wanted)


def test_dense_segments_join_neighbours() -> None:
    layout = Layout(mixed())
    assert [(s.arena, s.start, s.stop, s.dtype) for s, _ in layout.dense_segments(layout.slots)] == [
        (0, 0, 11, F32),
        (1, 0, 24, F32),
        (2, 0, 3, BF16),
    ]
    half = [slot for slot in layout.slots if slot.name == "half"]
    assert layout.dense_segments(half, state="square_avg")[0][0].dtype == F32
    assert layout.dense_segments(half, torch.float16)[0][0].dtype == F16


HOSTILE: dict[str, Manifest] = {
    "nothing": Manifest(),
    "no parameters": manifest(),
    "no groups": Manifest(parameters=[parameter("a", [1])]),
    "a group that is not there": manifest(parameter("a", [1], 2)),
    "a huge group": manifest(parameter("a", [1], 2**32 - 1)),
    "an empty name": manifest(parameter("", [1])),
    "an endless name": manifest(parameter("x" * 1001, [1])),
    "a name twice": manifest(parameter("a", [1]), parameter("a", [1])),
    "a name that is an alias": manifest(parameter("a", [1]), parameter("b", [1], aliases=["a"])),
    "an alias twice": manifest(parameter("a", [1], aliases=["b", "b"])),
    "itself as an alias": manifest(parameter("a", [1], aliases=["a"])),
    "an empty alias": manifest(parameter("a", [1], aliases=[""])),
    "too large": manifest(parameter("a", [2**48])),
    "too large by its product": manifest(parameter("a", [2**24, 2**24])),
    "overflowing": manifest(parameter("a", [2**63, 2**63])),
    "hidden behind a zero": manifest(parameter("a", [0, 2**63])),
    "too large together": manifest(parameter("a", [2**47]), parameter("b", [2**47])),
    "too many dimensions": manifest(parameter("a", [1] * (MAX_DIMENSIONS + 1))),
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_hostile_manifests(hostile: Manifest) -> None:
    with pytest.raises(InvalidManifest):
        Layout(hostile)


@pytest.mark.parametrize("dtype", [0, 5, 2**31 - 1, -1])
def test_manifest_with_an_unknown_dtype(dtype: int) -> None:
    with pytest.raises(WrongDtype):
        Layout(manifest(parameter("a", [1], 0, dtype)))


@settings(max_examples=150, deadline=None)
@given(
    parameters=st.lists(
        st.builds(
            parameter,
            st.text(max_size=3),
            st.lists(st.integers(0, 2**64 - 1), max_size=3),
            st.integers(0, 3),
            st.integers(0, 6),
        ),
        max_size=4,
    )
)
def test_any_manifest_is_arranged_or_refused_by_name(parameters: list[Parameter]) -> None:
    try:
        layout = Layout(manifest(*parameters))
    except PushstepError as error:
        assert error.code in ("invalid_manifest", "wrong_dtype")
        return
    for arena in layout.arenas:
        at = 0
        for slot in arena.slots:
            assert slot.start == at
            at = slot.stop
        assert at == arena.elements


def test_with_group_adds_at_the_end_and_moves_nothing() -> None:
    layout = Layout(mixed())
    added = manifest(parameter("new", [3]), parameter("new2", [2], 0, F64), rules=["adagrad"])
    grown = with_group(layout, added)
    assert grown.slots[: len(layout.slots)] == layout.slots
    assert [(s.name, s.group, s.arena) for s in grown.slots[-2:]] == [("new", 2, 3), ("new2", 2, 4)]
    assert with_group(grown, added) is grown


@pytest.mark.parametrize(
    "added",
    [
        manifest(parameter("n", [1])),
        manifest(rules=["adagrad"]),
        manifest(parameter("a", [1]), rules=["adagrad"]),
        manifest(parameter("b.tied", [1]), rules=["adagrad"]),
    ],
    ids=["two groups", "no parameters", "a name that is taken", "an alias that is taken"],
)
def test_with_group_refuses(added: Manifest) -> None:
    with pytest.raises(InvalidManifest):
        with_group(Layout(mixed()), added)
