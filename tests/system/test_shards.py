"""A worker of a model in two ranks: what it does beside plain steps, and that it goes on when the ranks are elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pushstep.optim import Adagrad
from pushstep.proto.errors import NotInRanks
from tests.support.deployments.ports import free_port
from tests.support.ranks.group import RankGroup, running_ranks
from tests.support.servers.harness import RunningServer, wait_until
from tests.support.trainings.bits import array_bits, parameter_bits

ROWS, WIDTH = 3000, 32


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Rank 0 of two."""
    with running_ranks(tmp_path_factory.mktemp("ranks"), 2) as group:
        yield group.leader


START: dict[str, Any] = {
    "flat": np.zeros(50_001, np.float32),
    "table": np.ones((ROWS, WIDTH), np.float32),
    "bias": np.ones(3, np.float32),
}


def drawn(seed: int, last_rows: bool = False) -> dict[str, Any]:
    """A gradient of the vector, and of some rows; `last_rows`: they lie in the last rank."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(ROWS - 2 if last_rows else 0, ROWS, 50)
    return {
        "flat": generator.standard_normal(50_001, dtype=np.float32),
        "table": (ids, generator.standard_normal((50, WIDTH), dtype=np.float32)),
    }


def both(server: RunningServer, ranks: RunningServer, run: Callable[[RunningServer], Any]) -> None:
    """The same from one server and from two ranks."""
    assert run(ranks) == run(server)


def test_readers_get_all_and_then_what_has_changed(
    server: RunningServer, ranks: RunningServer, model_name: str
) -> None:
    """A reader never joins: its first pull brings the map. Pushes that touch rows of one rank bring others nothing."""

    def run(of: RunningServer) -> Any:
        with of.connect(model_name) as session, of.connect(model_name, "reader") as reader:
            session.create(START)
            seen = [array_bits(reader.pull())]
            for step in range(3):
                receipt = session.push(drawn(step, last_rows=step == 1))
                seen.append(array_bits(reader.pull()))
                assert reader.version == receipt.version == step + 1
            return seen

    both(server, ranks, run)


def test_rows_alone_are_refused(ranks: RunningServer, model_name: str) -> None:
    """Of one parameter, of several, and for a cache; the session goes on."""
    with ranks.connect(model_name) as session:
        session.create(START)
        rows = session.row_cache()
        for ask in (
            lambda: session.pull_rows("table", [ROWS - 1]),
            lambda: session.pull_rows({"table": [0], "bias": [1]}),
            lambda: rows.get({"table": [0]}),
        ):
            with pytest.raises(NotInRanks):
                ask()
        assert array_bits(session.pull()) == array_bits(START)


class Net(nn.Module):
    """One layer, whose weight is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(300, 70)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))


def test_steps_in_flight(server: RunningServer, ranks: RunningServer, model_name: str) -> None:
    """With prefetch, and with overlap, which has nothing to send early there."""

    def run(of: RunningServer) -> Any:
        found = []
        for options in ({"prefetch": True}, {"overlap": True}):
            net = Net()
            with of.connect(model_name + next(iter(options))) as session:
                remote = session.attach(Adagrad(net.parameters(), lr=0.1), module=net, **options)
                for step in range(4):
                    remote.zero_grad()
                    x = torch.linspace(0, 1 + step, 300)
                    net.layer(x).square().sum().backward()
                    remote.step()
                    remote.synchronize()
            found.append(parameter_bits(net))
        return found

    both(server, ranks, run)


def test_a_weight_that_does_not_lie_in_one_piece(
    server: RunningServer, ranks: RunningServer, model_name: str
) -> None:
    """Transposed parameters and gradients are cut along their rows, whatever their strides are."""

    def run(of: RunningServer) -> Any:
        weight = nn.Parameter(torch.linspace(-1, 1, 33 * 1000).view(33, 1000).t())
        with of.connect(model_name) as session:
            remote = session.attach(Adagrad([weight], lr=0.1), names=["w"])
            for step in range(3):
                weight.grad = torch.linspace(-1, step, 33 * 1000).view(33, 1000).t()
                remote.step()
        return weight.detach().contiguous().numpy().tobytes()

    both(server, ranks, run)


def test_a_push_waits_for_its_round_without_its_body(ranks: RunningServer, model_name: str) -> None:
    """Each rank holds its part meanwhile; the worker only asks again."""
    first, second = (ranks.connect(model_name, f"w{n}", timeout_s=1.5) for n in range(2))
    for session in (first, second):
        session.create(START, policy="sync", workers=2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first.exchange, drawn(0))
        wait_until(lambda: first._transport.wait.in_trouble)
        receipt, values = second.exchange(drawn(1))
        other, same = waiting.result()
    assert receipt.version == other.version == 1
    assert receipt.contributors == other.contributors == ["w0", "w1"]
    assert array_bits(values) == array_bits(same)
    first.close()
    second.close()


def test_small_pushes_go_over_one_open_call_to_each_rank(ranks: RunningServer, model_name: str) -> None:
    with ranks.connect(model_name) as session:
        session.create({"w": np.zeros(30_000, np.float32)})
        transport = session._transport
        seen = []
        for step in range(3):
            gradient = {"w": np.full(30_000, 1 + step, np.float32)}
            receipt = session.push(gradient) if step % 2 else session.exchange(gradient)[0]
            assert receipt.version == step + 1
            seen.append([each._steps._call for each in (transport, *transport._others.values())])
        assert len(seen[0]) == 2 and None not in seen[0]
        assert seen[0] == seen[1] == seen[2]


def test_a_worker_finds_ranks_that_have_moved(tmp_path: Path, model_name: str) -> None:
    """The ranks above 0 come back at other addresses: the map is another, and the worker joins again."""
    group = RankGroup(tmp_path, 2, "--durability", "durable")
    try:
        with group.leader.connect(model_name, retry_for_s=120.0) as session:
            session.create(START)
            assert session.push(drawn(0)).version == 1
            group.kill(1)
            group.ports[1] = free_port()
            group.start()
            receipt, values = session.exchange(drawn(1))
            assert receipt.version == 2
            assert array_bits(session.pull()) == array_bits(values)
        group.stop()
    finally:
        for rank in group.ranks:
            rank.kill()
