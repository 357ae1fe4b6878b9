"""`pushstep export` and `pushstep import` as a user runs them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load, load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tests.support.servers.harness import RunningServer
from tests.support.servers.operators import download, show_model, take_snapshot
from tests.support.terminals.command import pushstep
from tests.support.workers.wire import created


def ran(*arguments: str | Path) -> dict[str, object]:
    done = pushstep(*arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_there_and_back(server: RunningServer, model_name: str, tmp_path: Path) -> None:
    session = created(server, model_name)
    where, file = ("--server", server.grpc, "--model", model_name), tmp_path / "m.safetensors"
    told = ran("export", *where, "--state", file)
    assert told == {
        "model": model_name,
        "timeline": 1,
        "version": 1,
        "format": "safetensors",
        "path": str(file),
        "bytes": file.stat().st_size,
    }
    snapshot = take_snapshot(server, model_name)["id"]
    session.push({"bias": np.ones(4, np.float32)})
    ran("export", *where, "--format", "torch", tmp_path / "m.pt")
    loaded = torch.load(tmp_path / "m.pt", weights_only=True)
    assert not torch.equal(loaded["model"]["bias"], load_file(file)["bias"])
    ran("export", *where, "--snapshot", snapshot, "--state", tmp_path / "s.safetensors")
    assert {k: v.tolist() for k, v in load_file(tmp_path / "s.safetensors").items()} == {
        k: v.tolist() for k, v in load_file(file).items()
    }
    assert ran("import", *where, file)["state"] == "replaced"
    assert ran("import", *where, file, "--weights-only", "--keep-state")["state"] == "kept"
    ran("export", *where, "--state", tmp_path / "again.safetensors")
    assert torch.equal(load_file(tmp_path / "again.safetensors")["bias"], load_file(file)["bias"])
    assert show_model(server, model_name)["timeline"] == 3
    made = f"{model_name}-made"
    assert ran("import", "--server", server.grpc, "--model", made, "--create", file)["version"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again.safetensors",
        "m.pt",
        "m.safetensors",
        "s.safetensors",
    ]


def test_a_model_of_a_plain_file(server: RunningServer, model_name: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "plain.safetensors")
    (tmp_path / "groups.json").write_text(json.dumps([{"rule": "adagrad", "params": ["b", "a"], "lr": 0.5}]))
    where = ("--server", f"unix:{server.unix}", "--model", model_name)
    groups = f"@{tmp_path / 'groups.json'}"
    told = ran("import", *where, "--create", "--groups", groups, tmp_path / "plain.safetensors")
    assert (told["parameters"], told["groups"]) == (2, 1)
    shown = server.rest("GET", f"/v1/models/{model_name}/param-groups").json()["param_groups"][0]
    assert (shown["params"], shown["lr"]) == (["b", "a"], 0.5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)


@pytest.mark.parametrize("rule", [torch.optim.Adadelta, torch.optim.Adagrad])
def test_torch_goes_on_from_a_dcp_folder(
    server: RunningServer, model_name: str, tmp_path: Path, rule: type[torch.optim.Optimizer]
) -> None:
    """`load` and `set_state_dict` of torch.distributed.checkpoint, into a module and an optimizer of torch's own."""
    mine, out = Net(), tmp_path / "out"
    with server.connect(model_name) as session:
        remote = session.attach(rule(mine.parameters(), lr=0.3), module=mine)
        for _ in range(3):
            mine.norm(mine.one(torch.randn(4, 3))).square().sum().backward()
            remote.step()
            remote.zero_grad()
        told = ran("export", "--server", server.grpc, "--model", model_name, "--format", "dcp", out)
        held, file = remote.state_dict(), load(download(server, f"{model_name}/export", "safetensors"))
    assert (told["format"], told["version"]) == ("dcp", 3)
    module = Net()
    optimizer = rule(module.parameters(), lr=1.0)
    weights, state = get_state_dict(module, optimizer)
    with warnings.catch_warnings(action="ignore"):  # that there is no process group is on purpose
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=out, no_dist=True)
    set_state_dict(module, optimizer, model_state_dict=weights, optim_state_dict=state)
    for name, tensor in file.items():
        assert torch.equal(module.state_dict()[name], tensor), name
    loaded = optimizer.state_dict()
    assert loaded["param_groups"][0]["lr"] == 0.3
    for number, states in held["state"].items():
        for name, tensor in states.items():
            assert torch.equal(loaded["state"][number][name], tensor), (number, name)


REFUSED = {
    "an unknown model": (["export", "--model", "nobody", "out"], 1, "no model is named 'nobody'"),
    "no folder": (["export", "--model", "nobody", "missing/out"], 2, "is no folder"),
    "a folder that is there": (
        ["export", "--model", "nobody", "--format", "dcp", "."],
        2,
        "is there already",
    ),
    "a file that is none": (["import", "--model", "nobody", "missing"], 2, "does not exist"),
    "a format that is none": (
        ["export", "--model", "nobody", "--format", "onnx", "out"],
        2,
        "'onnx' is not one of",
    ),
    "what is not safetensors": (
        ["import", "--create", "--model", "new", "text"],
        1,
        "it is no safetensors file",
    ),
    "groups for what is not": (
        ["import", "--create", "--groups", "[]", "--model", "new", "text"],
        1,
        "is no safetensors file",
    ),
    "groups of an old model": (["import", "--groups", "[]", "--model", "new", "text"], 2, "--create"),
    "a part of a new model": (
        ["import", "--create", "--partial", "--model", "new", "text"],
        2,
        "the whole file",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    arguments, status, words = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("no tensors " * 1000)
    done = pushstep(*arguments, "--server", server.grpc)
    assert done.returncode == status, done.stderr
    assert words in " ".join(done.stderr.replace("│", " ").split()), done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_without_a_server(tmp_path: Path) -> None:
    done = pushstep("export", "--server", "127.0.0.1:1", "--model", "m", str(tmp_path / "out"))
    assert done.returncode == 3
    assert "no pushstep server answers at 127.0.0.1:1" in done.stderr
    assert list(tmp_path.iterdir()) == []
