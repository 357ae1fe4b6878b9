"""A durable server is killed at each named point of its way to the disk, under load: every push is applied exactly once.

One folder goes through all of them. Each push has an element and a row of a table of its own, under Adagrad, whose `sum` is
how often it was applied. Most snapshots are links: of the table, the rows that changed.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pushstep.client import Session, connect
from tests.support.servers import faulty_server
from tests.support.servers.harness import RunningServer, start_server

FAULTY = Path(faulty_server.__file__)
ELEMENTS, WIDTH = 4000, 8
PUSHES_BEFORE = 3
# what is written, and in which call
PLACES = {
    "a record": "pwritev:journal/*.journal",
    "a record on the disk": "fdatasync:journal/*.journal",
    "the marker": "pwrite:journal/synced",
    "a new file's header": "fsync:journal/*.new",
    "a new file's name": "replace:journal/*.new",
    "the names of files": "fsync:m/journal",
    "the end of a file": "ftruncate:journal/*.journal",
    "a file that is not needed": "unlink:journal/*.journal",
    "a snapshot's folder": "mkdir:snapshots/tmp-*",
    "an arena": "fsync:arena-0000.safetensors",
    "a manifest": "fsync:manifest.json",
    "a snapshot's names": "fsync:snapshots/tmp-*",
    "a snapshot's name": "replace:snapshots/tmp-*",
    "the names of snapshots": "fsync:m/snapshots",
    "an old snapshot": "rmdir:snapshots/tmp-*",
    "a link's rows": "fsync:rows-0000.safetensors",
    "the mark of a hidden base": "fsync:snapshots/deleted-*",
}
POINTS = {
    **{f"before {name}": (call, "kill") for name, call in PLACES.items()},
    **{f"after {name}": (call, "kill-after") for name, call in PLACES.items()},
    "in the middle of a record": ("pwritev:journal/*.journal", "kill-half"),
    "before a slice of an arena": ("pwrite:arena-0000.safetensors", "kill"),
    "before the mark of a removed base": ("unlink:snapshots/deleted-*", "kill"),
    "while an acknowledged record is read": ("preadv:!journal/*.journal", "kill"),
    "while a snapshot is loaded": ("readv:!arena-0000.safetensors", "kill"),
}
OPTIONS = ("--durability", "durable", "--snapshot-every-s", "0.1")


class Load:
    """A worker that pushes until it is told to stop, through all restarts, and what it was told."""

    def __init__(self, address: str) -> None:
        self.session: Session = connect(
            address, model="m", worker="w0", retry_for_s=120.0, shared_memory=False
        )
        self.session.create(
            {"w": np.zeros(ELEMENTS, np.float32), "table": np.zeros((ELEMENTS, WIDTH), np.float32)},
            [{"rule": "adagrad", "params": ["w", "table"], "lr": 0.5}],
        )
        self.versions: list[int] = []
        self.problem: BaseException | None = None
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # nobody is to be told of anything
                while not self._ends.is_set():
                    number, gradient = len(self.versions), np.zeros(ELEMENTS, np.float32)
                    gradient[number] = 1
                    row = np.array([number]), np.ones((1, WIDTH), np.float32)
                    receipt = self.session.push({"w": gradient, "table": row})
                    self.versions.append(receipt.version)
        except BaseException as problem:  # noqa: BLE001 - the test looks at it
            self.problem = problem

    def wait_for(self, pushes: int, timeout_s: float = 60.0) -> None:
        """Wait until so many more pushes were acknowledged."""
        wanted, until_s = len(self.versions) + pushes, time.monotonic() + timeout_s
        while len(self.versions) < wanted:
            if self.problem is not None:
                raise self.problem
            assert time.monotonic() < until_s, "the worker does not get on"
            time.sleep(0.005)

    def end(self) -> None:
        """Stop pushing."""
        self._ends.set()
        self._thread.join()
        if self.problem is not None:
            raise self.problem

    def check(self) -> None:
        """Each push was applied once, and made the next version."""
        assert self.versions == list(range(1, len(self.versions) + 1))
        sums: list[Any] = [v for _, state, v in self.session.pull_state().dense() if state == "sum"]
        flat = np.concatenate([values.flatten() for values in sums])
        assert flat.size == ELEMENTS * (1 + WIDTH)
        for applied in (flat[:ELEMENTS], flat[ELEMENTS:].reshape(ELEMENTS, WIDTH)):
            assert bool((applied[: len(self.versions)] == 1).all())
            assert bool((applied[len(self.versions) :] == 0).all())


def _struck(server: RunningServer) -> None:
    """Wait for the end of a process that ends itself."""
    assert server.process.wait(60) == -signal.SIGKILL
    server.close_pipe()


@pytest.mark.timeout(600)
def test_every_push_counts_once_wherever_the_server_is_killed(data: Path) -> None:
    server = start_server(data, *OPTIONS)
    address = server.grpc
    load = Load(address)
    load.wait_for(PUSHES_BEFORE)
    for point, (calls, deed) in POINTS.items():
        (data / "armed").unlink(missing_ok=True)
        server.kill()
        if ":!" in calls:
            with pytest.raises(RuntimeError, match="did not start"):
                start_server(data, "--grpc", address, *OPTIONS, command=(sys.executable, FAULTY, calls, deed))
            server = start_server(data, "--grpc", address, *OPTIONS)
            load.wait_for(PUSHES_BEFORE)
            continue
        server = start_server(
            data, "--grpc", address, *OPTIONS, command=(sys.executable, FAULTY, calls, deed)
        )
        try:
            load.wait_for(PUSHES_BEFORE)
            (data / "armed").touch()
            _struck(server)
        except BaseException as problem:
            problem.add_note(point)
            server.process.kill()
            load._ends.set()
            raise
    load.wait_for(PUSHES_BEFORE)
    load.end()
    load.check()
    load.session.close()
    assert server.stop() == 0
