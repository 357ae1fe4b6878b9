"""`pushstep check` and `replay`: what is in a data folder, and a damaged journal cut off so that its model goes on."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from safetensors.numpy import load
from typer.testing import CliRunner

from pushstep.client.commands import app
from pushstep.proto.errors import ModelNotLoaded, OutOfMemory
from pushstep.proto.journal_pb2 import JournalGradient, JournalRecord, JournalStep
from pushstep.proto.types_pb2 import DType, Segment
from pushstep.server.journal.chain import JournalChain
from pushstep.server.journal.journal import Journal, Level
from pushstep.server.models.replay import Replay
from tests.support.processes.forked import workers
from tests.support.servers.harness import running_server, start_server
from tests.support.terminals.command import COMMAND
from tests.support.workers.wire import created, state_of

ONES = {"bias": np.ones(4, np.float32)}
# the version of the snapshot that was asked for, and the last one
SNAPSHOT, LAST = 4, 8


def pushstep(*arguments: object) -> tuple[int, Any, str]:
    """Exit status, standard output (parsed if it is JSON), and standard error of the command."""
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    return done.exit_code, json.loads(done.stdout) if "--json" in arguments else done.stdout, done.stderr


def checked(data: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status of `check`, and what it says of the model `bad`."""
    status, facts, _ = pushstep("check", data, "--json", *options)
    assert facts["ok"] == (status == 0)
    (found,) = (model for model in facts["models"] if model["name"] == "bad")
    return status, found


@dataclass(frozen=True)
class Template:
    data: Path
    # what version 6 and the last one hold
    state: dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Template]:
    """A killed server's folder with `good` and `bad`, the latter with a snapshot within its journal."""
    data = tmp_path_factory.mktemp("template") / "data"
    server = start_server(data, "--durability", "durable", "--snapshot-every-s", "600")
    created(server, "good")
    session = created(server, "bad")
    state = {}
    for version in range(2, LAST + 1):
        session.push(ONES)
        if version == SNAPSHOT:
            server.rest("POST", "/v1/models/bad/snapshots").raise_for_status()
        if version in (6, LAST):
            state[version] = state_of(server, "bad")
    server.stop(signal.SIGKILL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # they could not leave
        for each in server.sessions:
            each.close()
    for name in ("pushstep.sock", "pushstep.sock.memory"):
        (data / name).unlink(missing_ok=True)
    yield Template(data, state)


@pytest.fixture
def killed(template: Template, data: Path) -> Path:
    """A copy of it of the test's own."""
    shutil.copytree(template.data, data)
    return data


def journal(data: Path) -> list[Path]:
    """The files of the journal: in front of the snapshot, and behind it."""
    return sorted((data / "models" / "bad" / "journal").glob("*.journal"))


def contents(data: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in (data / "models").rglob("*") if path.is_file()}


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def in_record(data: Path, number: int, *, file: int = -1) -> Callable[[], None]:
    """Flips a byte of a record's gradients."""
    path = journal(data)[file]
    content = path.read_bytes()
    place = -1
    for _ in range(number - int(path.name.partition(".")[0]) + 1):
        place = content.index(b"\xf5PSJ", place + 1)
    return lambda: flip(path, place + 60)


def test_a_folder_that_is_well(killed: Path) -> None:
    before = contents(killed)
    status, found = checked(killed)
    assert status == 0
    assert found["identity"]["timeline"] == 1 and not found["identity"]["clean"]
    assert [(entry["version"], entry["state"], entry["automatic"]) for entry in found["snapshots"]] == [
        (SNAPSHOT, "ok", False),
        (0, "ok", True),
    ]
    assert all(entry["bytes"] > 0 for entry in found["snapshots"])
    assert [entry["state"] for entry in found["journal"]] == ["ok", "ok"]
    assert found["journal"][0]["last"] + 1 == found["journal"][1]["first"]
    assert found["journal"][1]["versions"][1] == [1, LAST]
    assert found["start"] == {
        "timeline": 1,
        "version": LAST,
        "snapshot": found["snapshots"][0]["id"],
        "proven": True,
    }
    assert contents(killed) == before


def test_for_people_and_one_model(killed: Path) -> None:
    status, shown, _ = pushstep("check", killed / "models" / "bad")
    assert status == 0
    assert "good" not in shown
    assert f"a start continues from version {LAST} on timeline 1" in shown
    assert "not stopped in order" in shown


def test_a_server_that_runs_is_not_disturbed(killed: Path) -> None:
    with running_server(killed):
        for command in ("check", "replay"):
            status, _, said = pushstep(command, killed, *(("--model", "bad") if command == "replay" else ()))
            assert status == 2
            assert "another server uses" in said
    status, found = checked(killed)
    assert (status, found["identity"]["clean"], found["identity"]["version"]) == (0, True, LAST)


@pytest.mark.parametrize("command", ["check", "replay"])
def test_what_is_no_data_folder(command: str, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        status, _, said = pushstep(command, folder)
        assert status == 2
        assert "is no data folder" in said
    assert list(tmp_path.iterdir()) == []


def test_a_torn_tail_is_no_damage(killed: Path) -> None:
    path = journal(killed)[-1]
    end = len(path.read_bytes().rstrip(b"\0")) + 64
    content = bytearray(path.read_bytes())
    content[end : end + 7] = b"\xf5PSJabc"
    path.write_bytes(content)
    status, found = checked(killed)
    assert status == 0
    assert found["journal"][1]["state"] == "torn"
    assert 7 <= found["journal"][1]["torn_bytes"] <= 7 + 72
    assert found["start"]["version"] == LAST


def test_a_damaged_snapshot_is_shown_and_left(killed: Path) -> None:
    newest = checked(killed)[1]["snapshots"][0]["id"]
    flip(killed / "models" / "bad" / "snapshots" / newest / "arena-0000.safetensors", -1)
    before = contents(killed)
    status, found = checked(killed, "--repair", "--yes")
    assert status == 1
    assert found["snapshots"][0]["state"] == "damaged"
    assert "other bytes" in found["snapshots"][0]["problem"]
    assert (found["start"]["version"], found["start"]["proven"]) == (LAST, True)
    assert contents(killed) == before


# Repairs. Each case: what is damaged, and the version that is left, or None for a start that is not refused.

Damage = Callable[[Path], Any]


def fifo(data: Path) -> None:
    path = journal(data)[1]
    path.unlink()
    os.mkfifo(path)


def _failed(model: str, error: Exception) -> NoReturn:
    raise AssertionError(model) from error


def unfit(data: Path) -> None:
    """A record that is whole, of parameters that the model does not have."""
    folder = journal(data)[0].parent
    uid = bytes.fromhex(json.loads((folder.parent / "identity.json").read_text())["uid"])
    chain = JournalChain(folder, uid)
    after = first_behind(data) - 1
    last = [record.number for record in chain.records(after)][-1]
    written = Journal(folder, uid, Level.DURABLE, last, chain.link, _failed, after_gap=False)
    segment = Segment(arena=99, stop=1, dtype=DType.DTYPE_FLOAT32)
    step = JournalStep(gradients=[JournalGradient(segments=[segment])])
    for version in (LAST + 1, LAST + 2):
        written.append(JournalRecord(timeline=1, version=version, step=step), [memoryview(bytes(4))])
    written.close()


DAMAGES: dict[str, tuple[Damage, int | None]] = {
    "record": (lambda data: in_record(data, first_behind(data) + 2)(), SNAPSHOT + 2),
    "first record": (lambda data: in_record(data, first_behind(data))(), SNAPSHOT),
    "last record": (lambda data: in_record(data, first_behind(data) + 3)(), LAST - 1),
    "header": (lambda data: flip(journal(data)[1], 20), SNAPSHOT),
    "header in front of the snapshot": (lambda data: flip(journal(data)[0], 20), LAST),
    "cut off": (lambda data: os.truncate(journal(data)[1], 200), SNAPSHOT),
    "record in front of the snapshot": (lambda data: in_record(data, 2, file=0)(), None),
    "missing file": (lambda data: journal(data)[1].unlink(), SNAPSHOT),
    "fifo": (fifo, SNAPSHOT),
    "record that does not fit": (unfit, LAST),
}


def first_behind(data: Path) -> int:
    return int(journal(data)[1].name.partition(".")[0])


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_journal_is_cut_off_and_nothing_is_deleted(name: str, killed: Path) -> None:
    damage, left = DAMAGES[name]
    damage(killed)
    before = set(contents(killed).values())
    status, found = checked(killed)
    assert status == 1
    (bad,) = (entry for entry in found["journal"] if entry["state"] == "damaged")
    assert bad["problem"]
    if left is None:
        assert found["start"]["version"] == LAST
        checked(killed, "--repair", "--yes")
        assert set(contents(killed).values()) == before
        return
    assert "refused" in found["start"]
    assert f"record {bad['record']} " in found["start"]["refused"]
    status, found = checked(killed, "--repair", "--yes")
    assert status == 0, found
    assert found["start"]["version"] == left
    lost = name != "header in front of the snapshot"
    assert found["identity"]["timeline"] == (2 if lost else 1)
    assert found["start"]["proven"] != lost
    # apart from the marker and the old identity
    kept = set(contents(killed).values())
    assert all(content in kept for content in before if len(content) > 400)
    with running_server(killed) as server:
        shown = server.rest("GET", "/v1/models/bad").json()
        assert shown["version"] == left
        assert (shown["timeline"] > 2) == lost
        server.connect("bad", "another").push(ONES)
        assert server.stop() == 0
    assert checked(killed)[0] == 0


def test_the_model_goes_on_and_its_worker_is_told(data: Path, tmp_path: Path) -> None:
    """The start refuses the model by name and serves the others, until the journal is repaired."""
    options = ("--durability", "durable", "--snapshot-every-s", "600", "--unix", str(tmp_path / "s"))
    server = start_server(data, *options)
    created(server, "good")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        session = created(server, "bad")
        session.close()
        session = server.connect("bad", "told", address=f"unix:{server.unix}")
        for _ in range(5):
            receipt = session.push(ONES)
        assert receipt.version == 6
        kept = [held for held in server.sessions if held is not session]
        server.kill()
        for each in kept:
            each.close()
    content = journal(data)[-1].read_bytes()
    starts = [at for at in range(len(content)) if content[at : at + 4] == b"\xf5PSJ"]
    flip(journal(data)[-1], starts[-3] + 60)
    _, found = checked(data)
    (bad,) = (entry for entry in found["journal"] if entry["state"] == "damaged")
    with running_server(data, *options) as server:
        listed = server.rest("GET", "/v1/models").json()
        assert [model["name"] for model in listed["models"]] == ["good"]
        assert f"record {bad['record']} of the journal of model 'bad'" in listed["not_loaded"][0]["problem"]
        with pytest.raises(ModelNotLoaded):
            server.connect("bad", "w1").create({"a": np.zeros(3, np.float32)})
    status, found = checked(data, "--repair", "--yes")
    assert (status, found["start"]["proven"]) == (0, False)
    left = found["start"]["version"]
    assert left < 6
    with running_server(data, *options):
        with pytest.warns(RuntimeWarning, match=f"has undone {6 - left} versions of model 'bad'"):
            receipt = session.push(ONES)
        assert receipt.version == left
        assert session.push(ONES).version == left + 1
        session.close()


def test_a_repair_is_asked_for(killed: Path) -> None:
    in_record(killed, first_behind(killed) + 1)()
    before = contents(killed)
    status, _, said = pushstep("check", killed, "--repair")
    assert status == 2
    assert "--yes" in said
    status, _, said = pushstep("check", killed, "--yes")
    assert status == 2
    for answer, repaired in (("n", False), ("y", True)):
        assert contents(killed) == before
        ours, theirs = pty.openpty()
        with os.fdopen(ours, "wb", buffering=0) as terminal:
            terminal.write(f"{answer}\n".encode())
            ended = workers().call(COMMAND, "check", str(killed), "--repair", stdin=theirs)
            os.close(theirs)
        assert ended.returncode == (0 if repaired else 1), ended.stderr
        assert "keep the first" in ended.stderr and "identity.json: the next timeline" in ended.stderr
    assert contents(killed) != before


def test_a_repair_that_breaks_off_can_be_run_again(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until its last step a start refuses the model still, or takes it for what it is: a part of it."""
    in_record(killed, first_behind(killed) + 2)()
    real = {name: getattr(os, name) for name in ("replace", "link", "fsync", "rename", "unlink")}
    broken = 0
    for number in range(100):
        data = killed.with_name(f"copy{number}")
        shutil.copytree(killed, data)
        calls = iter(range(1000))

        def call(name: str, *arguments: Any, calls: Iterator[int] = calls, at: int = number) -> Any:
            if next(calls) == at:
                raise OSError(5, "the disk is gone")
            return real[name](*arguments)

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, lambda *a, name=name, **_: call(name, *a))
            status, _, said = pushstep("check", data, "--repair", "--yes")
        if status != 2:
            break
        assert "the disk is gone" in said
        broken += 1
        found = checked(data)[1]["start"]
        assert "refused" in found or not found["proven"]
        status, found = checked(data, "--repair", "--yes")
        assert status == 0
        assert found["start"]["version"] == SNAPSHOT + 2 and not found["start"]["proven"]
    assert broken > 5


def test_a_lack_of_memory_is_no_damage(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cut off for want of the process's own means."""

    def lacks(*_: object, **__: object) -> None:
        raise OutOfMemory(what="a record", need=1)

    before = contents(killed)
    with monkeypatch.context() as patch:
        patch.setattr(Replay, "_apply", lacks)
        status, found = checked(killed, "--repair", "--yes")
    assert status == 1
    assert "memory" in found["start"]["refused"]
    assert [entry["state"] for entry in found["journal"]] == ["ok", "ok"]
    assert contents(killed) == before


# Replays.


@pytest.mark.parametrize("to", [None, 6])
def test_a_replay_makes_what_the_server_had(
    to: int | None, killed: Path, template: Template, tmp_path: Path
) -> None:
    before = contents(killed)
    out = tmp_path / "out.safetensors"
    options = () if to is None else ("--to", to)
    status, facts, _ = pushstep("replay", killed, "--model", "bad", *options, "--out", out, "--json")
    assert status == 0
    assert (facts["version"], facts["timeline"]) == (to or LAST, 1)
    assert facts["records"] >= facts["version"] - SNAPSHOT
    held = {name: array.tobytes() for name, array in load(out.read_bytes()).items()}
    assert held == template.state[to or LAST]["export"]
    again = pushstep("replay", killed / "models" / "bad", *options, "--json")[1]
    assert again["digest"] == facts["digest"]
    assert pushstep("replay", killed, "--model", "bad", "--to", 5, "--json")[1]["digest"] != facts["digest"]
    assert contents(killed) == before


def test_a_replay_from_an_older_snapshot_makes_the_same(killed: Path) -> None:
    first = pushstep("replay", killed, "--model", "bad", "--json")[1]
    flip(killed / "models" / "bad" / "snapshots" / first["snapshot"] / "arena-0000.safetensors", -1)
    again = pushstep("replay", killed, "--model", "bad", "--json")[1]
    assert again["records"] > first["records"]
    assert again["digest"] == first["digest"]


@pytest.mark.parametrize(
    ("options", "status", "word"),
    [
        (("--model", "bad", "--to", 99), 1, "99"),
        (("--model", "none"), 2, "bad"),
        ((), 2, "good"),
        (("--model", "bad", "--out", "inside"), 2, "--out"),
    ],
)
def test_a_replay_that_cannot_be(options: tuple[Any, ...], status: int, word: str, killed: Path) -> None:
    options = tuple(killed / "x" if option == "inside" else option for option in options)
    ended, _, said = pushstep("replay", killed, *options)
    assert ended == status
    assert word in said
    assert not (killed / "x").exists()
