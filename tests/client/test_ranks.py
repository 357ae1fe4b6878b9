"""Ranks of torch.distributed as workers: what equals DistributedDataParallel, and what is said of what does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pushstep.client import connect
from pushstep.proto.errors import InvalidSettings
from tests.support.processes.nursery import Nursery, nursery
from tests.support.servers.harness import RunningServer
from tests.support.servers.operators import show_model
from tests.support.workers.counting import create

BEGIN = """
import sys, warnings, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from pushstep.client import connect
from pushstep.optim import Adagrad
from pushstep.proto.errors import PushstepError
address, model_name, meeting, rank, folder = sys.argv[1:]
rank = int(rank)
def meet(world=2):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
def batch(step, of):
    made = torch.Generator().manual_seed(10 * step + of)
    return torch.randn(4, 6, generator=made)
def session():
    return connect(address, model=model_name, worker=f"rank{rank}", shared_memory=False, retry_for_s=30)
def train(network, optimizer, steps=20):
    for step in range(steps):
        optimizer.zero_grad()
        network(batch(step, rank)).square().mean().backward()
        optimizer.step()
def attempt(work):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            work()
        except PushstepError as error:
            print("refused:", error.code, error)
    for one in caught:
        print("warned:", one.message)
"""
EQUAL = """
meet()
module = network()
ours = session()
attempt(lambda: globals().update(optimizer=ours.attach(Adagrad(module.parameters(), lr=0.1), module=module, policy="sync", workers=2)))
train(module, optimizer)
ours.close()
wrapped = network()
ddp = DDP(wrapped)
train(ddp, Adagrad(wrapped.parameters(), lr=0.1))
same = all(torch.equal(a, b) for a, b in zip(module.parameters(), wrapped.parameters()))
print("equal" if same else "different", optimizer.last_receipt.version, sorted(optimizer.last_receipt.contributors))
"""
CASES = {
    "ddp before attach": (
        "meet(); module = network(); ddp = DDP(module)\n"
        "attempt(lambda: session().attach(Adagrad(module.parameters()), module=module))",
        ["refused: unsupported_module", "policy='sync', workers=2"],
    ),
    "ddp before attach, no module": (
        "meet(); module = network(); ddp = DDP(module)\n"
        "attempt(lambda: session().attach(Adagrad(module.parameters())))",
        ["refused: unsupported_module", "policy='sync', workers=2"],
    ),
    "ddp after attach": (
        "meet(); module = network(); ours = session()\n"
        "optimizer = ours.attach(Adagrad(module.parameters()), module=module, policy='sync', workers=2)\n"
        "ddp = DDP(module)\n"
        "attempt(lambda: train(ddp, optimizer, 1))",
        ["refused: unsupported_module", "policy='sync', workers=2"],
    ),
    "no wrapper": (
        "meet(); module = network(); ours = session()\n"
        "attempt(lambda: train(module, ours.attach(Adagrad(module.parameters()), module=module), 2))",
        ["warned: torch.distributed has 2 ranks, and under this model's policy 'async'", "workers=2"],
    ),
    "ranks that meet after attach": (
        "module = network(); ours = session()\n"
        "optimizer = ours.attach(Adagrad(module.parameters()), module=module)\n"
        "meet()\n"
        "attempt(lambda: train(module, optimizer, 2))",
        ["warned: torch.distributed has 2 ranks", "workers=2"],
    ),
    "rounds of one": (
        "meet(); module = network(); ours = session()\n"
        "attempt(lambda: ours.attach(Adagrad(module.parameters()), module=module, policy='sync'))",
        ["warned: policy='sync' waits for whoever is there"],
    ),
}
QUIET = {
    "async that is meant": (
        "meet(); module = network(); ours = session()\n"
        "attempt(lambda: train(module, ours.attach(Adagrad(module.parameters()), policy='async'), 2))"
    ),
    "rounds of all": (
        "meet(); module = network(); ours = session()\n"
        "attempt(lambda: train(module, ours.attach(Adagrad(module.parameters()), policy='sync', workers=2), 2))"
    ),
    "ranks by themselves": (
        "meeting += str(rank); each, rank = rank, 0; meet(1); rank = each\n"
        "module = network(); ddp = DDP(module); ours = session()\n"
        "attempt(lambda: train(ddp, ours.attach(Adagrad(module.parameters())), 2))"
    ),
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery(tmp_path_factory.mktemp("scripts")) as made:
        yield made


def both(server: RunningServer, model: str, scripts: Nursery, code: str, folder: Path) -> list[str]:
    """What two ranks of one script have said."""
    arguments = (server.grpc, model, str(folder / "meeting"))
    ranks = [scripts.start(BEGIN + code, *arguments, str(rank), str(folder)) for rank in range(2)]
    statuses = [rank.wait() for rank in ranks]
    said = [rank.said() for rank in ranks]
    assert statuses == [0, 0], said
    return said


def test_rounds_of_all_ranks_equal_ddp(
    server: RunningServer, model_name: str, scripts: Nursery, tmp_path: Path
) -> None:
    """To the last bit, and without a word."""
    said = both(server, model_name, scripts, EQUAL, tmp_path)
    assert said == ["equal 20 ['rank0', 'rank1']\n"] * 2
    assert show_model(server, model_name)["version"] == 20


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_is_said(
    server: RunningServer, model_name: str, scripts: Nursery, tmp_path: Path, case: str
) -> None:
    code, words = CASES[case]
    for said in both(server, model_name, scripts, code, tmp_path):
        lines = [line for line in said.splitlines() if line.startswith(("refused", "warned"))]
        assert all(word in lines[0] for word in words), said
        assert "local_parameter_edit" not in said


def test_its_broadcast_is_no_edit_of_the_user_s(
    server: RunningServer, model_name: str, scripts: Nursery, tmp_path: Path
) -> None:
    """Wrapped after the first step, which nobody looks for: the ranks that it writes to say what wrote."""
    code = (
        "meet(); module = network(); ours = session()\n"
        "optimizer = ours.attach(Adagrad(module.parameters()), module=module, policy='sync', workers=2)\n"
        "train(module, optimizer, 1)\n"
        "with torch.no_grad(): [p.add_(1 - rank) for p in module.parameters()]\n"
        "ddp = DDP(module); ddp(batch(1, rank)).sum().backward()\n"
        "if rank == 1: attempt(optimizer.step)"
    )
    said = both(server, model_name, scripts, code, tmp_path)[1]
    assert said.startswith("refused: unsupported_module DistributedDataParallel"), said


@pytest.mark.parametrize("case", QUIET)
def test_what_is_meant_is_not(
    server: RunningServer, model_name: str, scripts: Nursery, tmp_path: Path, case: str
) -> None:
    for said in both(server, model_name, scripts, QUIET[case], tmp_path):
        assert "refused" not in said and "warned" not in said


# --- workers=

WRONG = [
    ({"workers": 2}, "goes with policy='sync'"),
    ({"policy": "async", "workers": 2}, "goes with policy='sync'"),
    ({"policy": "sync", "workers": 0}, "1 or more"),
    ({"policy": "sync", "workers": True}, "1 or more"),
    ({"policy": "sync", "workers": "2"}, "1 or more"),
    ({"policy": {"policy": "sync", "min_workers": 3}, "workers": 2}, "two answers"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_workers_that_say_nothing(
    server: RunningServer, model_name: str, options: dict[str, object], message: str
) -> None:
    session = server.connect(model_name)
    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(InvalidSettings, match=message):
        session.attach(torch.optim.Adagrad([parameter]), names=["w"], **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidSettings, match=message):
        session.create({"w": np.zeros(3, np.float32)}, **options)  # type: ignore[arg-type]
    create(session)


@pytest.mark.parametrize("policy", ["sync", {"policy": "sync", "reduce": "sum"}])
def test_workers_are_the_policy_s_min_workers(server: RunningServer, model_name: str, policy: object) -> None:
    with connect(server.grpc, model=model_name, worker="w0") as session:
        session.create({"w": np.zeros(3, np.float32)}, policy=policy, workers=2)  # type: ignore[arg-type]
    held = server.rest("GET", f"/v1/models/{model_name}/policy").json()
    assert (held["policy"], held["min_workers"]) == ("sync", 2)
    assert held["reduce"] == ("mean" if policy == "sync" else "sum")
    again = server.connect(model_name, "w1")
    again.create({"w": np.zeros(3, np.float32)}, policy="sync")  # the model's says how many
