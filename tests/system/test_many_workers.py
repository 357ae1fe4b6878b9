"""Four workers push at once: one contiguous history, which the same pushes make again, and readers see only it.

The workers are threads with sessions and connections of their own. What they pushed is replayed in the order of the
versions that their receipts name.
"""

from __future__ import annotations

import io
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from pushstep.client import Outcome, Receipt, connect
from tests.support.servers.harness import RunningServer, wait_until
from tests.support.servers.operators import (
    add_hook,
    download,
    patch_group,
    remove_hook,
    restore,
    show_model,
    take_snapshot,
)
from tests.support.trainings.bits import Bits, array_bits, bits, parameter_bits, state_bits
from tests.support.trainings.gradients import gradients_of, square_sum
from tests.support.trainings.local_training import Replay
from tests.support.trainings.network import ROWS, ScaledNetwork, loss_of
from tests.support.trainings.optimizers import both

WORKERS = 4


@dataclass(frozen=True)
class Push:
    """One push as its worker saw it: what it sent, what it was told, and its parameters afterwards."""

    gradients: dict[str, Tensor]
    receipt: Receipt
    after: Bits


@dataclass
class Crew:
    """Workers at work, and whoever reads meanwhile."""

    futures: list[Future[list[Push]]]
    enough: threading.Event

    def pushes(self) -> list[Push]:
        """Everything they pushed, in the order of its versions."""
        found = [push for future in self.futures for push in future.result()]
        return sorted(found, key=lambda push: push.receipt.version)


def work(
    server: RunningServer,
    model: str,
    index: int,
    steps: int,
    start: threading.Barrier,
    enough: threading.Event,
) -> list[Push]:
    """One worker's training, on batches of its own; its every step is computed on what the last one returned.

    It takes `steps`, and then goes on until it is `enough`.
    """
    module = ScaledNetwork(sparse=True)
    pushes = []
    with connect(server.grpc, model=model, worker=f"w{index}", timeout_s=20, retry_for_s=20) as session:
        optimizer = session.attach(both(module), module=module)
        start.wait(30)
        for step in itertools.count():
            if step >= steps and enough.is_set():
                break
            optimizer.zero_grad()
            loss_of(module, index + WORKERS * step).backward()
            gradients = gradients_of(module)
            optimizer.step()
            assert optimizer.last_receipt is not None
            pushes.append(Push(gradients, optimizer.last_receipt, parameter_bits(module)))
        start.wait(30)  # nobody leaves before all have pushed: the lead stays who it was
    return pushes


@contextmanager
def crew_of(
    server: RunningServer,
    model: str,
    steps: int,
    readers: Sequence[Callable[[threading.Event], None]] = (),
    *,
    until_told: bool = False,
) -> Iterator[Crew]:
    """Start the workers together. At the end of the block everybody has finished; what failed is raised."""
    start = threading.Barrier(WORKERS)
    enough, done = threading.Event(), threading.Event()
    if not until_told:
        enough.set()
    with connect(server.grpc, model=model, worker="creator") as creator:
        module = ScaledNetwork(sparse=True)
        creator.attach(both(module), module=module)
    with ThreadPoolExecutor(WORKERS + len(readers)) as threads:
        reading = [threads.submit(read, done) for read in readers]
        crew = Crew(
            [threads.submit(work, server, model, i, steps, start, enough) for i in range(WORKERS)], enough
        )
        try:
            yield crew
            for future in crew.futures:
                future.result()
        finally:
            enough.set()
            done.set()
        for reader in reading:
            reader.result()


def fresh_replay() -> Replay:
    return Replay(ScaledNetwork(sparse=True), both)


def check_history(pushes: list[Push], steps: int) -> None:
    """Every push was applied once, each made one version, and together they made all of them."""
    receipts = [push.receipt for push in pushes]
    assert {receipt.outcome for receipt in receipts} == {Outcome.APPLIED}
    assert [receipt.version for receipt in receipts] == list(range(1, len(pushes) + 1))
    for index in range(WORKERS):
        mine = [receipt for receipt in receipts if receipt.worker == f"w{index}"]
        assert [(r.timeline, r.epoch, r.sequence) for r in mine] == [(1, 1, i + 1) for i in range(len(mine))]
        assert len(mine) >= steps
    assert {receipt.worker for receipt in receipts} == {f"w{index}" for index in range(WORKERS)}
    # all four began with version 0 in hand, and only one of them can have been first
    assert sorted(r.staleness > 0 for r in receipts if r.sequence == 1) == [False, True, True, True]


def check_pulls(pushes: list[Push], history: list[Bits]) -> None:
    """What each exchange returned is the version that the worker's next push says it was computed on."""
    for index in range(WORKERS):
        mine = [push for push in pushes if push.receipt.worker == f"w{index}"]
        for push, following in itertools.pairwise(mine):
            base = following.receipt.version - 1 - following.receipt.staleness
            assert base >= push.receipt.version
            assert push.after == history[base]
        assert mine[-1].after in history[mine[-1].receipt.version :]


def test_the_history_replayed_is_the_servers(server: RunningServer, model_name: str) -> None:
    steps = 200
    pulled: list[tuple[int, Bits]] = []
    afresh: list[tuple[int, Bits]] = []
    rows: list[bytes] = []
    ids = np.array([3, ROWS - 1, 0, 2])

    def keep_pulling(done: threading.Event) -> None:
        """A reader that is sent what changed since its last pull."""
        with connect(server.grpc, model=model_name, worker="reader") as session:
            while not done.is_set():
                arrays = session.pull()
                assert session.version is not None
                pulled.append((session.version, array_bits(arrays)))

    def pull_afresh(done: threading.Event) -> None:
        """Readers that come, take everything once, and go."""
        while not done.is_set():
            with connect(server.grpc, model=model_name, worker="visitor") as session:
                arrays = session.pull()
                assert session.version is not None
                afresh.append((session.version, array_bits(arrays)))
                rows.append(session.pull_rows("table.weight", ids).tobytes())

    with crew_of(server, model_name, steps, [keep_pulling, pull_afresh]) as crew:
        pushes = crew.pushes()
    check_history(pushes, steps)
    assert len(pushes) == WORKERS * steps

    replay = fresh_replay()
    for push in pushes:
        replay.push(push.gradients)
    history = replay.history
    with server.connect(model_name, worker="after") as session:
        assert array_bits(session.pull()) == history[-1]
        assert session.version == len(pushes)
    exported = torch.load(io.BytesIO(download(server, f"{model_name}/export", "torch")), weights_only=True)
    assert {name: bits(value) for name, value in exported["model"].items()} == history[-1]
    assert [state_bits(entry) for entry in exported["optimizer"]] == replay.state()

    # no two versions are alike, so being equal to one means something
    assert len({tuple(values.values()) for values in history}) == len(history)
    check_pulls(pushes, history)
    for seen in (pulled, afresh):
        assert any(0 < version < len(pushes) for version, _ in seen)
        for version, values in seen:
            assert values == history[version], version
    versions = [version for version, _ in pulled]
    assert versions == sorted(versions)
    tables = (np.frombuffer(bits_of["table.weight"], np.float32).reshape(ROWS, 3) for bits_of in history)
    assert set(rows) <= {table[ids].tobytes() for table in tables}


def test_edits_among_pushes_hold_from_the_version_they_state(server: RunningServer, model_name: str) -> None:
    """A learning rate, a hook added and removed, and a snapshot, each while four workers push."""
    steps = 20

    def reached(version: int) -> None:
        wait_until(lambda: show_model(server, model_name)["version"] >= version, 60)

    with crew_of(server, model_name, steps, until_told=True) as crew:
        reached(40)
        slower = patch_group(server, model_name, 0, lr=0.02)["effective_version"]
        reached(slower + 20)
        hook = add_hook(server, model_name, "clip_grad_norm", "step_pre", {"max_norm": 0.5})
        reached(hook["effective_version"] + 20)
        snapshot = take_snapshot(server, model_name)
        reached(snapshot["version"] + 20)
        removed = remove_hook(server, model_name, hook["id"])["effective_version"]
        reached(removed + 20)
        crew.enough.set()
        pushes = crew.pushes()
    check_history(pushes, steps)
    assert 40 < slower < hook["effective_version"] < snapshot["version"] < removed < len(pushes)

    replay = fresh_replay()
    factors = []
    for push in pushes:
        receipt = push.receipt
        lr = 0.02 if receipt.version >= slower else 0.1
        assert receipt.groups[0]["lr"] == lr
        assert receipt.groups[1]["lr"] == 0.7
        replay.groups[0]["lr"] = lr
        clips = hook["effective_version"] <= receipt.version < removed
        factor = min(1.0, 0.5 / (receipt.gradient_norm + 1e-6)) if clips else 1.0
        assert receipt.gradient_norm == pytest.approx(math.sqrt(square_sum(push.gradients)), rel=1e-13)
        assert receipt.clip_factor == factor
        factors.append(factor)
        replay.push(push.gradients, factor)
        if receipt.version == snapshot["version"]:
            path = f"{model_name}/snapshots/{snapshot['id']}/content"
            held = torch.load(io.BytesIO(download(server, path, "torch")), weights_only=True)
            assert {name: bits(value) for name, value in held["model"].items()} == replay.history[-1]
            assert [state_bits(entry) for entry in held["optimizer"]] == replay.state()
            assert held["optimizer"][0]["param_groups"][0]["lr"] == 0.02
    assert min(factors) < 1.0
    check_pulls(pushes, replay.history)
    with server.connect(model_name, worker="after") as session:
        assert array_bits(session.pull()) == replay.history[-1]
    restore(server, model_name, snapshot["id"])
    with server.connect(model_name, worker="later") as session:
        assert array_bits(session.pull()) == replay.history[snapshot["version"]]


def test_models_of_one_server_do_not_touch_each_other(server: RunningServer, model_name: str) -> None:
    """Two models whose workers share names, epochs and sequences, pushing at the same time."""
    names = [f"{model_name}-{side}" for side in ("a", "b")]
    with (
        crew_of(server, names[0], 40) as one,
        crew_of(server, names[1], 40) as other,
    ):
        found = [one.pushes(), other.pushes()]
    for name, pushes in zip(names, found, strict=True):
        check_history(pushes, 40)
        replay = fresh_replay()
        for push in pushes:
            replay.push(push.gradients)
        check_pulls(pushes, replay.history)
        with server.connect(name, worker="after") as session:
            assert array_bits(session.pull()) == replay.history[-1]
