"""A model of several ranks, brought together in one file: every element where it belongs, or a named error."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pushstep.proto.errors import DiskFull, MalformedFrame, VersionGone
from pushstep.proto.shards_pb2 import RankContent
from pushstep.proto.training_pb2 import Shard
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Layout
from pushstep.proto.wire.shards import Part
from pushstep.server.arenas.arenas_copy import ArenasCopy
from pushstep.server.parts.content import CHUNK_BYTES, Content, Wanted, messages_of, tensors_of
from pushstep.server.parts.gathered import Gathered
from pushstep.server.parts.shard import ModelShard
from tests.proto.test_shards import model

VERSION = 5
ALL = Wanted(True, {})


def drawn(layout: Layout, hook: bool) -> ArenasCopy:
    """A model whose elements are all different."""
    generator = torch.Generator().manual_seed(1)

    def flat(elements: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(elements, generator=generator).to(dtype)

    states = [{"sum": flat(a.elements, dtypes.state_dtype(a.dtype))} for a in layout.arenas]
    averages = {a.index: flat(a.elements, dtypes.state_dtype(a.dtype)) for a in layout.arenas if not a.group}
    return ArenasCopy(
        layout,
        1,
        VERSION,
        [flat(arena.elements, arena.dtype) for arena in layout.arenas],
        states,
        list(range(100, 100 + len(layout.slots))),
        averages={"ema": averages} if hook else {},
    )


def part_of(whole: ArenasCopy, part: Part) -> ArenasCopy:
    """What a rank holds of it."""

    def cut(flats: Callable[[int], torch.Tensor | None]) -> dict[int, torch.Tensor]:
        found: dict[int, list[torch.Tensor]] = {}
        for piece, slot in zip(part.pieces, part.layout.slots, strict=True):
            of = whole.layout.slots[piece.whole]
            flat = flats(of.arena)
            if flat is not None:
                found.setdefault(slot.arena, []).append(flat[of.start + piece.start : of.start + piece.stop])
        return {arena: torch.cat(pieces) for arena, pieces in found.items()}

    parameters = cut(whole.parameters.__getitem__)
    states = cut(lambda arena: whole.states[arena]["sum"])
    return ArenasCopy(
        part.layout,
        1,
        VERSION,
        [parameters[arena.index] for arena in part.layout.arenas],
        [{"sum": states[arena.index]} for arena in part.layout.arenas],
        [whole.steps[piece.whole] for piece in part.pieces],
        averages={hook: cut(kept.get) for hook, kept in whole.averages.items()},
    )


def shard_of(layout: Layout, ranks: int) -> ModelShard:
    return ModelShard(layout, 0, [Shard(rank=rank) for rank in range(ranks)])


def sent(shard: ModelShard, whole: ArenasCopy, rank: int, wanted: Wanted) -> list[RankContent]:
    part = shard.parts[rank]
    assert part is not None
    content = Content(1, VERSION, tensors_of(part_of(whole, part), part, shard.whole, wanted))
    return [RankContent.FromString(message) for message in messages_of(rank, 9, content)]


def take_all(gathered: Gathered, messages: list[RankContent]) -> None:
    taking = gathered.taking(messages[0])
    for message in messages:
        taking.take(message)


def elements(copy: ArenasCopy) -> list[bytes]:
    flats = [flat for arena in copy.layout.arenas for flat in copy.flats(arena.index).values()]
    flats += [kept[arena] for kept in copy.averages.values() for arena in sorted(kept)]
    return [flat.contiguous().view(torch.uint8).numpy().tobytes() for flat in flats]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1 << 30), st.integers(1, 8), st.integers(1, 5), st.booleans(), st.booleans())
def test_what_all_ranks_send_is_the_whole(
    tmp_path_factory: pytest.TempPathFactory, seed: int, parameters: int, ranks: int, hook: bool, state: bool
) -> None:
    layout = model(seed, parameters)
    whole, shard = drawn(layout, hook), shard_of(layout, ranks)
    wanted = Wanted(state, {"ema": [0]} if hook else {})
    gathered = Gathered(shard, wanted, tmp_path_factory.getbasetemp())
    for rank in reversed(shard.others):
        messages = sent(shard, whole, rank, wanted)
        assert max(len(message.content) for message in messages) <= CHUNK_BYTES
        take_all(gathered, messages)
    assert shard.part is not None
    own = part_of(whole, shard.part)
    gathered.place(own)
    found = gathered.whole(own)
    gathered.close()
    assert found.layout is layout
    assert found.steps == whole.steps
    expected = whole if state else replace(whole, states=[{} for _ in layout.arenas])
    assert elements(found) == elements(expected)


@pytest.fixture
def gathered(tmp_path: Path) -> Iterator[tuple[Gathered, ModelShard, ArenasCopy]]:
    layout = model(5, 6)
    shard = shard_of(layout, 2)
    file = Gathered(shard, ALL, tmp_path)
    yield file, shard, drawn(layout, hook=False)
    file.close()


def test_an_average_that_a_rank_has_not_begun_is_its_parameters(tmp_path: Path) -> None:
    layout = model(5, 6)
    whole, shard = drawn(layout, hook=True), shard_of(layout, 2)
    gathered = Gathered(shard, Wanted(True, {"ema": [0]}), tmp_path)
    take_all(gathered, sent(shard, drawn(layout, hook=False), 1, Wanted(True, {"ema": [0]})))
    assert shard.part is not None
    own = part_of(whole, shard.part)
    gathered.place(own)
    found = gathered.whole(own)
    gathered.close()
    part = shard.parts[1]
    assert part is not None
    for piece in part.pieces:
        slot = layout.slots[piece.whole]
        if slot.group == 0:
            span = slice(slot.start + piece.start, slot.start + piece.stop)
            average = found.averages["ema"][slot.arena][span]
            assert torch.equal(average, found.parameters[slot.arena][span].to(average.dtype))


def test_what_does_not_fit_is_refused(gathered: tuple[Gathered, ModelShard, ArenasCopy]) -> None:
    file, shard, whole = gathered
    first, *rest, last = sent(shard, whole, 1, ALL)
    with pytest.raises(MalformedFrame, match="rank 7 has no part"):
        file.taking(RankContent(rank=7))
    taking = file.taking(first)
    with pytest.raises(MalformedFrame, match="sends it twice"):
        file.taking(first)
    for message in (first, *rest):
        taking.take(message)
    assert shard.part is not None
    with pytest.raises(MalformedFrame, match="rank 1 has not sent its part"):
        file.whole(part_of(whole, shard.part))
    with pytest.raises(MalformedFrame, match="not what has come"):
        taking.take(RankContent(digest=last.digest ^ 1))
    with pytest.raises(MalformedFrame, match="more than it has"):
        taking.take(RankContent(content=b"more"))


def test_less_than_a_part_is_refused(gathered: tuple[Gathered, ModelShard, ArenasCopy]) -> None:
    file, shard, whole = gathered
    first, *_ = sent(shard, whole, 1, ALL)
    with pytest.raises(MalformedFrame, match="less than it has"):
        file.taking(first).take(RankContent(digest=1))


def test_another_version_is_refused(gathered: tuple[Gathered, ModelShard, ArenasCopy]) -> None:
    file, shard, whole = gathered
    messages = sent(shard, whole, 1, ALL)
    messages[0].version = VERSION + 1
    take_all(file, messages)
    assert shard.part is not None
    with pytest.raises(VersionGone, match=f"version {VERSION} .* rank 1"):
        file.whole(part_of(whole, shard.part))


def test_nothing_is_written_behind_the_end(gathered: tuple[Gathered, ModelShard, ArenasCopy]) -> None:
    """Its descriptor may be another file's by then."""
    file, shard, whole = gathered
    first, *_ = sent(shard, whole, 1, ALL)
    taking = file.taking(first)
    file.close()
    with pytest.raises(MalformedFrame, match="nobody waits"):
        taking.take(first)


def test_a_full_disk_is_named_before_anything_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DiskFull, match="the model of all ranks"):
        Gathered(shard_of(model(5, 6), 2), ALL, tmp_path)
    assert list(tmp_path.iterdir()) == []
