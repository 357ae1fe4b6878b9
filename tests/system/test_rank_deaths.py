"""Ranks that die: the others end, all meet at one version, and workers go on with each step applied once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from pushstep.client import connect
from pushstep.proto.errors import ModelNotLoaded
from pushstep.server.process.exit_status import ExitStatus
from pushstep.server.ranks.resharding import reshard
from tests.support.ranks.group import RankGroup, Torchrun, running_ranks
from tests.support.servers.harness import RunningServer, running_server

STEPS = 12


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.weight = torch.nn.Parameter(torch.randn(60_000))
        self.bias = torch.nn.Parameter(torch.randn(10))


def set_gradients(net: Net, step: int) -> None:
    drawn = torch.Generator().manual_seed(step)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=drawn)


def optimizer(net: Net) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(net.parameters(), lr=0.1, lr_decay=0.01)


def bits(net: Net) -> list[bytes]:
    return [parameter.detach().numpy().tobytes() for parameter in net.parameters()]


def expected(folder: Path, steps: int) -> list[bytes]:
    """What one server makes of the same gradients."""
    net = Net()
    with running_server(folder) as server:
        attached = server.connect("m").attach(optimizer(net), module=net)
        for step in range(steps):
            set_gradients(net, step)
            attached.step()
    return bits(net)


def stepped(group: RankGroup, net: Net, first: int, last: int) -> list[int]:
    session = group.leader.connect("m", retry_for_s=60.0)
    attached = session.attach(optimizer(net), module=net)
    versions = []
    for step in range(first, last):
        set_gradients(net, step)
        attached.step()
        versions.append(attached.last_receipt.version)
    session.close()
    return versions


def test_all_ranks_end_with_one_and_go_on_together(tmp_path: Path) -> None:
    net = Net()
    with running_ranks(tmp_path / "ranks", 3, "--durability", "durable") as group:
        assert stepped(group, net, 0, 4) == [1, 2, 3, 4]
        assert group.kill(1) == [ExitStatus.RANK_LOST] * 2
        group.start()
        assert stepped(group, net, 4, 8) == [5, 6, 7, 8]
        assert group.kill(0) == [ExitStatus.RANK_LOST] * 2
        group.start()
        assert stepped(group, net, 8, STEPS) == [9, 10, 11, 12]
        assert group.stop() == [0, 0, 0]
        group.start()
        assert stepped(group, net, STEPS, STEPS + 1) == [STEPS + 1]
    assert bits(net) == expected(tmp_path / "one", STEPS + 1)


def test_ranks_that_have_lost_different_versions_meet_at_one(tmp_path: Path) -> None:
    """At `applied` a crash undoes what came behind the last snapshot, which all ranks have of one version."""
    net = Net()
    with running_ranks(tmp_path, 2) as group:
        stepped(group, net, 0, 4)
        taken = group.leader.rest("POST", "/v1/models/m/snapshots")
        assert taken.status_code == 201, taken.text
        at_4 = bits(net)
        stepped(group, net, 4, 6)
        group.kill(1)
        group.start()
        shown = group.leader.rest("GET", "/v1/models/m").json()
        assert (shown["version"], shown["timeline"]) == (4, 2)
        other = Net()
        session = group.leader.connect("m", "reader")
        session.attach(optimizer(other), module=other)
        assert bits(other) == at_4


def test_another_number_of_ranks_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    net, data = Net(), tmp_path / "ranks"
    done = 0
    for world in (4, 3, 1, 2):
        if world == 1:
            with running_server(data) as server:
                one_step(server, net, done)
        else:
            with running_ranks(data, world) as group:
                one_step(group.leader, net, done)
        done += 1
    assert bits(net) == expected(tmp_path / "one", done)


def test_another_number_of_ranks_leaves_nothing_when_a_part_is_damaged(tmp_path: Path) -> None:
    """The first new part is whole by then; the old ones stay as they are."""
    data = tmp_path / "ranks"
    with running_ranks(data, 2) as group:
        stepped(group, Net(), 0, 1)
        assert group.stop() == [0, 0]
    before = sorted(data.rglob("*"))
    damaged = next(data.glob("rank-1/models/m/snapshots/*/*.safetensors"))
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelNotLoaded, match="rank 1 of 2"):
        reshard(data, 3)
    assert sorted(data.rglob("*")) == before
    damaged.write_bytes(content)
    reshard(data, 3)
    assert len(list(data.glob("rank-*/models/m/ranks.json"))) == 3


def one_step(server: RunningServer, net: Net, step: int) -> None:
    """One step of a worker that has nothing but the server's values."""
    session = server.connect("m", retry_for_s=60.0)
    attached = session.attach(optimizer(net), module=net)
    set_gradients(net, step)
    attached.step()
    assert (attached.last_receipt.version, attached.last_receipt.timeline) == (step + 1, 1)
    session.close()


def test_torchrun_brings_killed_ranks_back_under_a_worker(tmp_path: Path) -> None:
    net, versions = Net(), []
    group = Torchrun(tmp_path / "ranks", 2, "--durability", "durable", restarts=3)
    try:
        session = connect(group.grpc, model="m", worker="w0", retry_for_s=100.0)
        attached = session.attach(optimizer(net), module=net)
        for step in range(STEPS):
            set_gradients(net, step)
            if step in (3, 8):
                os.kill(group.pids()[step % 2], signal.SIGKILL)
            attached.step()
            versions.append(attached.last_receipt.version)
        session.close()
    finally:
        group.stop()
    assert versions == list(range(1, STEPS + 1))
    assert bits(net) == expected(tmp_path / "one", STEPS)
