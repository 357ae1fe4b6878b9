"""A model's snapshots in a store of objects: sent whole or not at all, whatever the store does with what it is given."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pushstep.proto.errors import SnapshotDamaged, SnapshotsAway, SnapshotsOwned, StorageFailed
from pushstep.server.process.secrets import Secrets
from pushstep.server.remote import bucket as bucket_module
from pushstep.server.remote.bucket import Bucket, shown
from pushstep.server.remote.remote import Remote
from pushstep.server.storage.model_folder import IdentityFile, ModelFolder
from pushstep.server.storage.snapshot_reader import MANIFEST
from pushstep.server.storage.snapshots import Snapshots
from tests.server.test_snapshots import FACTS, copy_of
from tests.support.disks.histories import every

UID = bytes(range(16))


class Store:
    """A memory store with a data folder of one model, whose calls a test may replace."""

    def __init__(self, data: Path, url: str) -> None:
        self.data, self.url = data, url
        self.remote = Remote(Bucket(url, call_s=0.25), data)
        self.model = data / "models" / "m"
        ModelFolder(self.model).write_identity(IdentityFile(UID, 1, None, ()))
        self.remote.open(takeover=False)
        self.objects = self.remote.store(self.model)
        self.snapshots = Snapshots(self.objects)

    def write(self, version: int = 1, *, automatic: bool = True) -> str:
        return str(self.snapshots.write(FACTS, copy_of(version).captured(), automatic=automatic)["id"])

    @property
    def files(self) -> Any:
        return self.remote.bucket._files

    def key(self, snapshot: str, file: str) -> str:
        return self.remote.bucket._path(self.objects._key(snapshot, file))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(bucket_module, "WAITS_S", (0.0,))
    return Store(tmp_path, f"memory://{uuid.uuid4().hex}/run")


def test_a_snapshot_is_sent_and_read_from_there(store: Store) -> None:
    snapshot = store.write()
    assert store.objects.unsent() == [snapshot]
    assert store.objects.send_unsent() == snapshot
    assert store.objects.unsent() == []
    assert list((store.model / "snapshots").iterdir()) == []
    assert store.snapshots.ids() == [snapshot]
    manifest, copy = store.snapshots.read(snapshot)
    assert (manifest["id"], copy.version) == (snapshot, 1)
    assert store.snapshots.verified(snapshot)["id"] == snapshot
    store.snapshots.delete(snapshot)
    assert store.snapshots.ids() == []
    assert not store.files.exists(store.key(snapshot, MANIFEST))


def _away(*_: Any, **__: Any) -> None:
    raise ConnectionError("the connection of token-1234567 was refused")


def _hang(*_: Any, **__: Any) -> None:
    time.sleep(1)


def _lose(files: Any, path: str) -> None:
    files.rm_file(path)


def _cut(files: Any, path: str) -> None:
    files.pipe_file(path, files.cat_file(path)[:-1])


def _flip(files: Any, path: str) -> None:
    content = bytearray(files.cat_file(path))
    content[-1] ^= 1
    files.pipe_file(path, bytes(content))


@pytest.mark.parametrize("file", ["arena-0000.safetensors", MANIFEST])
@pytest.mark.parametrize("harm", [_lose, _cut, _flip])
def test_what_is_not_read_back_as_it_was_sent_does_not_count(
    store: Store, harm: Callable[[Any, str], None], file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = store.write(1)
    store.objects.send_unsent()
    snapshot = store.write(2)
    write = store.remote.bucket.write

    def harmed(key: str, parts: Any) -> None:
        write(key, parts)
        if key.endswith(f"{snapshot}/{file}"):
            harm(store.files, store.remote.bucket._path(key))

    monkeypatch.setattr(store.remote.bucket, "write", harmed)
    with pytest.raises(SnapshotsAway):
        store.objects.send_unsent()
    assert store.objects.unsent() == [snapshot]
    assert store.snapshots.prune(1, every) == 0  # the one that is not sent does not count for what is kept
    assert store.snapshots.ids() == [snapshot, before]
    assert store.snapshots.read(snapshot)[1].version == 2  # from the data folder
    monkeypatch.undo()
    assert store.objects.send_unsent() == snapshot
    store.snapshots.prune(1, every)
    assert store.snapshots.ids() == [snapshot]


@pytest.mark.parametrize("harm", [_lose, _cut, _flip])
@pytest.mark.parametrize("file", ["arena-0000.safetensors", MANIFEST])
def test_what_a_store_loses_later_is_damage_and_an_older_one_is_read(
    store: Store, harm: Callable[[Any, str], None], file: str
) -> None:
    older = store.write(1)
    store.objects.send_unsent()
    newer = store.write(2)
    store.objects.send_unsent()
    harm(store.files, store.key(newer, file))
    with pytest.raises(SnapshotDamaged):
        store.snapshots.read(newer)
    found = store.snapshots.newest()
    assert found is not None
    assert found[0]["id"] == older
    assert store.snapshots.ids() == [newer, older]  # nothing is deleted
    again = Remote(Bucket(store.url), store.data).store(store.model)
    Snapshots(again).prune(1, every)  # of a process that has not read them back
    assert again.holds(older)


@pytest.mark.parametrize("fault", [_away, _hang])
@pytest.mark.parametrize("call", ["open", "cat_file", "info"])
def test_a_store_that_is_away_changes_nothing(
    store: Store, fault: Callable[..., None], call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORE_TOKEN", "token-1234567")
    Bucket(store.url)  # reads the environment
    kept = store.write(1)
    store.objects.send_unsent()
    snapshot = store.write(2)
    monkeypatch.setattr(store.files, call, fault, raising=True)
    with pytest.raises(SnapshotsAway) as raised:
        store.objects.send_unsent()
    assert "token-1234567" not in str(raised.value)
    assert raised.value.__cause__ is None
    assert store.objects.unsent() == [snapshot]
    assert store.snapshots.ids() == [snapshot, kept]  # which asks nobody
    if call != "open":
        with pytest.raises(SnapshotsAway):
            store.snapshots.newest(lambda timeline, version: version == 1)
        with pytest.raises(SnapshotsAway):
            store.snapshots.delete(kept)
    monkeypatch.undo()
    assert store.snapshots.read(kept)[1].version == 1
    assert store.objects.send_unsent() == snapshot


def test_of_automatic_ones_that_wait_the_newest_is_sent(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = store.write(1, automatic=False)
    waiting = [store.write(version) for version in (2, 3)]
    monkeypatch.setattr(store.files, "open", _away)
    with pytest.raises(SnapshotsAway):
        store.objects.send_unsent()
    assert sorted(store.objects.unsent()) == [asked, waiting[-1]]
    monkeypatch.undo()
    store.objects.send_unsent()
    assert store.snapshots.ids() == [waiting[-1], asked]


def test_a_list_that_lacks_a_snapshot_hides_none(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = store.write(1)
    store.objects.send_unsent()
    monkeypatch.setattr(store.files, "ls", lambda *_, **__: [])
    store.objects.open()
    assert store.snapshots.ids() == [snapshot]
    assert store.snapshots.read(snapshot)[1].version == 1


def test_a_list_adds_what_the_index_lacks_if_it_is_whole(store: Store) -> None:
    whole = store.write(1)
    store.objects.send_unsent()
    (store.model / "stored.json").write_text("{}")  # of other bytes
    arena = "arena-0000.safetensors"
    store.files.cp_file(store.key(whole, arena), store.key("t1-v9-e0-1", arena))
    store.objects.open()
    assert store.snapshots.ids() == [whole]  # what has no manifest is none


def test_a_deletion_that_broke_off_is_finished_at_the_next_start(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = store.write(1)
    store.objects.send_unsent()
    monkeypatch.setattr(store.files, "rm", _away)
    store.snapshots.delete(snapshot)
    assert store.snapshots.ids() == []
    again = store.write(1)  # of the same state, and not of the same name
    assert again != snapshot
    store.objects.discard(again)
    monkeypatch.undo()
    assert store.files.exists(store.key(snapshot, "arena-0000.safetensors"))
    store.objects.open()
    assert store.snapshots.ids() == []
    assert not store.files.exists(store.key(snapshot, "arena-0000.safetensors"))


def test_a_url_has_one_owner(store: Store, tmp_path: Path) -> None:
    snapshot = store.write(1)
    other = Remote(Bucket(store.url), tmp_path / "other")
    (tmp_path / "other").mkdir()
    with pytest.raises(SnapshotsOwned, match="takeover"):
        other.open(takeover=False)
    other.open(takeover=True)
    with pytest.raises(SnapshotsOwned):
        store.objects.send(snapshot)
    assert store.objects.unsent() == [snapshot]
    # a copy of a data folder is the same server, of which the later start has the place
    again = Remote(Bucket(store.url), tmp_path / "other")
    again.open(takeover=False)
    with pytest.raises(SnapshotsOwned):
        other.require_owned()


def test_an_empty_place_is_not_taken_for_the_one_that_was_used(store: Store) -> None:
    store.files.rm_file(store.remote.bucket._path("owner.json"))
    with pytest.raises(SnapshotsAway, match="is it that place"):
        Remote(Bucket(store.url), store.data).open(takeover=False)
    with pytest.raises(SnapshotsAway, match="any more"):
        store.objects.send(store.write(1))


URLS = {
    "s3://key:topsecret@bucket/path": ("s3://bucket/path", "pip install s3fs"),
    "/mnt/snapshots": (None, "no URL"),
    "nosuch://host/path": ("nosuch://host/path", "no store is known"),
    "file://": (None, "no URL"),
    "simplecache::s3://bucket/path": (None, "no chain"),
}


@pytest.mark.parametrize("url", URLS)
def test_urls_that_are_of_no_use(url: str) -> None:
    name, problem = URLS[url]
    with pytest.raises(StorageFailed, match=problem) as raised:
        Bucket(url)
    assert "topsecret" not in str(raised.value)
    assert name is None or name in str(raised.value)


def test_secrets_are_hidden_in_every_form() -> None:
    secrets = Secrets()
    secrets.add(["p/ss w%rd", 'q"ü\\x', "abc"])
    secrets.add_environment({"AWS_SECRET_ACCESS_KEY": "k-123456", "HOME": "/root", "X_PASSWORD": ""})
    assert secrets.hide("p/ss w%rd p%2Fss%20w%25rd k-123456 /root abc") == "*** *** *** /root abc"
    assert secrets.hide(json.dumps('of q"ü\\x')) == '"of ***"'
    assert secrets.hide(json.dumps('of q"ü\\x', ensure_ascii=False)) == '"of ***"'
    assert shown("ftp://me:word@host:21/path?sig=1#x") == "ftp://host:21/path"


def test_a_large_file_is_sent_and_read_in_chunks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_module, "CHUNK_BYTES", 64)
    monkeypatch.setattr("pushstep.server.remote.object_store.CHUNK_BYTES", 64)
    sizes: list[int] = []
    write = store.remote.bucket.write

    def counted(key: str, parts: Any) -> None:
        held = list(parts)
        sizes.extend(map(len, held))
        write(key, held)

    monkeypatch.setattr(store.remote.bucket, "write", counted)
    snapshot = store.write(1)
    store.objects.send_unsent()
    assert max(sizes) == 64
    assert store.snapshots.read(snapshot)[1].version == 1
