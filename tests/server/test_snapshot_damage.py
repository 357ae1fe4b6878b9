"""Damage to a small snapshot, as a start sees it: each byte flipped, each cut, with a journal behind it and without."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pushstep.proto.errors import ModelNotLoaded, PushstepError, SnapshotDamaged, SnapshotUnsupported
from pushstep.proto.types_pb2 import DType, Manifest, Parameter, ParamGroup
from pushstep.proto.wire.layout import Layout
from pushstep.server.config import Config
from pushstep.server.models.catalog import Catalog
from pushstep.server.models.saved_models import SavedModels
from pushstep.server.storage.snapshots import Snapshots
from pushstep.server.storage.store import FolderStore
from tests.server.test_links import Trained
from tests.support.servers.harness import running_server, start_server
from tests.support.workers.wire import created

Change = Callable[[dict[str, Any]], object]
PUSHES = 3


@dataclass(frozen=True)
class Kept:
    """A model's folder after a server's end, and the version that a start has of it."""

    data: Path
    version: int
    # whether a journal is behind its snapshots
    has_journal: bool

    @property
    def snapshots(self) -> Snapshots:
        return Snapshots(FolderStore(self.data / "models" / "m" / "snapshots"))


@pytest.fixture(scope="module", params=["no journal", "journal"])
def template(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """Two snapshots: the one at its creation, and a later one. With a journal, pushes are in front of it and behind."""
    data, has_journal = tmp_path_factory.mktemp("template") / "data", request.param == "journal"
    options = ("--durability", "durable") if has_journal else ()
    server = start_server(data, *options, "--snapshot-every-s", "600")
    session = created(server, "m")
    server.rest("POST", "/v1/models/m/snapshots").raise_for_status()
    for _ in range(PUSHES if has_journal else 0):
        session.push({"bias": np.ones(4, np.float32)})
    server.stop(signal.SIGKILL)
    with pytest.warns(RuntimeWarning, match="could not leave"):
        session.close()
    return Kept(data, 1 + (PUSHES if has_journal else 0), has_journal)


@pytest.fixture
def kept(template: Kept, tmp_path: Path) -> Iterator[Kept]:
    shutil.copytree(template.data / "models", tmp_path / "data" / "models")
    yield Kept(tmp_path / "data", template.version, template.has_journal)


def started(kept: Kept) -> tuple[int, str] | None:
    """(version, snapshot) that a start has of the model; None if it refuses it. It writes nothing."""

    async def start() -> tuple[int, str]:
        catalog = Catalog(Config(data=kept.data))
        brought = await SavedModels(catalog).bring_back("m")
        assert brought is not None
        model, found = brought
        await model.close()
        return model.version, found.state.snapshot

    try:
        return asyncio.run(start())
    except ModelNotLoaded:
        return None


def names(kept: Kept) -> list[str]:
    return sorted(str(path) for path in (kept.data / "models").rglob("*"))


def damages(content: bytes) -> Iterator[bytes]:
    """Every byte flipped, every truncation, and a few bytes more."""
    for at in range(len(content)):
        yield content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :]
    for length in range(len(content)):
        yield content[:length]
    yield content + b"\0"


@pytest.mark.parametrize("template", ["journal"], indirect=True)
def test_every_damage_is_seen(kept: Kept) -> None:
    store = kept.snapshots
    newer, older = store.ids()
    for path in sorted((store.folder / newer).iterdir()):
        content = path.read_bytes()
        for number, bad in enumerate(damages(content)):
            path.write_bytes(bad)
            with pytest.raises(SnapshotDamaged):
                store.read(newer)
            if number % 32 == 0:
                found = store.newest()
                assert found is not None and found[0]["id"] == older
        path.write_bytes(content)
    assert store.read(newer)


def test_every_damage_to_a_link_and_to_its_base_is_seen(tmp_path: Path) -> None:
    """The link is damaged with its base, and an older snapshot, which stands apart, is taken."""
    layout = Layout(
        Manifest(
            parameters=[
                Parameter(name="table", shape=[40, 2], dtype=DType.DTYPE_FLOAT32),
                Parameter(name="bias", shape=[1], dtype=DType.DTYPE_FLOAT32),
            ],
            groups=[ParamGroup(rule="adagrad")],
        )
    )
    trained = Trained(tmp_path / "m" / "snapshots", layout)
    trained.rows("table", 1)
    apart = trained.take()
    trained.base = None
    trained.rows("table", 2)
    base = trained.take()
    trained.rows("table", 7, 39)
    link = trained.take()
    store = trained.store
    assert [entry["id"] for entry in store.chain(link)] == [base, link]
    for path in (path for name in (link, base) for path in sorted((store.folder / name).iterdir())):
        content = path.read_bytes()
        step = 1 if path.parent.name == link else 5  # whole snapshots are tried above
        for number, bad in enumerate(itertools.islice(damages(content), 0, None, step)):
            path.write_bytes(bad)
            with pytest.raises(SnapshotDamaged):
                store.read(link)
            if number % 64 == 0:
                found = store.newest()
                assert found is not None and found[0]["id"] == (apart if path.parent.name == base else base)
        path.write_bytes(content)
    trained.check(apart, base, link)


def test_a_start_takes_an_older_snapshot_for_a_damaged_one(kept: Kept) -> None:
    """The journal leads from it to the same version. Nothing is deleted, and nothing is written."""
    store = kept.snapshots
    newer, older = store.ids()
    assert started(kept) == (kept.version, newer)
    before = names(kept)
    instead = kept.version if kept.has_journal else 0
    for path in sorted((store.folder / newer).iterdir()):
        content = path.read_bytes()
        for bad in itertools.islice(damages(content), 3, None, 251):
            path.write_bytes(bad)
            assert started(kept) == (instead, older)
            assert path.read_bytes() == bad
        path.write_bytes(content)
    assert names(kept) == before
    assert started(kept) == (kept.version, newer)


def test_a_start_is_refused_when_no_snapshot_is_whole(kept: Kept) -> None:
    """A journal alone makes no model."""
    store = kept.snapshots
    shutil.rmtree(store.folder / store.ids()[1])
    (only,) = store.ids()
    before = names(kept)
    for path in sorted((store.folder / only).iterdir()):
        content = path.read_bytes()
        for bad in itertools.islice(damages(content), 7, None, 256):
            path.write_bytes(bad)
            assert started(kept) is None
            assert path.read_bytes() == bad
        path.write_bytes(content)
    assert names(kept) == before
    assert started(kept) == (kept.version, only)


# The digests of files.


def resealed(store: Snapshots, snapshot: str, change: Change) -> None:
    """A manifest in which the entries of files are other ones, under a digest that is right."""
    path = store.folder / snapshot / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["files"]:
        change(entry)
    del manifest["digest"]
    manifest["digest"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest))


def as_older_builds_wrote(store: Snapshots, snapshot: str) -> None:
    def change(entry: dict[str, Any]) -> None:
        del entry["xxh3_128"]
        entry["sha256"] = hashlib.sha256((store.folder / snapshot / entry["file"]).read_bytes()).hexdigest()

    resealed(store, snapshot, change)


def test_older_snapshots_load_and_are_verified(kept: Kept) -> None:
    store = kept.snapshots
    newest = store.ids()[0]
    new = store.read(newest)[1]
    as_older_builds_wrote(store, newest)
    manifest, old = store.read(newest)
    assert all(set(entry) & {"xxh3_128", "sha256"} == {"sha256"} for entry in manifest["files"])
    assert all(a.equal(b) for a, b in zip(old.parameters, new.parameters, strict=True))
    assert store.verified(newest) == manifest
    assert started(kept) == (kept.version, newest)
    path = store.folder / newest / "arena-0000.safetensors"
    content = path.read_bytes()
    for bad in damages(content):
        path.write_bytes(bad)
        for look in (store.read, store.verified):
            with pytest.raises(SnapshotDamaged):
                look(newest)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda entry: entry.pop("xxh3_128"), SnapshotUnsupported),
        (lambda entry: entry.update(xxh3_128="0" * 31), SnapshotUnsupported),
        (lambda entry: entry.update(xxh3_128="0" * 32), SnapshotDamaged),
        (lambda entry: entry.update(sha256="0" * 64, xxh3_128=None), SnapshotDamaged),
    ],
    ids=["none", "short", "other", "other sha256"],
)
def test_a_digest_that_is_another_or_none(change: Change, kind: type[PushstepError], kept: Kept) -> None:
    store = kept.snapshots
    newest = store.ids()[0]
    resealed(store, newest, change)
    with pytest.raises(kind):
        store.read(newest)


def test_new_snapshots_have_the_fast_digest_only(data: Path) -> None:
    with running_server(data) as server:
        created(server, "m")
        (entry, *_) = server.rest("POST", "/v1/models/m/snapshots").json()["files"]
    assert "xxh3_128" in entry and "sha256" not in entry
