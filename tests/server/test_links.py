"""Snapshots of changed rows: a chain holds what one whole snapshot would, its bytes are verified, and no link loses its base."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pushstep.proto.errors import SnapshotDamaged, UnknownSnapshot
from pushstep.proto.types_pb2 import DType, GroupValues, Manifest, Parameter, ParamGroup, Ticket
from pushstep.proto.wire.hyperparameters import wire_values
from pushstep.proto.wire.layout import Layout
from pushstep.server.arenas.arena import Arenas
from pushstep.server.arenas.arenas_copy import ArenasCopy
from pushstep.server.arenas.extras import Extras
from pushstep.server.captures.capture import spans_of
from pushstep.server.coordinator.groups import Group
from pushstep.server.devices.device import Device
from pushstep.server.staging.gradient import DensePart, RowsPart
from pushstep.server.storage import chains
from pushstep.server.storage.chains import HIDDEN, Base, base_of
from pushstep.server.storage.snapshot_manifest import MOST_LINKS
from pushstep.server.storage.snapshots import Snapshots
from pushstep.server.storage.store import FolderStore
from tests.server.test_snapshots import FACTS
from tests.support.disks.histories import every

GROUPS = [ParamGroup(rule="adagrad"), ParamGroup(rule="adadelta")]
LAYOUT = Layout(
    Manifest(
        parameters=[
            Parameter(name="before", shape=[2], dtype=DType.DTYPE_FLOAT32),
            Parameter(name="table", shape=[300, 2], dtype=DType.DTYPE_FLOAT32),
            Parameter(name="behind", shape=[3], dtype=DType.DTYPE_FLOAT32),
            Parameter(name="half", shape=[200, 3], dtype=DType.DTYPE_BFLOAT16, group=1),
        ],
        groups=GROUPS,
    )
)


class Trained:
    """Arenas, their snapshots, and the base of the next one."""

    def __init__(self, folder: Path, layout: Layout = LAYOUT) -> None:
        self.store = Snapshots(FolderStore(folder))
        self.layout = layout
        self.arenas = Arenas(layout, Device())
        self.groups = list(layout.manifest.groups)
        self.values = [Group.make(group).values for group in self.groups]
        self.noise = torch.Generator().manual_seed(0)
        self.base: Base | None = None
        # what each snapshot holds
        self.held: dict[str, ArenasCopy] = {}

    def _step(self, parts: list[DensePart | RowsPart]) -> None:
        groups = [GroupValues(values=wire_values(values)) for values in self.values]
        ticket = Ticket(version=self.arenas.version + 1, groups=groups, lr_scale=1.0, factor=1.0)
        self.arenas.step(ticket, parts)

    def rows(self, name: str, *ids: int) -> None:
        slot = self.layout.slot(name, "m")
        values = torch.randn(len(ids), slot.row_elements, generator=self.noise).to(slot.dtype)
        self._step([RowsPart(slot, torch.tensor(ids), values)])

    def dense(self, name: str) -> None:
        slot = self.layout.slot(name, "m")
        gradient = torch.randn(slot.stop - slot.start, generator=self.noise).to(slot.dtype)
        self._step([DensePart(slot.arena, slot.start, (slot,), gradient)])

    def take(self, *, automatic: bool = True, extras: Extras | None = None) -> str:
        expected = self.arenas.copy()
        content = self.arenas.captured(extras or Extras(), ())
        try:
            groups = [
                {"rule": g.rule, "optimizer": 0, "values": values, "pinned": []}
                for g, values in zip(self.groups, self.values, strict=True)
            ]
            facts = {**FACTS, "groups": groups, "journal": self.arenas.version}
            manifest = self.store.write(facts, content, automatic=automatic, base=self.base)
        finally:
            content.close()
        self.base = base_of(manifest, self.layout)
        self.held[manifest["id"]] = expected
        return str(manifest["id"])

    def links(self, snapshot: str) -> int:
        return len(self.store.chain(snapshot)) - 1

    def bytes(self, snapshot: str) -> int:
        return sum(entry["bytes"] for entry in self.store.manifest(snapshot)["files"])

    def check(self, *snapshots: str) -> None:
        """These, and no others, are there, and each holds what it held."""
        assert set(self.store.ids()) == set(snapshots)
        for snapshot in snapshots:
            manifest, copy = self.store.read(snapshot)
            assert manifest == self.store.verified(snapshot)
            expected = self.held[snapshot]
            assert (copy.version, copy.steps) == (expected.version, expected.steps)
            for index in range(len(copy.parameters)):
                for name, flat in copy.flats(index).items():
                    assert torch.equal(flat, expected.flats(index)[name]), (snapshot, index, name)

    def folders(self) -> set[str]:
        return {name for name in os.listdir(self.store.folder) if not name.startswith(HIDDEN)}


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    """With a whole snapshot of tables that were pushed to."""
    made = Trained(tmp_path / "m" / "snapshots")
    made.rows("table", 0, 299)
    made.rows("half", 5)
    made.take()
    return made


def chain(trained: Trained, links: int) -> list[str]:
    """The ids of a whole snapshot and of links on it, newest first."""
    for number in range(links):
        trained.rows("table", number, number + 1)
        trained.rows("half", number)
        trained.dense("behind")
        trained.take()
    return trained.store.ids()


def test_each_link_holds_the_whole(trained: Trained) -> None:
    found = chain(trained, 5)
    assert [trained.links(snapshot) for snapshot in found] == [5, 4, 3, 2, 1, 0]
    trained.check(*found)
    (newest,) = (trained.store.newest(),)
    assert newest is not None and newest[0]["id"] == found[0]


def test_a_link_takes_little(tmp_path: Path) -> None:
    """Of a table of which 1 % of the rows were touched: at most 3 % of the whole."""
    layout = Layout(
        Manifest(
            parameters=[Parameter(name="table", shape=[20_000, 16], dtype=DType.DTYPE_FLOAT32)],
            groups=GROUPS[:1],
        )
    )
    trained = Trained(tmp_path / "m" / "snapshots", layout)
    trained.rows("table", 1)
    whole = trained.take()
    trained.rows("table", *range(0, 20_000, 100))
    link = trained.take()
    assert trained.links(link) == 1
    assert trained.bytes(link) <= 0.03 * trained.bytes(whole)
    trained.check(whole, link)


NOT_A_LINK: dict[str, Callable[[Trained], object]] = {
    "a dense push to a table": lambda t: t.dense("table"),
    "an upload": lambda t: _upload(t, "table"),
    "a restore": lambda t: t.arenas.load(t.arenas.copy(), 2),
    "an average": lambda t: t.arenas.begin_averages("ema", [0]),
    "many rows": lambda t: t.rows("table", *range(250)),
    "no base": lambda t: setattr(t, "base", None),
    "a base that is gone": lambda t: t.store.delete(t.store.ids()[0]),
    "a base that is damaged": lambda t: _flip(t, t.store.ids()[0]),
}


def _upload(trained: Trained, name: str) -> None:
    arenas, slot = trained.arenas, LAYOUT.slot(name, "m")
    with arenas.writing(spans_of([], [slot])):
        arenas.version += 1
        arenas.view(slot).fill_(2.0)
        arenas.mark_changed(slot, arenas.version)


def _flip(trained: Trained, snapshot: str) -> Path:
    path = trained.store.folder / snapshot / "arena-0000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("what", NOT_A_LINK)
def test_what_no_link_can_hold_is_taken_whole(what: str, trained: Trained) -> None:
    before = set(trained.store.ids())
    NOT_A_LINK[what](trained)
    trained.rows("table", 7)
    snapshot = trained.take()
    assert trained.links(snapshot) == 0
    if what.startswith("a base"):
        assert trained.store.read(snapshot)[1].version == trained.arenas.version
    else:
        trained.check(snapshot, *before)


def test_a_chain_ends(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many links, and sooner when they are large together."""
    found = chain(trained, MOST_LINKS + 2)
    assert trained.links(found[0]) <= 1
    assert max(map(trained.links, found)) <= MOST_LINKS
    monkeypatch.setattr(chains, "LARGEST_SHARE", 0.1)
    for _ in range(10):
        trained.rows("table", *range(10))
        trained.take()
    found = trained.store.ids()
    assert 0 < max(map(trained.links, found[:8])) < 8
    trained.check(*found)


def test_a_link_with_extras(trained: Trained) -> None:
    """They are written whole, and are not those of the base."""
    trained.rows("table", 1)
    first = trained.take(extras=Extras({"buffer": torch.ones(3)}))
    trained.rows("table", 2)
    second = trained.take(
        extras=Extras({"buffer": torch.zeros(2), "other": torch.ones((), dtype=torch.bool)})
    )
    assert [trained.links(snapshot) for snapshot in (first, second)] == [1, 2]
    assert trained.store.read(first)[1].extras["buffer"].tolist() == [1.0] * 3
    assert trained.store.read(second)[1].extras["buffer"].tolist() == [0.0] * 2


def test_a_table_that_was_none_before(tmp_path: Path) -> None:
    """A link has a parameter whole until it is pushed to by rows, and its rows from then on."""
    trained = Trained(tmp_path / "m" / "snapshots")
    trained.dense("half")
    trained.rows("table", 3)
    trained.take()
    for number in range(4):
        trained.rows("table", number)
        if number == 1:
            trained.dense("half")
        if number > 1:
            trained.rows("half", number)
        trained.take()
    trained.check(*trained.store.ids())


# Retention.


def test_a_deleted_base_stays_hidden_while_a_link_needs_it(trained: Trained) -> None:
    *links, whole = chain(trained, 3)
    trained.store.delete(whole)
    trained.store.delete(links[1])
    trained.check(links[0], links[2])
    for look in (trained.store.read, trained.store.verified, trained.store.delete):
        with pytest.raises(UnknownSnapshot):
            look(whole)
    assert trained.store.manifests(ids=[whole]) == []
    assert trained.folders() == {*links, whole}
    again = Snapshots(FolderStore(trained.store.folder))
    again.sweep()
    trained.check(links[0], links[2])
    trained.store.delete(links[0])
    assert trained.folders() == {links[2], whole}
    trained.check(links[2])
    trained.store.delete(links[2])
    assert os.listdir(trained.store.folder) == []


def test_an_id_that_is_hidden_is_not_given_out_again(trained: Trained) -> None:
    (whole,) = trained.store.ids()
    trained.rows("table", 1)
    link = trained.take()
    trained.store.delete(whole)
    trained.arenas.version -= 1
    trained.base = None
    assert trained.take() not in (whole, link)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_pruning_keeps_what_kept_ones_need_and_one_that_stands_apart(keep: int, trained: Trained) -> None:
    chain(trained, 3)
    trained.base = None
    found = chain(trained, 5)
    record = trained.store.prune(keep, every)
    kept = found[:keep]
    if keep > 1:  # all of these stand on one whole snapshot
        kept = [*kept, next(s for s in found if trained.held[s].version < trained.held[found[4]].version)]
    trained.check(*kept)
    assert record == trained.held[kept[-1]].version
    assert trained.store.prune(keep, every) == record
    trained.check(*kept)
    trained.base = None
    newest = trained.take()
    trained.store.prune(1, every)
    trained.check(newest)
    assert trained.folders() == {newest}


def test_damage_is_told_apart_and_nothing_is_removed_for_it(trained: Trained) -> None:
    """A link whose base is damaged is damaged; what it may need stays, and an older one is taken."""
    (older,) = trained.store.ids()
    trained.base = None
    trained.rows("table", 4)
    trained.dense("before")
    trained.take()
    *links, whole, _ = chain(trained, 2)
    _flip(trained, whole)
    for snapshot in links:
        with pytest.raises(SnapshotDamaged, match=whole):
            trained.store.read(snapshot)
        with pytest.raises(SnapshotDamaged, match=whole):
            trained.store.verified(snapshot)
    found = trained.store.newest()
    assert found is not None and found[0]["id"] == older
    before = trained.folders()
    trained.store.prune(1, every)
    assert trained.folders() == before


def damages(content: bytes) -> Iterator[bytes]:
    for at in range(0, len(content), 7):
        yield content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :]
        yield content[:at]


def test_every_damage_to_a_base_is_seen_in_a_link(trained: Trained) -> None:
    """In its manifest, its arenas, its rows; and another snapshot in its place."""
    newest, base, whole = chain(trained, 2)
    for snapshot in (base, whole):
        for path in sorted((trained.store.folder / snapshot).iterdir()):
            content = path.read_bytes()
            for bad in itertools.islice(damages(content), 0, None, 5):
                path.write_bytes(bad)
                with pytest.raises(SnapshotDamaged):
                    trained.store.read(newest)
            path.unlink()
            with pytest.raises(SnapshotDamaged):
                trained.store.read(newest)
            path.write_bytes(content)
    (trained.store.folder / base).rename(trained.store.folder / "aside")
    with pytest.raises(SnapshotDamaged, match=f"{base} is missing"):
        trained.store.read(newest)
    (trained.store.folder / "aside").rename(trained.store.folder / base)
    trained.check(newest, base, whole)
