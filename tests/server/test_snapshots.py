"""Snapshots on the disk: complete and verified or not there, whatever the bytes, the crash or the disk does."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pushstep.optim import RULES
from pushstep.proto import types_pb2
from pushstep.proto.errors import ModelNotLoaded, SnapshotDamaged, StorageFailed, UnknownSnapshot
from pushstep.proto.wire.layout import Layout
from pushstep.server.arenas.arenas_copy import ArenasCopy
from pushstep.server.coordinator.gate import Gate
from pushstep.server.storage import snapshot_reader as module
from pushstep.server.storage.checkpoints import Content
from pushstep.server.storage.checkpoints import write as write_export
from pushstep.server.storage.files import write_durably
from pushstep.server.storage.snapshots import Snapshots
from pushstep.server.storage.store import FolderStore
from tests.support.disks.histories import every
from tests.support.servers.harness import running_server, start_server
from tests.support.workers.wire import created, state_of

KEPT = 2

LAYOUT = Layout(
    types_pb2.Manifest(
        parameters=[
            types_pb2.Parameter(name="a", shape=[3], dtype=types_pb2.DType.DTYPE_FLOAT32, aliases=["a2"])
        ],
        groups=[types_pb2.ParamGroup(rule="adagrad")],
    )
)
FACTS = {
    "model": "m",
    "uid": "00",
    "edit": 0,
    "policy": {"policy": "async"},
    "gate": Gate().dump(),
    # numbers that JSON can write in more than one way
    "groups": [
        {
            "rule": "adagrad",
            "optimizer": 0,
            "values": {**RULES["adagrad"].defaults, "lr": 1e-06, "eps": 1e22},
            "pinned": [],
        }
    ],
    "hooks": [],
    "workers": [],
}


def copy_of(version: int, *, timeline: int = 1, value: float | None = None) -> ArenasCopy:
    flat = torch.full((3,), float(version) if value is None else value)
    return ArenasCopy(
        LAYOUT, timeline, version, [flat], [{"sum": flat * 2}], [version], {"buffer": flat[:1] * 3}
    )


@pytest.fixture
def store(tmp_path: Path) -> Snapshots:
    return Snapshots(FolderStore(tmp_path / "m" / "snapshots"))


def taken(store: Snapshots, version: int, *, automatic: bool = False, **more: Any) -> str:
    return str(store.write(FACTS, copy_of(version, **more).captured(), automatic=automatic)["id"])


def damaged(store: Snapshots) -> set[str]:
    return {entry["id"] for entry in store.manifests() if "damaged" in entry}


def test_what_was_written_is_read(store: Snapshots) -> None:
    manifest, copy = store.read(taken(store, 7))
    sent = copy_of(7)
    assert torch.equal(copy.parameters[0], sent.parameters[0])
    assert torch.equal(copy.states[0]["sum"], sent.states[0]["sum"])
    assert torch.equal(copy.extras["buffer"], sent.extras["buffer"])
    assert (copy.version, copy.timeline, copy.steps) == (7, 1, [7])
    assert copy.layout.manifest == LAYOUT.manifest
    assert {key: manifest[key] for key in FACTS} == FACTS
    arena = manifest["files"][0]
    assert (arena["arena"], arena["start"], arena["stop"]) == (0, 0, 3)


def test_newest_first_by_number_and_not_by_name(store: Snapshots) -> None:
    order = [
        taken(store, 9),
        taken(store, 10),
        taken(store, 100),
        taken(store, 2, timeline=2),
        taken(store, 1, timeline=10),
    ]
    assert [entry["id"] for entry in store.manifests()] == order[::-1]
    found = store.newest()
    assert found is not None
    assert found[0]["id"] == order[-1]


def test_an_id_is_never_taken_twice(store: Snapshots) -> None:
    """The same state may be written again, also after one of them was deleted."""
    first, second = taken(store, 1), taken(store, 1, value=5.0)
    store.delete(first)
    third = taken(store, 1)
    assert len({first, second, third}) == 3
    assert {entry["id"] for entry in store.manifests()} == {second, third}
    assert store.read(second)[1].parameters[0].tolist() == [5.0] * 3


READS: dict[str, Callable[[Snapshots, str], object]] = {
    "listed": lambda store, snapshot: store.manifests(),
    "verified": Snapshots.verified,
    "read": Snapshots.read,
}


@pytest.mark.parametrize("files_before", range(3))
@pytest.mark.parametrize("what", READS)
def test_one_that_is_deleted_while_it_is_read_is_not_damaged(
    what: str, files_before: int, store: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of its files is the first that is gone."""
    kept, goes = taken(store, 1), taken(store, 2)
    opened, size_of = store.store.opened, store.store.size_of
    asked: list[str] = []

    def before(snapshot: str) -> None:
        asked.append(snapshot)
        if asked.count(goes) == files_before + 1 and store.store.holds(goes):
            store.store.remove(goes)

    monkeypatch.setattr(store.store, "opened", lambda of, file: (before(of), opened(of, file))[1])
    monkeypatch.setattr(store.store, "size_of", lambda of, file: (before(of), size_of(of, file))[1])
    with contextlib.suppress(UnknownSnapshot):
        assert "damaged" not in str(READS[what](store, goes))
    monkeypatch.undo()
    assert [entry["id"] for entry in store.manifests()] == [kept]


@pytest.mark.parametrize("mask", [0x01, 0x08, 0x20, 0x2A, 0x80, 0xFF], ids=hex)
def test_every_flipped_byte_is_found(mask: int, store: Snapshots) -> None:
    older, newer = taken(store, 1), taken(store, 2)
    folder = store.folder / newer
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for at in range(len(good)):
            path.write_bytes(good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :])
            with pytest.raises(SnapshotDamaged):
                store.read(newer)
            if at % 16 == 0:
                found = store.newest()
                assert found is not None
                assert found[0]["id"] == older
        if path.name == module.MANIFEST:
            assert damaged(store) == {newer}
        path.write_bytes(good)
    assert damaged(store) == set()
    assert store.read(newer)[1].version == 2


def test_truncated_lengthened_and_missing_files_are_found(store: Snapshots) -> None:
    older, newer = taken(store, 1), taken(store, 2)
    for path in sorted((store.folder / newer).iterdir()):
        good = path.read_bytes()
        for bad in (b"", good[:1], good[: len(good) // 2], good[:-1], good + b"\0", good + good, None):
            if bad is None:
                path.unlink()
            else:
                path.write_bytes(bad)
            with pytest.raises(SnapshotDamaged) as caught:
                store.read(newer)
            assert caught.value.fields["snapshot"] == newer
            assert damaged(store) == {newer}
            found = store.newest()
            assert found is not None
            assert found[0]["id"] == older
        path.write_bytes(good)
    assert store.read(newer)[1].version == 2


@pytest.mark.parametrize("name", ["manifest.json", "arena-0000.safetensors", "extras.safetensors", ""])
def test_swapped_files_are_found(name: str, store: Snapshots) -> None:
    """Each is a good file of another snapshot; with "" it is the whole folder, under the other's name."""
    first, second = taken(store, 1), taken(store, 2)
    a, b, aside = store.folder / first / name, store.folder / second / name, store.folder / "aside"
    for source, target in ((a, aside), (b, a), (aside, b)):
        os.replace(source, target)
    for snapshot in (first, second):
        with pytest.raises(SnapshotDamaged):
            store.read(snapshot)
    assert store.newest() is None


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{}", '{"digest": 1}', '"x"', "{" * 5000, "\xff"])
def test_a_manifest_that_is_something_else(text: str, store: Snapshots) -> None:
    snapshot = taken(store, 1)
    (store.folder / snapshot / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(SnapshotDamaged):
        store.read(snapshot)
    assert damaged(store) == {snapshot}


def test_a_damaged_one_is_never_deleted_or_written_over(store: Snapshots) -> None:
    """Not by taking the same state again, not by pruning, also when only an arena's bytes are wrong."""
    bad = taken(store, 1, automatic=True)
    good = [taken(store, version, automatic=True) for version in range(2, 5)]
    kept = taken(store, 1)
    path = store.folder / bad / "arena-0000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    store.prune(KEPT, every)
    left = {entry["id"] for entry in store.manifests()}
    assert left == {bad, kept, *good[-KEPT:]}
    assert path.read_bytes() == content
    assert store.read(taken(store, 1))[1].version == 1
    with pytest.raises(SnapshotDamaged):
        store.read(bad)


def test_damaged_ones_do_not_count_as_kept(store: Snapshots) -> None:
    """Or the last good one would be deleted in favour of two that nobody can load."""
    good = taken(store, 1, automatic=True)
    for version in range(2, 2 + KEPT):
        path = store.folder / taken(store, version, automatic=True) / "arena-0000.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\xaa")
    store.prune(KEPT, every)
    found = store.newest()
    assert found is not None
    assert found[0]["id"] == good


def test_the_newest_that_the_model_descends_from_is_kept(store: Snapshots) -> None:
    """After a restore, newer ones of a timeline that has ended are no state to go on from."""
    older, own = (taken(store, version, automatic=True) for version in (1, 2))
    undone = [taken(store, version, automatic=True) for version in range(3, 4 + KEPT)]
    store.prune(KEPT, lambda timeline, version: version <= 2)
    assert [entry["id"] for entry in store.manifests()] == [*undone[: -KEPT - 1 : -1], own]
    assert older not in store.ids()


@pytest.mark.parametrize(
    "snapshot", ["", ".", "..", "../..", "t1-v1-e0-1/..", "t1-v1-e0-1\n", "t-v-e-", "tmp-1", "x"]
)
def test_ids_do_not_traverse(snapshot: str, store: Snapshots) -> None:
    taken(store, 1)
    for method in (store.read, store.delete):
        with pytest.raises(UnknownSnapshot):
            method(snapshot)
    assert len(store.manifests()) == 1


def leftovers(store: Snapshots) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir()) if store.folder.exists() else []


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that refuses to write further than this into a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 300])
def test_a_full_disk(size: int, store: Snapshots) -> None:
    """At 300 bytes the arena fits and the manifest does not."""
    first = taken(store, 1)
    with largest_file(size), pytest.raises(StorageFailed) as caught:
        taken(store, 2)
    assert "too large" in caught.value.message.lower()
    assert leftovers(store) == [first]
    assert store.read(first)[1].version == 1
    assert store.read(taken(store, 2))[1].version == 2


def failing(calls: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, but the call of this number fails as a disk does."""
    count = iter(range(10**6))

    def call(*arguments: Any, **keywords: Any) -> Any:
        if next(count) == calls:
            raise OSError(errno.EIO, "the disk is gone")
        return real(*arguments, **keywords)

    return call


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_every_call_to_the_disk_may_fail(
    name: str, store: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = taken(store, 1)
    real = getattr(os, name)
    failures = 0
    for number in range(100):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing(number, real))
            try:
                taken(store, 2)
                break
            except StorageFailed as error:
                assert "the disk is gone" in error.message
        failures += 1
        assert leftovers(store) == [first]
        assert store.read(first)[1].version == 1
    assert failures >= {"fsync": 5, "replace": 1}[name]


def test_the_names_of_new_folders_are_forced_to_the_disk(
    store: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        names.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    store.folder.parent.mkdir()
    monkeypatch.setattr(os, "fsync", fsync)
    snapshot = taken(store, 1)
    for name in ("m", "snapshots", "arena-0000.safetensors", "extras.safetensors", "manifest.json"):
        assert name in names
    assert names[-1] == "snapshots"
    assert store.read(snapshot)


def test_an_interrupted_write_is_not_seen_and_swept(store: Snapshots) -> None:
    """The process dies anywhere before the rename: the next start sees what was there before."""
    first = taken(store, 1)
    for name in ("tmp-0", "tmp-1"):
        shutil.copytree(store.folder / first, store.folder / name)
    assert [entry["id"] for entry in store.manifests()] == [first]
    store.sweep()
    assert leftovers(store) == [first]


def test_a_small_file_holds_the_old_text_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "identity.json"
    write_durably(path, "old", "m/identity.json")
    for name, number in (("fsync", 0), ("replace", 0)):
        with monkeypatch.context() as patch, pytest.raises(StorageFailed):
            patch.setattr(os, name, failing(number, getattr(os, name)))
            write_durably(path, "new", "m/identity.json")
        assert path.read_text() == "old"
        assert [entry.name for entry in tmp_path.iterdir()] == ["identity.json"]
    with largest_file(1), pytest.raises(StorageFailed):
        write_durably(path, "newer", "m/identity.json")
    write_durably(path, "new", "m/identity.json")
    assert path.read_text() == "new"


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_an_export_onto_a_full_disk(form: str, tmp_path: Path) -> None:
    facts = {**FACTS, "timeline": 1, "version": 1}
    with largest_file(50), pytest.raises(StorageFailed):
        write_export(facts, copy_of(1), Content(form, state=True), tmp_path)
    assert list(tmp_path.iterdir()) == []


def flip_last(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return bytes(content)


def test_start_falls_back_and_a_restore_of_damage_is_refused(data: Path) -> None:
    """The newest snapshot is damaged: the one before is loaded, on a timeline of its own, and the bytes stay."""
    with running_server(data) as server:
        session = created(server, "m")
        older = server.rest("POST", "/v1/models/m/snapshots").json()["id"]
        before = state_of(server, "m")
        session.push({"bias": np.ones(4, np.float32)})
    folder = data / "models" / "m" / "snapshots"
    (newest,) = (path for path in folder.iterdir() if path.name not in (older, "t1-v0-e0-1"))
    bad = flip_last(newest / "arena-0001.safetensors")
    with running_server(data) as server:
        after = state_of(server, "m")
        same = ("uid", "version", "edit", "export", "body", "steps", "hooks")
        assert [after[key] for key in same] == [before[key] for key in same]
        assert after["timeline"] == 2
        answer = server.rest("POST", f"/v1/models/m/snapshots/{newest.name}/restore")
        assert (answer.status_code, answer.json()["code"]) == (500, "snapshot_damaged")
        for path in (f"/{newest.name}", f"/{newest.name}/content"):
            assert server.rest("GET", f"/v1/models/m/snapshots{path}").json()["code"] == "snapshot_damaged"
        assert state_of(server, "m") == after
    assert (newest / "arena-0001.safetensors").read_bytes() == bad


def test_a_model_that_cannot_be_loaded_is_put_aside_by_hand_only(data: Path) -> None:
    """Its identity or all of its snapshots are damaged; a new model of its name does not mix with its files."""
    with running_server(data) as server:
        for name in ("good", "no-identity", "no-snapshot"):
            created(server, name)
    models = data / "models"
    (models / "no-identity" / "identity.json").write_text('{"uid": 3')
    for snapshot in (models / "no-snapshot" / "snapshots").iterdir():
        flip_last(snapshot / "manifest.json")
    with running_server(data) as server:
        listed = server.rest("GET", "/v1/models").json()
        assert [m["name"] for m in listed["models"]] == ["good"]
        assert [m["name"] for m in listed["not_loaded"]] == ["no-identity", "no-snapshot"]
        log = server.log.read_text()
        for entry in listed["not_loaded"]:
            assert f"model {entry['name']} was not loaded: {entry['problem']}" in log
        assert server.rest("GET", "/v1/capacity").json()["models"]["not_loaded"] == 2
        for name in ("no-identity", "no-snapshot"):
            with pytest.raises(ModelNotLoaded):
                created(server, name)
            assert server.rest("GET", f"/v1/models/{name}").json()["code"] == "model_not_loaded"
            assert server.rest("DELETE", f"/v1/models/{name}").status_code == 204
            created(server, name).push({"bias": np.ones(4, np.float32)})
    aside = sorted(path.name.rpartition("-")[0] for path in models.glob(".lost-*"))
    assert aside == [".lost-no-identity", ".lost-no-snapshot"]
    with running_server(data) as server:
        versions = {m["name"]: m["version"] for m in server.rest("GET", "/v1/models").json()["models"]}
        assert versions == {"good": 1, "no-identity": 2, "no-snapshot": 2}


def test_killed_in_mid_write_the_last_snapshot_stays(data: Path) -> None:
    server = start_server(data)
    session = created(server, "m")
    taken_id = server.rest("POST", "/v1/models/m/snapshots").json()["id"]
    session.push({"bias": np.ones(4, np.float32)})
    session.close()
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    folder = data / "models" / "m" / "snapshots"
    half = folder / "tmp-0123"
    shutil.copytree(folder / taken_id, half)
    (half / "manifest.json").unlink()
    with running_server(data) as server:
        shown = server.rest("GET", "/v1/models/m").json()
        assert (shown["version"], shown["timeline"]) == (1, 2)
        assert [s["id"] for s in server.rest("GET", "/v1/models/m/snapshots").json()["snapshots"]] == [
            taken_id,
            "t1-v0-e0-1",
        ]
        assert not half.exists()
    assert json.loads((data / "models" / "m" / "identity.json").read_text())["clean"] is True
