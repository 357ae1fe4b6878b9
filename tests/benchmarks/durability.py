"""What it costs that nothing is lost: exchanges at each level, snapshots while a model is trained, and a start after a kill.

A worker over shared memory, where nothing hides the cost. Beside the levels: the disk alone, which appends the same bytes to
a file and forces them to the disk, past the page cache and through it; SQLite, one row a push; and `torch.save` of the optimizer at each step.
"""

from __future__ import annotations

import mmap
import os
import sqlite3
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import torch

from pushstep.client import RemoteOptimizer, Session, connect
from pushstep.optim import Adadelta, Adagrad
from pushstep.proto.wire.buffers import fresh_memory
from tests.support.servers.harness import RunningServer, running_server, start_server

from .machine import Others, cpu_s
from .table import count, decided, table

RULES: Final[dict[str, Any]] = {"adadelta": Adadelta, "adagrad": Adagrad}
LEVELS: Final = ("applied", "everysec", "durable")
ELEMENTS, QUICK_ELEMENTS = 16_000_000, 100_000
DURABLE_OF_DISK, EVERYSEC_OF_APPLIED = 0.7, 1 / 1.15
# of a model of 1 GB with its state: 1 - 3.5 %
TRAINED_ELEMENTS, QUICK_TRAINED_ELEMENTS = 83_000_000, 1_000_000
STEPS_PER_SNAPSHOT, BESIDE_SNAPSHOTS = 100, 1 / 1.035
TABLE_ROWS, QUICK_TABLE_ROWS, TABLE_WIDTH = 2_000_000, 20_000, 32
LINK_OF_WHOLE = 0.03
RECOVERY_OF_DISK = 0.7


class Level:
    """A model at one level, and the worker that trains it."""

    def __init__(self, server: RunningServer, rule: str, level: str, elements: int) -> None:
        self.name = level
        self.model = f"{rule}-{level}"
        self.session: Session = connect(f"unix:{server.unix}", model=self.model, worker="w0")
        self.parameter = torch.nn.Parameter(torch.randn(elements))
        self.remote: RemoteOptimizer = self.session.attach(RULES[rule]([self.parameter], lr=0.01))
        path = f"/v1/models/{self.model}/durability"
        server.rest("PATCH", path, json={"level": level, "snapshot_every_s": 1e6}).raise_for_status()
        self.gradient = torch.full((elements,), 0.01)

    def step(self) -> None:
        """One exchange."""
        self.parameter.grad = self.gradient
        self.remote.step()


class DiskAlone:
    """The same bytes, appended to a file and forced to the disk: past the page cache, or through it."""

    def __init__(self, folder: Path, nbytes: int, *, direct: bool) -> None:
        self.name = "the disk alone" if direct else "the disk alone, through the cache"
        whole = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._content = fresh_memory(whole)
        self._content[:] = np.frombuffer(os.urandom(whole), np.uint8)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        self._file = os.open(folder / f"alone-{direct}", flags)
        self._at = 0

    def step(self) -> None:
        """One write and one fsync."""
        self._at += os.pwrite(self._file, self._content.data, self._at)
        os.fdatasync(self._file)


class Sqlite:
    """A row of the same bytes, committed with the same promise."""

    name = "SQLite, one row"

    def __init__(self, folder: Path, nbytes: int) -> None:
        self._content = bytes(nbytes)
        self._database = sqlite3.connect(folder / "rows.db", isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.execute("CREATE TABLE pushes (gradient BLOB)")

    def step(self) -> None:
        """One row."""
        self._database.execute("INSERT INTO pushes VALUES (?)", (self._content,))


class TorchSave:
    """A local step, and the whole optimizer and parameters written and forced to the disk."""

    name = "local step and torch.save"

    def __init__(self, folder: Path, rule: str, elements: int) -> None:
        self._path = folder / "checkpoint.pt"
        self._parameter = torch.nn.Parameter(torch.randn(elements))
        self._parameter.grad = torch.full((elements,), 0.01)
        self._optimizer = RULES[rule]([self._parameter], lr=0.01)

    def step(self) -> None:
        """One step and one file."""
        self._optimizer.step()
        with self._path.open("wb") as file:
            torch.save({"model": self._parameter, "optimizer": self._optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())


def _timed(call: Callable[[], None]) -> float:
    begun_s = time.perf_counter()
    call()
    return time.perf_counter() - begun_s


def levels(folder: Path, rule: str, elements: int, rounds: int) -> None:
    """Print the table of exchanges."""
    others = Others()
    nbytes = elements * 4
    with running_server(folder / f"data-{rule}", "--log-level", "error") as server:
        sides: list[Any] = [Level(server, rule, level, elements) for level in LEVELS]
        sides += [
            DiskAlone(folder, nbytes, direct=True),
            DiskAlone(folder, nbytes, direct=False),
            Sqlite(folder, nbytes),
            TorchSave(folder, rule, elements),
        ]
        found: dict[str, list[float]] = {side.name: [] for side in sides}
        for number in range(rounds + 1):
            for side in sides if number % 2 else sides[::-1]:
                taken_s = _timed(side.step)
                os.sync()  # or the next one pays for the pages of this one
                if number:
                    found[side.name].append(taken_s)
        for side in sides[: len(LEVELS)]:
            side.session.close()
    for left in folder.glob("alone-*"):
        left.unlink()
    medians = {name: statistics.median(times) for name, times in found.items()}
    asked = {
        "everysec": (medians["applied"] / medians["everysec"], EVERYSEC_OF_APPLIED),
        "durable": (medians["the disk alone"] / medians["durable"], DURABLE_OF_DISK),
    }
    rows = []
    for name, times in found.items():
        against = {"everysec": "applied", "durable": "the disk alone"}.get(name, "")
        ratio = f"{asked[name][0]:.2f} of {against}" if name in asked else ""
        rows.append(
            (
                name,
                f"{min(times) * 1e3:.1f}",
                f"{medians[name] * 1e3:.1f}",
                f"{nbytes / medians[name] / 1e6:.0f}",
                ratio,
                *(decided(*asked[name]) if name in asked else ("", "")),
            )
        )
    columns = ("", "min ms", "median ms", "MB/s", "speed", "asked", "met")
    table(f"An exchange of {count(elements)} float32, {rule}, shared memory", columns, rows, others.share())


def training(folder: Path, elements: int, rounds: int) -> None:
    """Print what snapshots cost a training: one that is due, at its pace, and one that is asked for, at once."""
    others = Others()
    found: dict[str, list[Block]] = {"none": [], "automatic": [], "asked for": []}
    with running_server(folder / "trained", "--log-level", "error") as server:
        level = Level(server, "adadelta", "applied", elements)
        for _ in range(5):
            level.step()
        for number in range(rounds):
            for name in found if number % 2 else reversed(found):
                snapshot = Snapshot(server, level.model)
                if name == "automatic":
                    snapshot.let_be_due(found["none"][-1].wall_s if found["none"] else 1.0)
                elif name == "asked for":
                    snapshot.ask()
                block = Block(server, level)
                if name != "none":
                    snapshot.wait()
                block.end(server)
                found[name].append(block)
                os.sync()
        level.session.close()
    rows = []
    alone = Median(found["none"])
    for name, blocks in found.items():
        median = Median(blocks)
        slower = median.wall_s / alone.wall_s
        rows.append(
            (
                name,
                f"{median.wall_s * 10:.1f}",
                f"{median.slowest_s * 1e3:.0f}",
                f"{median.cpu_s:.2f}",
                f"{(median.cpu_s - alone.cpu_s) / median.wall_s / (os.cpu_count() or 1):.1%}",
                f"{slower - 1:.1%}",
                *(decided(1 / slower, BESIDE_SNAPSHOTS) if name == "automatic" else ("", "")),
            )
        )
    columns = (
        "a snapshot", "step ms", "slowest ms", "server's CPU s", "of the cores", "slower by", "asked", "met",
    )  # fmt: skip
    held = f"{3 * 4 * elements / 1e9:.2f} GB"
    title = f"{STEPS_PER_SNAPSHOT} steps beside a snapshot of {held}, adadelta, shared memory"
    table(title, columns, rows, others.share())


class Block:
    """Steps of a training, their times, and the CPU time that the server took for them and for the snapshot."""

    def __init__(self, server: RunningServer, level: Level) -> None:
        self._cpu_s = cpu_s(server.process.pid)
        self.times_s = [_timed(level.step) for _ in range(STEPS_PER_SNAPSHOT)]
        self.wall_s = sum(self.times_s)
        self.cpu_s = 0.0

    def end(self, server: RunningServer) -> None:
        """The snapshot is on the disk."""
        self.cpu_s = cpu_s(server.process.pid) - self._cpu_s


class Median:
    """Of some blocks."""

    def __init__(self, blocks: list[Block]) -> None:
        self.wall_s = statistics.median(block.wall_s for block in blocks)
        self.slowest_s = statistics.median(max(block.times_s) for block in blocks)
        self.cpu_s = statistics.median(block.cpu_s for block in blocks)


class Snapshot:
    """One that is taken beside what comes next."""

    def __init__(self, server: RunningServer, model: str) -> None:
        self._server = server
        self._path = f"/v1/models/{model}"
        self._before = self._listed()
        self._pool = ThreadPoolExecutor(1)
        self._asked: Future[httpx.Response] | None = None

    def _listed(self) -> set[str]:
        shown = self._server.rest("GET", f"{self._path}/snapshots").json()["snapshots"]
        return {entry["id"] for entry in shown}

    def let_be_due(self, every_s: float) -> None:
        """An automatic one is due at such an interval, the first of them now."""
        self._set(max(1.0, every_s))

    def _set(self, every_s: float) -> None:
        settings = {"snapshot_every_s": every_s}
        self._server.rest("PATCH", f"{self._path}/durability", json=settings).raise_for_status()

    def ask(self) -> None:
        """Ask for one."""
        url = f"http://{self._server.http}{self._path}/snapshots"
        self._asked = self._pool.submit(httpx.post, url, timeout=120, trust_env=False)

    def wait(self) -> None:
        """Until it is on the disk."""
        if self._asked is not None:
            self._asked.result().raise_for_status()
        while not self._listed() - self._before:
            time.sleep(0.05)
        self._set(1e6)
        self._pool.shutdown()


def links(folder: Path, rows: int) -> None:
    """Print what a snapshot of a table costs of which few rows were touched since the last one."""
    others = Others()
    with running_server(folder / "tables", "--log-level", "error") as server:
        session = connect(f"unix:{server.unix}", model="m", worker="w0")
        session.create(
            {"table": np.zeros((rows, TABLE_WIDTH), np.float32)}, [{"rule": "adagrad", "params": ["table"]}]
        )
        (whole,) = server.rest("GET", "/v1/models/m/snapshots").json()["snapshots"]
        taken: list[tuple[int, float, float]] = []
        draw = np.random.default_rng(0)
        for _ in range(3):
            ids = np.sort(draw.choice(rows, rows // 100, replace=False))
            session.push({"table": (ids, np.ones((len(ids), TABLE_WIDTH), np.float32))})
            begun_s, used_s = time.perf_counter(), cpu_s(server.process.pid)
            snapshot = server.rest("POST", "/v1/models/m/snapshots").json()
            taken.append(
                (_bytes_of(snapshot), time.perf_counter() - begun_s, cpu_s(server.process.pid) - used_s)
            )
        session.close()
    whole_bytes, link_bytes = _bytes_of(whole), statistics.median(nbytes for nbytes, _, _ in taken)
    share = link_bytes / whole_bytes
    row = (
        f"{rows:,} rows of {TABLE_WIDTH}, adagrad",
        f"{whole_bytes / 1e6:.1f}",
        f"{link_bytes / 1e6:.2f}",
        f"{share:.2%}",
        f"at most {LINK_OF_WHOLE:.0%}",
        "yes" if share <= LINK_OF_WHOLE else "**no**",
        f"{statistics.median(seconds for _, seconds, _ in taken) * 1e3:.0f}",
        f"{statistics.median(used for _, _, used in taken) * 1e3:.0f}",
    )
    columns = ("", "whole MB", "MB", "of the whole", "asked", "met", "ms", "CPU ms")
    table("A snapshot of a table of which 1 % of the rows were touched", columns, [row], others.share())


def _bytes_of(snapshot: dict[str, Any]) -> int:
    return sum(entry["bytes"] for entry in snapshot["files"])


def recovery(folder: Path, elements: int, pushes: int) -> None:
    """Print how fast a killed server is back, against the disk's own reading of the same bytes."""
    others, data = Others(), folder / "killed"
    server = start_server(data, "--log-level", "info")
    level = Level(server, "adagrad", "durable", elements)
    for _ in range(pushes):
        level.step()
    server.kill()
    paths = [path for path in data.rglob("*") if path.suffix in (".journal", ".safetensors")]
    nbytes = sum(path.stat().st_blocks * 512 for path in paths)
    _forget(paths)
    begun_s = time.perf_counter()
    for path in paths:
        _read(path)
    read_s = time.perf_counter() - begun_s
    begun_s = time.perf_counter()
    empty = start_server(folder / "empty")
    empty_s = time.perf_counter() - begun_s
    empty.stop()
    _forget(paths)
    begun_s = time.perf_counter()
    again = start_server(data, "--grpc", server.grpc)
    start_s = time.perf_counter() - begun_s
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level.session.close()
    again.stop()
    back_s = max(start_s - empty_s, 1e-3)
    row = (
        f"{count(elements)} float32, {pushes} pushes in the journal",
        f"{nbytes / 1e6:.0f}",
        f"{read_s * 1e3:.0f}",
        f"{back_s * 1e3:.0f}",
        f"{read_s / back_s:.2f}",
        *decided(read_s / back_s, RECOVERY_OF_DISK),
    )
    columns = ("", "MB", "the disk alone ms", "recovery ms", "speed", "asked", "met")
    table("A start after a kill, beyond that of an empty server", columns, [row], others.share())


def _forget(paths: list[Path]) -> None:
    """Have the next reading come from the disk."""
    os.sync()
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def _read(path: Path) -> None:
    block = bytearray(8 << 20)
    file = os.open(path, os.O_RDONLY)
    while os.readv(file, [block]):
        pass
    os.close(file)


def main(quick: bool = False) -> None:
    """Print the tables."""
    warnings.simplefilter("ignore")
    print(f"\n## durability: torch {torch.__version__}, {torch.get_num_threads()} threads")
    elements, rounds = (QUICK_ELEMENTS, 3) if quick else (ELEMENTS, 9)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rule in RULES:
            levels(folder, rule, elements, rounds)
            for left in ("rows.db", "rows.db-wal", "rows.db-shm", "checkpoint.pt"):
                (folder / left).unlink(missing_ok=True)
        recovery(folder, elements, 5 if quick else 20)
        links(folder, QUICK_TABLE_ROWS if quick else TABLE_ROWS)
        training(folder, QUICK_TRAINED_ELEMENTS if quick else TRAINED_ELEMENTS, 2 if quick else 3)


if __name__ == "__main__":
    main()
