"""A client made of nothing but stock grpcio-tools' output gets the numbers that pushstep.optim gets."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pushstep.proto
from pushstep import optim
from tests.support.servers.harness import RunningServer

PROGRAM = Path(__file__).with_name("stock_client.py")
EXISTING = [0.5, -1.5, 2.0, 0.0]


def run(*command: str | Path, folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What grpcio-tools makes of the .proto files, laid out as their imports say."""
    folder = tmp_path_factory.mktemp("stock")
    (folder / "protos" / "pushstep" / "proto").mkdir(parents=True)
    (folder / "stubs").mkdir()
    sources = sorted(Path(pushstep.proto.__path__[0]).glob("*.proto"))
    assert [path.name for path in sources] == [
        "journal.proto",
        "limits.proto",
        "shards.proto",
        "training.proto",
        "types.proto",
    ]
    for path in sources:
        shutil.copy(path, folder / "protos" / "pushstep" / "proto")
    options = ["-Iprotos", "--python_out=stubs", "--grpc_python_out=stubs"]
    names = [f"pushstep/proto/{path.name}" for path in sources]
    run(sys.executable, "-I", "-m", "grpc_tools.protoc", *options, *names, folder=folder)
    return folder / "stubs"


@pytest.fixture
def found(server: RunningServer, model_name: str, stubs: Path) -> dict[str, Any]:
    """What the stock client was told by a server that holds one model of another client's."""
    with server.connect(f"{model_name}-old", "first") as session:
        session.create({"a": np.array(EXISTING, np.float32)}, [{"rule": "adadelta", "params": ["a"]}])
    names = [f"{model_name}-old", f"{model_name}-new"]
    printed = run(sys.executable, "-I", PROGRAM, stubs, server.grpc, *names, folder=stubs)
    told: dict[str, Any] = json.loads(printed)
    assert names[0] in told["models"]
    assert told["files"], "it must have loaded the stubs"
    assert all(Path(file).is_relative_to(stubs) for file in told["files"])
    return told


def parameter(*values: float, shape: tuple[int, ...] = (-1,)) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values).reshape(shape))


def flat(tensor: Tensor) -> list[float]:
    """The numbers as JSON carries them: a float32 is exact as a double."""
    return [float(value) for value in tensor.detach().reshape(-1)]


def test_a_stock_client_trains_a_model_that_is_there(found: dict[str, Any]) -> None:
    told = found["existing"]
    assert told["pulled"] == [0, {"a": EXISTING}]
    here = parameter(*EXISTING)
    local = optim.Adadelta([here])
    here.grad = torch.tensor([1.0, 2.0, -3.0, 0.5])
    local.step()
    assert (told["pushed"]["outcome"], told["pushed"]["version"]) == ("OUTCOME_APPLIED", 1)
    assert told["pushed"]["lr"] == [1.0]
    assert told["refused"] == "INVALID_ARGUMENT"
    assert told["after"] == [1, {"a": flat(here)}]
    # what the .proto says of int8: 1, 2, -3 and 0.5 are 42.3, 84.7, -127 and 21.2 scales
    here.grad = torch.tensor([42.0, 85.0, -127.0, 21.0]) * (torch.tensor(3.0) / 127)
    local.step()
    assert (told["int8"]["outcome"], told["int8"]["version"]) == ("OUTCOME_APPLIED", 2)
    here.grad = torch.tensor([0.0, 0.25, 0.0, -4.0])
    local.step()
    assert (told["elements"]["outcome"], told["elements"]["version"]) == ("OUTCOME_APPLIED", 3)
    assert told["elements"]["gradient_norm"] == math.sqrt(0.25**2 + 16)
    assert told["backwards"] == "INVALID_ARGUMENT"
    assert told["smaller"] == [3, {"a": flat(here)}]


def test_a_stock_client_creates_a_model_and_trains_it(
    found: dict[str, Any], server: RunningServer, model_name: str
) -> None:
    told = found["new"]
    assert (told["created_at"], told["lead"]) == (0, True)

    table = parameter(*(index / 8 for index in range(12)), shape=(6, 2))
    weights, bias = parameter(1.0, -2.0, 3.0), parameter(0.25, shape=())
    adagrad = optim.Adagrad([table], lr=0.5)
    adadelta = optim.Adadelta([weights, bias], maximize=True)

    def values() -> dict[str, list[float]]:
        return {"table": flat(table), "weights": flat(weights), "bias": flat(bias)}

    rows = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    table.grad = torch.sparse_coo_tensor(torch.tensor([[4, 1, 4]]), rows, (6, 2), check_invariants=True)
    weights.grad, bias.grad = torch.tensor([0.1, -0.2, 0.3]), torch.tensor(0.7)
    squares = [rows[1], rows[0] + rows[2], weights.grad, bias.grad]
    norm = math.sqrt(sum(float(part.double().square().sum()) for part in squares))
    adagrad.step()
    adadelta.step()
    assert told["pushed"]["outcome"] == "OUTCOME_APPLIED"
    assert told["pushed"]["gradient_norm"] == pytest.approx(norm, rel=1e-14)
    assert told["pushed"]["lr"] == [0.5, 1.0]
    assert told["pulled"] == [1, values()]

    rows = torch.tensor([[-0.25, 0.125]])
    table.grad = torch.sparse_coo_tensor(torch.tensor([[5]]), rows, (6, 2), check_invariants=True)
    weights.grad, bias.grad = None, torch.tensor(0.5)
    adagrad.step()
    adadelta.step()
    receipt, version, pulled = told["exchanged"]
    assert (receipt["version"], receipt["sequence"], receipt["staleness"], version) == (2, 2, 0, 2)
    assert pulled == values()
    assert told["rows_sent"] == [1]
    assert told["again"] == {**receipt, "duplicates": 1}
    assert told["rows"] == flat(table[[5, 0]])

    steps, state = told["state"]
    assert steps == [2, 1, 2]
    held = {
        f"{name}.{key}": flat(value)
        for optimizer, named in ((adagrad, {"table": table}), (adadelta, {"weights": weights, "bias": bias}))
        for name, tensor in named.items()
        for key, value in optimizer.state[tensor].items()
        if key != "step"
    }
    assert state == {**values(), **held}
    with server.connect(f"{model_name}-new", "reader") as session:
        assert {name: array.reshape(-1).tolist() for name, array in session.pull().items()} == values()
