"""A worker of a model in two ranks: what it does beside plain steps, and that it goes on when the ranks are elsewhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pushstep.client import Session, connect
from pushstep.optim import Adagrad
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import ModelLost, NonfiniteGradient, RanksDiffer
from pushstep.server.config import Config
from tests.support.ranks.group import RankGroup, running_ranks
from tests.support.servers.harness import RunningServer, wait_until
from tests.support.servers.proxy import Proxy
from tests.support.trainings.bits import Bits, array_bits, parameter_bits
from tests.system.test_shards_exactly_once import running

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


# of every rank
ASKED = {"table": np.arange(0, ROWS, 100), "flat": [0, 50_000]}


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


def test_the_sum_of_a_round_that_is_not_stepped_is_of_no_other_push(
    server: RunningServer, ranks: RunningServer, model_name: str
) -> None:
    """Two finite gradients whose sum is not."""
    huge = {"flat": np.full(50_001, 3e38, np.float32)}

    def run(of: RunningServer) -> Any:
        first, second = (of.connect(model_name, f"w{number}") for number in range(2))
        with first, second, ThreadPoolExecutor(1) as pool:
            for session in (first, second):
                session.create(START, policy="sync", workers=2)
            for _ in range(3):
                pushed = pool.submit(first.push, huge)
                for push in (partial(second.push, huge), pushed.result):
                    with pytest.raises(NonfiniteGradient):
                        push()
            answer = of.rest("PATCH", f"/v1/models/{model_name}/policy", json={"policy": "async"})
            assert answer.status_code == 200, answer.text
            receipts = [first.push(drawn(step)).gradient_norm for step in range(30)]
            return receipts, array_bits(first.pull())

    both(server, ranks, run)


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


# the ports of the ranks above 0, from those of all before; None: another one
MOVES: dict[str, Callable[[Sequence[int]], Sequence[int | None]]] = {
    "to other addresses": lambda ports: [None, None],
    "to each other's": lambda ports: [ports[2], ports[1]],
    "to fewer": lambda ports: [ports[2]],
    "to more": lambda ports: [ports[2], None, ports[1]],
}


@pytest.mark.parametrize("move", MOVES)
def test_a_worker_finds_ranks_that_have_moved(tmp_path: Path, model_name: str, move: str) -> None:
    """The ranks above 0 come back elsewhere: the map is another, and the worker joins again."""
    group = RankGroup(tmp_path, 3, "--durability", "durable")
    try:
        with (
            group.leader.connect(model_name, "w0", retry_for_s=120.0) as session,
            group.leader.connect(model_name, "r0", retry_for_s=120.0) as reader,
            group.leader.connect(model_name, "r1", retry_for_s=120.0) as other,
        ):
            session.create(START)
            assert session.push(drawn(0)).version == 1
            rows, seen = reader.pull_rows(ASKED), other.pull()
            for rank in group.ranks:  # `stop` would close the session
                rank.process.send_signal(signal.SIGTERM)
            assert group.ended(0) == [0, 0]
            group.become(*MOVES[move](group.ports))
            group.start()
            assert array_bits(reader.pull_rows(ASKED)) == array_bits(rows)
            assert array_bits(other.pull()) == array_bits(seen)
            receipt, values = session.exchange(drawn(1))
            assert (receipt.version, receipt.outcome) == (2, "applied")
            assert array_bits(session.pull()) == array_bits(values)
        group.stop()
    finally:
        for rank in group.ranks:
            rank.kill()


def test_ranks_at_each_other_s_addresses(tmp_path: Path, model_name: str) -> None:
    """Nothing is read from the wrong rank, and nothing applied; once the addresses are right, the worker goes on."""
    with running(tmp_path) as job, connect(job.address, model=model_name, shared_memory=False) as session:
        session.create({"flat": np.zeros(60_000, np.float32)})  # of which ranks 1 and 2 have as much
        gradient = {"flat": np.linspace(-1, 1, 60_000, dtype=np.float32)}
        first, values = session.exchange(gradient)

        def read() -> None:
            with connect(job.address, model=model_name, worker="reader", shared_memory=False) as reader:
                reader.pull()

        for call in (
            read,
            session.pull_state,
            lambda: session.push(gradient),
            lambda: session.exchange(gradient),
            lambda: session.pull_rows("flat", [0, 59_999]),
        ):
            swap(job.proxies[1:])
            with pytest.raises(RanksDiffer, match=r"rank [12] .* as if it were rank [12]"):
                call()
            swap(job.proxies[1:])
            assert array_bits(session.pull()) == array_bits(values)
        assert session.push(gradient).version == first.version + 1


def test_an_old_map_is_found_out_though_rank_0_is_the_last_to_say_so(tmp_path: Path, model_name: str) -> None:
    """Another rank refuses the part at once, by a name that is no retry's: rank 0 is asked for its map before the worker is told."""
    with running(tmp_path) as job, connect(job.address, model=model_name, shared_memory=False) as session:
        session.create({"flat": np.zeros(60_000, np.float32)})
        transport = session._transport
        old = pb.ShardMap()
        assert transport.shards is not None
        old.CopyFrom(transport.shards)
        old.version += 1
        old.shards[1].address, old.shards[2].address = old.shards[2].address, old.shards[1].address
        transport.take(old)
        job.proxies[0].hold("up")
        later = threading.Timer(1.0, job.proxies[0].release, ["up"])
        later.start()
        receipt = session.push({"flat": np.ones(60_000, np.float32)})
        later.join()
        assert (receipt.version, receipt.outcome) == (1, "applied")
        assert transport.shards.version == old.version - 1


def swap(proxies: Sequence[Proxy]) -> None:
    one, other = proxies
    one.target, other.target = other.target, one.target
    for proxy in proxies:
        proxy.cut()


@pytest.mark.parametrize("policy", ["async", "sync"])
def test_a_model_is_deleted_while_workers_push(ranks: RunningServer, model_name: str, policy: str) -> None:
    """Its workers are told, and the job goes on."""

    def push(session: Session) -> None:
        with pytest.raises(ModelLost):
            while True:
                session.exchange(drawn(0))

    for turn in range(3):
        name = f"{model_name}-{turn}"
        sessions = [ranks.connect(name, f"w{number}") for number in range(2)]
        options: dict[str, Any] = {"policy": policy, **({"workers": 2} if policy == "sync" else {})}
        sessions[0].create(START, **options)
        with ThreadPoolExecutor(2) as pool:
            pushing = [pool.submit(push, session) for session in sessions]
            wait_until(lambda name=name: ranks.rest("GET", f"/v1/models/{name}").json()["version"] > 3)
            assert ranks.rest("DELETE", f"/v1/models/{name}").status_code == 204
            for pushed in pushing:
                pushed.result()
    assert ranks.rest("GET", "/v1/shards").json()["ready"]


def test_a_small_model_lies_in_fewer_ranks(tmp_path: Path, server: RunningServer) -> None:
    """As by default. It goes on, also with another number of ranks, and has the bits that one server has."""
    sizes = {"small": 10_000, "larger": 600_000, "large": 1_000_000}

    def pushed(leader: RunningServer, name: str, step: int) -> Bits:
        values = np.linspace(-1, 1, sizes[name], dtype=np.float32)
        with leader.connect(name, "w0") as session:
            session.create({"w": values})
            receipt, after = session.exchange({"w": np.roll(values, step)})
        assert receipt.version == step
        return array_bits(after)

    def lying(leader: RunningServer) -> dict[str, list[int]]:
        models = leader.rest("GET", "/v1/shards").json()["models"]
        return {model["name"]: [shard["rank"] for shard in model["shards"]] for model in models}

    part_bytes = ("--part-bytes", str(Config.model_fields["part_bytes"].default))
    group = RankGroup(tmp_path, 3, *part_bytes)
    for step in (1, 2):
        for name in sizes:
            both(server, group.leader, partial(pushed, name=name, step=step))
        few = {"small": [0], "larger": [0, 1]}
        assert lying(group.leader) == {**few, "large": [0, 1, 2] if step == 1 else [0, 1]}
        assert group.stop() == [0] * group.world
        if step == 1:
            group.become(None)
            group.start()
