"""The end of a server: the models are saved whatever goes wrong on the way, and the exit status says if one was not."""

from __future__ import annotations

import asyncio
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pushstep.proto.training_pb2 import Process
from pushstep.server.config import Config
from pushstep.server.models.catalog import Catalog
from pushstep.server.models.creations import propose
from pushstep.server.models.saved_models import SavedModels
from pushstep.server.service import ExitStatus
from tests.support.servers.harness import RunningServer, running_server, start_server, wait_until
from tests.support.servers.judged import LAYOUT
from tests.support.workers.wire import created, state_of

HARMED = Path(__file__).parents[1] / "support" / "servers" / "harmed_server.py"
SAME = ("uid", "timeline", "version", "edit", "export", "body", "steps", "hooks")


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return [one[key] for key in SAME] == [other[key] for key in SAME]


def ended(server: RunningServer, number: signal.Signals = signal.SIGTERM) -> int:
    """The exit status; the sessions are gone before."""
    for session in server.sessions:
        session.close()
    server.sessions.clear()
    return server.stop(number)


def test_a_full_disk_is_named_and_takes_no_other_model_along(data: Path) -> None:
    """A file of the large model does not fit any more; its last snapshot is what the next start has."""
    server = start_server(data)
    created(server, "small")
    large = server.connect("large")
    large.create({"a": np.zeros(1_000_000, np.float32)}, [{"rule": "adagrad", "params": ["a"]}])
    taken = server.rest("POST", "/v1/models/large/snapshots").json()["id"]
    held = {name: state_of(server, name) for name in ("small", "large")}
    for _ in range(3):
        large.push({"a": np.ones(1_000_000, np.float32)})
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    assert ended(server) == ExitStatus.NOT_ALL_SAVED
    log = server.log.read_text()
    assert "model large was NOT saved at version 3: cannot write models/large/snapshots/" in log
    assert "it takes 8000000 bytes" in log
    assert f"the next start has {taken}" in log
    assert "model small saved at version 1" in log
    assert "pushstep-server: not every model could be saved" in log
    assert str(data) not in "".join(line for line in log.splitlines() if "NOT saved" in line)
    with running_server(data) as again:
        assert same(state_of(again, "small"), held["small"])
        back = state_of(again, "large")
        assert (back.pop("timeline"), held["large"].pop("timeline")) == (2, 1)
        assert back["export"] == held["large"]["export"]
        assert back["version"] == 0


def test_missing_socket_files_are_nobodys_loss(data: Path, tmp_path: Path) -> None:
    server = start_server(data, "--unix", str(tmp_path / "s"))
    created(server, "m")
    held = state_of(server, "m")
    for session in server.sessions:
        session.close()
    server.sessions.clear()
    for name in ("s", "s.memory"):
        (tmp_path / name).unlink()
    assert ended(server) == ExitStatus.SAVED
    with running_server(data) as again:
        assert same(state_of(again, "m"), held)


def test_a_closed_terminal_stops_in_order(data: Path) -> None:
    server = start_server(data)
    created(server, "m")
    held = state_of(server, "m")
    assert ended(server, signal.SIGHUP) == ExitStatus.SAVED
    with running_server(data, command=("nohup", *start_command())) as again:
        assert same(state_of(again, "m"), held)
        again.process.send_signal(signal.SIGHUP)  # nohup has it ignored
        assert same(state_of(again, "m"), held)


def start_command() -> tuple[str | Path, ...]:
    from tests.support.servers.harness import COMMANDS, DEVICE

    return COMMANDS[DEVICE]


def test_nobody_has_to_hear_that_it_is_ready(data: Path) -> None:
    """Its output is closed before it says so; the workers come all the same, and nothing is lost at the end."""
    log = data.with_name("log")
    addresses = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", str(data)]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*start_command(), *addresses], stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    assert process.stdout is not None
    process.stdout.close()
    wait_until(lambda: "nobody hears that the server is ready" in log.read_text(), 60)
    process.terminate()
    assert process.wait(60) == ExitStatus.SAVED


@pytest.mark.parametrize(
    "parts", ["_grpc.stop+memory.stop+_health.enter_graceful_shutdown", "_drain", "_http.on_tick"]
)
def test_whatever_fails_in_draining_the_models_are_saved(parts: str, data: Path) -> None:
    """Also when the HTTP door ends by itself, which ends the server."""
    server = start_server(data, command=(sys.executable, HARMED, parts))
    created(server, "m")
    held = state_of(server, "m")
    for session in server.sessions:
        session.close()
    server.sessions.clear()
    (data / "armed").touch()
    if parts == "_http.on_tick":
        status = server.process.wait(60)
        server.close_pipe()
    else:
        status = server.stop()
    assert status == ExitStatus.BROKEN_OFF
    log = server.log.read_text()
    assert log.count("RuntimeError: harmed") > parts.count("+")
    assert "model m saved at version 1" in log
    with running_server(data) as again:
        assert same(state_of(again, "m"), held)


def failing(*_: object) -> Any:
    raise RuntimeError("harmed")


def test_told_to_stop_while_it_starts_what_was_loaded_keeps_its_clean_stop(data: Path) -> None:
    async def scenario() -> None:
        first = Catalog(Config(data=data))
        for name in ("a", "b", "c"):
            model = first.new_model(name, LAYOUT)
            await first.finish_creation(
                name, first.begin_creation(name, "w0", propose(LAYOUT.manifest), 0.0, 0, Process()), model
            )
        assert await SavedModels(first).save()
        asked = iter([False, False, True])
        second = Catalog(Config(data=data))
        await SavedModels(second).load(lambda: next(asked))
        assert list(second.models) == ["a", "b"]
        assert not second.ready
        assert await SavedModels(second).save()
        third = Catalog(Config(data=data))
        await SavedModels(third).load()
        assert {name: model.timeline for name, model in third.models.items()} == {"a": 1, "b": 1, "c": 1}
        assert await SavedModels(third).save()

    asyncio.run(scenario())


def test_the_last_snapshot_takes_no_memory(data: Path) -> None:
    """It is written from the arenas: a machine that has no room for a copy saves its models all the same."""

    async def scenario() -> None:
        catalog = Catalog(Config(data=data))
        model = catalog.new_model("m", LAYOUT)
        await catalog.finish_creation(
            "m", catalog.begin_creation("m", "w0", propose(LAYOUT.manifest), 0.0, 0, Process()), model
        )
        model.arenas.copy = failing  # type: ignore[method-assign]
        assert await SavedModels(catalog).save()

    asyncio.run(scenario())
