"""The whole demo as a user runs it: one command, real flights, one line of JSON at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pushstep.client.demo.data import load_flights
from pushstep.client.demo.model import flight_model
from pushstep.client.demo.run import AUC_APART, AUC_FLOOR
from pushstep.client.demo.scores import held_out_auc
from pushstep.client.demo.training import batch_count

KEYS = {"auc_remote", "auc_local", "seconds", "pushes", "checkpoint", "picture"}
PNG = b"\x89PNG\r\n\x1a\n"


# a quarter of a minute when nothing else runs; the bound is for machines where a lot does
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("wire", "apart"), [("float32", AUC_APART), ("int8", 0.01)])
def test_the_demo_trains_to_the_same_score_as_torch(tmp_path: Path, wire: str, apart: float) -> None:
    # one pass is enough to reach the floor; the user's default is three
    command = [
        Path(sys.executable).with_name("pushstep"),
        "demo",
        "--json",
        "--epochs",
        "1",
        "--out",
        "out",
        "--wire",
        wire,
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=380,
        # five processes with a thread per core each would wait for each other on a small machine
        env={**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    told = json.loads(line)
    assert told.keys() == KEYS
    assert min(told["auc_remote"], told["auc_local"]) >= AUC_FLOOR == 0.72
    assert abs(told["auc_remote"] - told["auc_local"]) <= apart <= AUC_APART == 0.015
    assert told["seconds"] > 0

    flights = load_flights()
    assert told["pushes"] == batch_count(flights, 1)
    model = flight_model(flights)
    model.load_state_dict(load_file(tmp_path / told["checkpoint"]))
    assert round(held_out_auc(model, flights), 6) == told["auc_remote"]
    assert (tmp_path / told["picture"]).read_bytes().startswith(PNG)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["flights.safetensors", "loss.png"]
