"""Whatever the data folder holds: the other models are served, the bad one is listed, and nothing of it is changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pushstep.proto.errors import ModelLost, ModelNotLoaded
from pushstep.server.storage.snapshot_manifest import arena_file
from tests.support.servers import faulty_server
from tests.support.servers.harness import RunningServer, refused_start, running_server, start_server
from tests.support.workers.wire import created, state_of

Tamper = Callable[[Path], None]
FAULTY = Path(faulty_server.__file__)


def identity_of(model: Path) -> Path:
    return model / "identity.json"


def snapshot_of(model: Path) -> Path:
    (found,) = (model / "snapshots").glob("t*")
    return found


def manifest_of(model: Path) -> Path:
    return snapshot_of(model) / "manifest.json"


def arena_of(model: Path) -> Path:
    return snapshot_of(model) / arena_file(0)


Where = Callable[[Path], Path]


def folder(where: Where) -> Tamper:
    def tamper(model: Path) -> None:
        where(model).unlink()
        where(model).mkdir()

    return tamper


def fifo(where: Where) -> Tamper:
    def tamper(model: Path) -> None:
        where(model).unlink()
        os.mkfifo(where(model))

    return tamper


def unix_socket(where: Where) -> Tamper:
    def tamper(model: Path) -> None:
        path = where(model)
        path.unlink()
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path may not be as long as these are
        try:
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(path.name)
        finally:
            os.chdir(here)

    return tamper


def link(where: Where, target: str | None = None) -> Tamper:
    """A link to a device that never ends, or to the file itself in another place."""

    def tamper(model: Path) -> None:
        path = where(model)
        if target is None:
            kept = path.with_name("kept")
            path.rename(kept)
            path.symlink_to(kept)
        else:
            path.unlink()
            path.symlink_to(target)

    return tamper


def gone(where: Where) -> Tamper:
    return lambda model: where(model).unlink()


def text(where: Where, content: str | bytes) -> Tamper:
    return lambda model: (
        where(model).write_bytes(content.encode() if isinstance(content, str) else content) and None
    )


def huge(where: Where) -> Tamper:
    """A sparse file, longer than any of its kind."""
    return lambda model: os.truncate(where(model), 3 << 30)


def identity(**changes: Any) -> Tamper:
    """identity.json with other values; Ellipsis takes a key out."""

    def tamper(model: Path) -> None:
        saved = {**json.loads(identity_of(model).read_text()), **changes}
        kept = {key: value for key, value in saved.items() if value is not ...}
        identity_of(model).write_text(json.dumps(kept))

    return tamper


def resealed(change: Callable[[dict[str, Any]], object]) -> Tamper:
    """A manifest that says something else, under a digest that is right."""

    def tamper(model: Path) -> None:
        manifest = json.loads(manifest_of(model).read_text())
        change(manifest)
        manifest.pop("digest", None)
        manifest["digest"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        manifest_of(model).write_text(json.dumps(manifest))

    return tamper


def put(*path: Any) -> Tamper:
    """A re-sealed manifest with the last of `path` in the place that the others name; Ellipsis takes it out."""
    *keys, last, value = path

    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in keys:
            place = place[key]
        if value is ...:
            del place[last]
        else:
            place[last] = value

    return resealed(change)


def of_timeline_2(model: Path) -> None:
    """A snapshot of a timeline that the model has not come to."""
    resealed(lambda m: m.update(timeline=2, id="t2-v1-e0-1"))(model)
    snapshot_of(model).rename(model / "snapshots" / "t2-v1-e0-1")


HOOK = {"id": "x-1", "name": "x", "point": "step_pre", "settings": {}, "state": {}}
WORKER: dict[str, Any] = {"name": "w", "state": "asleep"}
# by name: what is done to a model's folder, and a word of the reason that is given
CASES: dict[str, tuple[Tamper, str]] = {
    **{
        f"{name}-of-{what}": (kind(where), "not a regular file")
        for name, kind in (("folder", folder), ("fifo", fifo), ("socket", unix_socket), ("link", link))
        for what, where in (("identity", identity_of), ("manifest", manifest_of), ("arena", arena_of))
    },
    "identity-zero": (link(identity_of, "/dev/zero"), "not a regular file"),
    "manifest-zero": (link(manifest_of, "/dev/zero"), "not a regular file"),
    "arena-zero": (link(arena_of, "/dev/zero"), "not a regular file"),
    "identity-gone": (gone(identity_of), "missing"),
    "manifest-gone": (gone(manifest_of), "No such file"),
    "arena-gone": (gone(arena_of), "No such file"),
    "identity-empty": (text(identity_of, ""), "identity.json"),
    "identity-huge": (huge(identity_of), "longer than"),
    "manifest-huge": (huge(manifest_of), "longer than"),
    "arena-huge": (huge(arena_of), "another length"),
    "identity-deep": (text(identity_of, "[" * 100_000), "identity.json"),
    "manifest-deep": (text(manifest_of, "[" * 100_000), "manifest"),
    "identity-binary": (text(identity_of, bytes(range(256))), "identity.json"),
    "manifest-binary": (text(manifest_of, bytes(range(256))), "manifest"),
    "identity-other": (text(identity_of, '["uid"]'), "identity.json"),
    "timeline-infinite": (identity(timeline=float("inf")), "timeline"),
    "timeline-nan": (identity(timeline=float("nan")), "timeline"),
    "timeline-negative": (identity(timeline=-1), "timeline"),
    "timeline-huge": (identity(timeline=10**30), "timeline"),
    "timeline-behind": (of_timeline_2, "go to timeline 2"),
    "timeline-missing": (identity(timeline=...), "timeline"),
    "timeline-text": (identity(timeline="1"), "timeline"),
    "uid-short": (identity(uid="00"), "uid"),
    "uid-none": (identity(uid=None), "uid"),
    "lineage-strange": (identity(lineage=[[1]]), "lineage"),
    "clean-number": (identity(clean=1), "clean"),
    "rule-unknown": (put("groups", 0, "rule", "adamw"), "adamw"),
    "hook-unknown": (resealed(lambda m: m["hooks"].append(HOOK)), "no hook 'x'"),
    "policy-unknown": (put("policy", {"policy": "eager"}), "eager"),
    "gate-unknown": (put("gate", {"strict": True}), "gate"),
    "worker-unknown": (resealed(lambda m: m["workers"].append(WORKER)), "workers"),
    "format-unknown": (put("format", 3), "format 3"),
    "shape-other": (put("parameters", 0, "shape", [5, 4]), "do not hold"),
    "shape-negative": (put("parameters", 0, "shape", [-5, 3]), "shape"),
    "shape-huge": (put("parameters", 0, "shape", [2**62, 3]), "impossible shape"),
    "shape-infinite": (put("parameters", 0, "shape", [float("inf"), 3]), "shape"),
    "dtype-other": (put("parameters", 0, "dtype", "float64"), "does not hold"),
    "dtype-unknown": (put("parameters", 0, "dtype", "int4"), "dtype"),
    "group-unknown": (put("parameters", 0, "group", 7), "group"),
    "name-twice": (put("parameters", 1, "name", "table"), "used twice"),
    "parameters-none": (put("parameters", []), "parameters"),
    "groups-none": (put("groups", []), "groups"),
    "files-none": (put("files", []), "files"),
    "files-missing": (put("files", ...), "files"),
    "files-repeated": (resealed(lambda m: m["files"].append(m["files"][0])), "files"),
    "files-fewer": (resealed(lambda m: m["files"].pop()), "do not hold"),
    "files-elsewhere": (put("files", 0, "file", "../../../good/identity.json"), "files"),
    "files-longer": (put("files", 0, "stop", 16), "do not hold"),
    "files-negative": (put("files", 0, "bytes", -1), "files"),
    "steps-fewer": (put("steps", [1]), "step counts"),
    "steps-negative": (put("steps", 0, -1), "steps"),
    "steps-huge": (put("steps", 0, 2**70), "steps"),
    "version-other": (put("version", 9), "the id is not that"),
    "version-text": (put("version", "1"), "version"),
    "values-missing": (put("groups", 0, "values", {"lr": 0.1}), "has the values"),
    "values-text": (put("groups", 0, "values", "lr", "much"), "values"),
    "id-other": (put("id", "t1-v7-e0-1"), "another id"),
}
"""Every one of them has one snapshot, so there is none to fall back on."""


def inventory(model: Path) -> dict[str, tuple[Any, ...]]:
    """Every path below a model's folder, and what it is."""
    found = {}
    for path in sorted(model.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) and status.st_size < 1 << 20 else b""
        found[str(path.relative_to(model))] = (status.st_mode, status.st_size * path.is_file(), content)
    return found


@dataclass
class Found:
    """What a start made of all the bad models at once."""

    problems: dict[str, str]
    served: list[str]
    state: dict[str, Any]
    refused: dict[str, str]
    log: str
    status: int
    before: dict[str, dict[str, tuple[Any, ...]]]
    after: dict[str, dict[str, tuple[Any, ...]]]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder after an orderly stop, with the models `bad` and `good`."""
    data = tmp_path_factory.mktemp("template") / "data"
    with running_server(data) as server:
        for name in ("bad", "good"):
            created(server, name)
    for model in (data / "models").iterdir():
        shutil.rmtree(model / "snapshots" / "t1-v0-e0-1")  # of its creation: the cases are about one snapshot
    return data


@pytest.fixture
def tampered(template: Path, data: Path) -> Path:
    """A copy of it of the test's own."""
    shutil.copytree(template, data)
    return data


@pytest.fixture(scope="module")
def found(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """One start over every case."""
    data = tmp_path_factory.mktemp("tampered") / "data"
    shutil.copytree(template, data)
    models = data / "models"
    for name, (tamper, _) in CASES.items():
        shutil.copytree(models / "bad", models / name)
        tamper(models / name)
    shutil.rmtree(models / "bad")
    before = {name: inventory(models / name) for name in CASES}
    with running_server(data) as server:
        listed = server.rest("GET", "/v1/models").json()
        state = state_of(server, "good")
        refused = {}
        for name in CASES:
            with pytest.raises(ModelNotLoaded) as caught:
                server.connect(name, "w1").create({"a": np.zeros(3, np.float32)})
            refused[name] = caught.value.fields["problem"]
        status = server.stop()
    after = {name: inventory(models / name) for name in CASES}
    problems = {entry["name"]: entry["problem"] for entry in listed["not_loaded"]}
    served = [entry["name"] for entry in listed["models"]]
    return Found(problems, served, state, refused, server.log.read_text(), status, before, after)


def test_the_others_start_and_serve_and_stop(found: Found) -> None:
    assert found.served == ["good"]
    assert (found.state["version"], found.state["timeline"]) == (1, 1)
    assert found.status == 0
    assert "internal error" not in found.log
    assert "Traceback" not in found.log


@pytest.mark.parametrize("name", CASES)
def test_a_bad_one_is_listed_with_its_reason_and_kept(name: str, found: Found) -> None:
    _, word = CASES[name]
    assert word in found.problems[name]
    assert found.refused[name] == found.problems[name]
    assert f"model {name} was not loaded: {found.problems[name]}" in found.log
    assert "/" not in found.problems[name].replace("models/", "")
    assert found.after[name] == found.before[name]


def serves_good(server: RunningServer) -> bool:
    """Whether the good model is there, and nothing of it is missing."""
    shown = server.rest("GET", "/v1/models/good").json()
    return (shown["version"], shown["timeline"]) == (1, 1)


def test_what_lies_beside_the_models_stops_nobody(tampered: Path) -> None:
    models = tampered / "models"
    (models / "bad" / "snapshots" / "t1-v9-e0-1").touch()
    (models / "notes.txt").write_text("mine")
    os.mkfifo(models / "pipe")
    (models / "loop").symlink_to("loop")
    (models / "new").mkdir()  # its creation broke off before anybody was told of it
    (models / ".trash-of-a-killed-server").mkdir()
    (tampered / "tmp-export-a").mkdir()
    (tampered / "tmp-export-a" / "in it").touch()
    os.mkfifo(tampered / "tmp-export-b")
    shutil.rmtree(tampered / "kernels", ignore_errors=True)
    os.mkfifo(tampered / "kernels")
    for _ in range(2):
        with running_server(tampered) as server:
            assert serves_good(server)
            listed = server.rest("GET", "/v1/models").json()
            assert [m["name"] for m in listed["models"]] == ["bad", "good"]
            problems = {entry["name"]: entry["problem"] for entry in listed["not_loaded"]}
            assert problems == {name: f"models/{name} is no folder" for name in ("loop", "notes.txt", "pipe")}
            assert not list(tampered.glob("tmp-export-*"))
            assert not list(models.glob(".trash-*"))
    assert (models / "notes.txt").read_text() == "mine"


def a_fifo_as_the_lock(data: Path) -> None:
    (data / "lock").unlink()
    os.mkfifo(data / "lock")


def a_link_as_the_lock(data: Path) -> None:
    (data / "lock").unlink()
    (data / "lock").symlink_to("elsewhere")


def a_file_as_the_models(data: Path) -> None:
    shutil.rmtree(data / "models")
    (data / "models").touch()


@pytest.mark.parametrize(
    "tamper",
    [a_fifo_as_the_lock, a_link_as_the_lock, a_file_as_the_models],
    ids=lambda tamper: tamper.__name__,
)
def test_what_a_server_cannot_do_without_is_named(tamper: Tamper, tampered: Path) -> None:
    tamper(tampered)
    ended = refused_start(tampered)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.splitlines()[-1].startswith("pushstep-server: ")
    assert "Traceback" not in ended.stderr


def test_a_file_that_the_disk_cannot_read(tampered: Path) -> None:
    """The model is not loaded, and is there again when the disk is well."""
    command = (sys.executable, FAULTY, "read:!bad/identity.json", "EIO")
    with running_server(tampered, command=command) as server:
        assert serves_good(server)
        listed = server.rest("GET", "/v1/models").json()["not_loaded"]
        assert listed == [{"name": "bad", "problem": "identity.json: Input/output error"}]
    with running_server(tampered) as server:
        shown = server.rest("GET", "/v1/models/bad").json()
        assert (shown["version"], shown["timeline"]) == (1, 1)


def test_a_lack_of_descriptors_is_no_damage(tampered: Path) -> None:
    """What cannot be read for want of the process's own means is not passed over for an older one."""
    with running_server(tampered) as server:
        created(server, "bad").push({"bias": np.ones(4, np.float32)})
    assert len(list((tampered / "models" / "bad" / "snapshots").iterdir())) == 2
    newest = "t1-v3-e0-1/arena-0000.safetensors"
    with running_server(tampered, command=(sys.executable, FAULTY, f"open:!{newest}", "EMFILE")) as server:
        assert serves_good(server)
        (entry,) = server.rest("GET", "/v1/models").json()["not_loaded"]
        assert "Too many open files" in entry["problem"]
    with running_server(tampered) as server:
        assert server.rest("GET", "/v1/models/bad").json()["version"] == 3


def test_a_worker_that_comes_back_is_told(tampered: Path, tmp_path: Path) -> None:
    """`model_lost` is true of what is gone; of what cannot be loaded it is `model_not_loaded`, which is one too."""
    unix = ("--unix", str(tmp_path / "s"))
    with running_server(tampered, *unix) as server:
        session = server.connect("bad", "w0", address=f"unix:{server.unix}")
        session.push({"bias": np.ones(4, np.float32)})
        server.sessions.clear()
    text(identity_of, "{}")(tampered / "models" / "bad")
    with running_server(tampered, *unix) as server:
        with pytest.raises(ModelLost) as caught:
            session.push({"bias": np.ones(4, np.float32)})
        assert isinstance(caught.value, ModelNotLoaded)
        session.close()
        assert server.rest("DELETE", "/v1/models/bad").status_code == 204
        assert server.rest("GET", "/v1/models/bad").json()["code"] == "unknown_model"
        assert server.rest("GET", "/v1/models").json()["not_loaded"] == []
    (aside,) = (tampered / "models").glob(".lost-bad-*")
    assert (aside / "identity.json").read_text() == "{}"
    assert list((aside / "snapshots").iterdir())


def test_killed_while_it_removes_a_model_the_next_start_goes_on(tampered: Path) -> None:
    killed = start_server(tampered, command=(sys.executable, FAULTY, "rmdir:snapshots", "kill"))
    (tampered / "armed").touch()
    with pytest.raises(Exception, match="disconnected"):
        killed.rest("DELETE", "/v1/models/bad")
    assert killed.process.wait(60) == -signal.SIGKILL
    killed.close_pipe()
    assert list((tampered / "models").glob(".trash-*"))
    with running_server(tampered) as server:
        assert [m["name"] for m in server.rest("GET", "/v1/models").json()["models"]] == ["good"]
    assert sorted(os.listdir(tampered / "models")) == ["good"]
