"""The whole demo as a user runs it: one command, real flights, one line of JSON at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pushstep.client import connect
from pushstep.client.demo.data import Flights, load_flights
from pushstep.client.demo.model import flight_model, held_out_auc, optimizers
from pushstep.client.demo.result import AUC_APART, AUC_FLOOR
from pushstep.client.demo.training import BATCH, batch_count, train
from tests.support.servers.harness import kill_and_restart, start_server

KEYS = {"auc_remote", "auc_local", "seconds", "pushes", "checkpoint", "picture", "policies"}
PNG = b"\x89PNG\r\n\x1a\n"


def run_demo(folder: Path, *options: str) -> dict[str, Any]:
    """What the command says as JSON. One pass is enough to reach the floor; the user's default is three."""
    command = [Path(sys.executable).with_name("pushstep"), "demo", "--json", "--epochs", "1", "--out", "out"]
    done = subprocess.run(
        [*command, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=380,
        # five processes with a thread per core each would wait for each other on a small machine
        env={**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    told: dict[str, Any] = json.loads(line)
    assert told.keys() == KEYS
    assert told["seconds"] > 0
    assert (folder / told["picture"]).read_bytes().startswith(PNG)
    return told


def counts(told: dict[str, int]) -> dict[int, int]:
    return {int(value): count for value, count in told.items()}


@pytest.mark.soak
@pytest.mark.timeout(800)
def test_the_demo_in_two_ranks_ends_with_the_score_of_one_server(tmp_path: Path) -> None:
    told = {shards: run_demo(tmp_path, "--shards", str(shards)) for shards in (1, 2)}
    assert min(run["auc_remote"] for run in told.values()) >= AUC_FLOOR
    assert abs(told[1]["auc_remote"] - told[2]["auc_remote"]) <= AUC_APART


# some 15 s when nothing else runs, twice that for all policies; the bound is for machines where a lot does
@pytest.mark.timeout(400)
def test_the_demo_trains_to_the_same_score_as_torch_on_a_coarse_wire(tmp_path: Path) -> None:
    told = run_demo(tmp_path, "--wire", "int8")
    (run,) = told["policies"]
    assert run["policy"] == "async"
    assert all(told[key] == run[key] for key in ("auc_remote", "auc_local", "pushes", "checkpoint"))
    assert min(told["auc_remote"], told["auc_local"]) >= AUC_FLOOR == 0.72
    assert abs(told["auc_remote"] - told["auc_local"]) <= 0.01
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["flights.safetensors", "loss.png"]


def trained(data: Path, flights: Flights, kill_at: int | None) -> tuple[float, int]:
    """The demo's training by one worker, and its server's killing between two steps; the AUC and the last version."""
    server = start_server(data, "--durability", "durable")
    try:
        network = flight_model(flights)
        session = connect(server.grpc, model="flights", worker="w0", retry_for_s=60.0)
        remote = session.attach(optimizers(network), module=network)

        def report(step: int, loss: float) -> None:
            nonlocal server
            if step == kill_at:
                server = kill_and_restart(server)

        train(network, remote, flights, epochs=1, report=report, batch=4 * BATCH)
        assert remote.last_receipt is not None
        session.close()
        assert server.stop() == 0
        return held_out_auc(network, flights), remote.last_receipt.version
    finally:
        server.kill()


@pytest.mark.timeout(300)
def test_the_demo_survives_a_kill_of_its_server_with_the_score_that_it_would_have_had(tmp_path: Path) -> None:
    flights = load_flights()
    straight = trained(tmp_path / "straight", flights, None)
    assert straight[1] == batch_count(flights, 1, batch=4 * BATCH)
    assert trained(tmp_path / "killed", flights, straight[1] // 2) == straight


@pytest.mark.timeout(400)
@pytest.mark.soak
def test_each_policy_trains_to_the_score_of_what_it_compares_with(tmp_path: Path) -> None:
    """Takes a minute or two."""
    # 256 batches among three: the last round is of one worker, the others have left
    told = run_demo(tmp_path, "--policy", "all", "--workers", "3")
    flights = load_flights()
    pushes = batch_count(flights, 1)
    runs = {run["policy"]: run for run in told["policies"]}
    assert list(runs) == ["async", "bounded", "sync"]
    for policy, run in runs.items():
        assert run["pushes"] == sum(run["staleness"].values()) == pushes
        assert sum(made_of * times for made_of, times in counts(run["contributors"]).items()) == pushes
        assert run["versions"] == sum(run["contributors"].values())
        assert run["pushes_per_s"] > 0
        assert min(run["auc_remote"], run["auc_local"]) >= AUC_FLOOR
        assert abs(run["auc_remote"] - run["auc_local"]) <= AUC_APART == 0.015
        model = flight_model(flights)
        model.load_state_dict(load_file(tmp_path / run["checkpoint"]))
        assert round(held_out_auc(model, flights), 6) == run["auc_remote"], policy

    assert counts(runs["async"]["contributors"]) == counts(runs["bounded"]["contributors"]) == {1: pushes}
    # while one computes, each of the others may go from bound + 1 pushes behind it to bound + 1 ahead
    assert max(counts(runs["bounded"]["staleness"])) <= 2 * 2 * (3 + 1)
    sync = runs["sync"]
    assert (counts(sync["staleness"]), counts(sync["contributors"])) == ({0: pushes}, {3: 85, 1: 1})
    # the local steps are on the same flights, added up in another order
    assert sync["local_batch"] == 3 * BATCH
    assert abs(sync["auc_remote"] - sync["auc_local"]) <= 0.001
