"""A model in several ranks: the same bits as in one server, whatever is trained, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from pushstep.client.session import Session
from pushstep.optim import keras, mlx
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import NonfiniteGradient, NotTheCoordinator, StorageFailed
from pushstep.proto.errors.status import from_rpc_error
from pushstep.proto.training_pb2_grpc import TrainingServiceStub
from pushstep.proto.types_pb2 import Identity
from pushstep.server.parts.refusals import ROUTES
from tests.support.ranks.group import RankGroup, running_ranks
from tests.support.servers.harness import RunningServer, running_server

WORLD = 3
SOMEBODY = Identity(worker="w", epoch=1, timeline=1)
STEPS = 6


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("alone")) as server:
        yield server


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankGroup]:
    with running_ranks(tmp_path_factory.mktemp("ranks"), WORLD) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def shown(group: RankGroup) -> str:
    """A model for operators to look at."""
    trained(group.leader, "shown", Training())
    return "shown"


class Net(torch.nn.Module):
    """Its table and its weights are cut; its bias is not."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = torch.nn.Embedding(9000, 16, sparse=sparse)
        self.weight = torch.nn.Parameter(torch.randn(50_000))
        self.narrow = torch.nn.Parameter(torch.randn(300, 64, dtype=torch.bfloat16))
        self.bias = torch.nn.Parameter(torch.randn(10))


@dataclass(frozen=True)
class Training:
    """One way to train: the optimizer, how it is attached, the hooks, and which gradients a step has."""

    optimizer: Callable[[Net], torch.optim.Optimizer] = lambda net: torch.optim.Adadelta(
        net.parameters(), lr=0.7
    )
    sparse: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    hooks: tuple[tuple[str, str, dict[str, Any]], ...] = ()
    rows: int = 500
    left_out: tuple[str, ...] = ()


def adagrad(net: Net) -> torch.optim.Optimizer:
    groups = [
        {"params": [net.table.weight, net.weight], "lr": 0.1},
        {"params": [net.narrow, net.bias], "lr": 0.3, "lr_decay": 0.01},
    ]
    return torch.optim.Adagrad(groups, initial_accumulator_value=0.1)


TRAININGS = {
    "adadelta": Training(),
    "adagrad in two groups": Training(adagrad),
    "rows": Training(adagrad, sparse=True),
    "few rows": Training(adagrad, sparse=True, rows=3),
    "bfloat16 on the wire": Training(options=(("wire", "bfloat16"),)),
    "int8 on the wire": Training(options=(("wire", "int8"),)),
    "int8 rows": Training(adagrad, sparse=True, options=(("wire", "int8"),)),
    "top-k": Training(options=(("top_k", 0.01),)),
    "clip and averages": Training(
        hooks=(
            ("clip_grad_norm", "step_pre", {"max_norm": 5.0}),
            ("gradient_centralization", "step_pre", {}),
            ("clip_grad_value", "step_pre", {"clip_value": 0.5}),
            ("ema", "step_post", {"momentum": 0.9, "overwrite_frequency": 4}),
        )
    ),
    "some parameters only": Training(left_out=("weight",)),
    "Keras Adadelta": Training(
        lambda net: keras.Adadelta(net.parameters(), learning_rate=0.7, weight_decay=0.01)
    ),
    "Keras Adagrad": Training(lambda net: keras.Adagrad(net.parameters(), learning_rate=0.1)),
    "MLX AdaDelta": Training(lambda net: mlx.AdaDelta(net.parameters(), learning_rate=0.7)),
    "MLX Adagrad": Training(lambda net: mlx.Adagrad(net.parameters(), learning_rate=0.1)),
    "MLX int8": Training(
        lambda net: mlx.Adagrad(net.parameters(), learning_rate=0.1), options=(("wire", "int8"),)
    ),
}


def gradients(net: Net, step: int, training: Training, worker: int = 0) -> None:
    drawn = torch.Generator().manual_seed(1000 * worker + step)
    for name, parameter in net.named_parameters():
        parameter.grad = None
        if name in training.left_out and step % 2:
            continue
        if training.sparse and name == "table.weight":
            # of all ranks at first, later of the first and of the last rank only
            low, high = [(0, 9000), (0, 600), (8500, 9000)][step % 3]
            ids = torch.randint(low, high, (training.rows,), generator=drawn)
            rows = torch.randn(training.rows, 16, generator=drawn)
            parameter.grad = torch.sparse_coo_tensor(ids[None], rows, parameter.shape, check_invariants=True)
        else:
            parameter.grad = torch.randn(parameter.shape, generator=drawn).to(parameter.dtype)


def told(receipt: Any) -> tuple[Any, ...]:
    return (
        receipt.version,
        str(receipt.outcome),
        receipt.gradient_norm,
        receipt.clip_factor,
        receipt.staleness,
        str(receipt.groups),
        tuple(receipt.effective_lr),
    )


def bits(net: Net) -> list[bytes]:
    return [p.detach().view(torch.uint8).numpy().tobytes() for p in net.parameters()]


def attached(session: Session, net: Net, training: Training) -> Any:
    return session.attach(training.optimizer(net), module=net)


def trained(
    server: RunningServer, model: str, training: Training, workers: int = 1, steps: int = STEPS
) -> tuple[Any, ...]:
    nets = [Net(training.sparse) for _ in range(workers)]
    sessions = [server.connect(model, f"w{number}", **dict(training.options)) for number in range(workers)]
    optimizers = [attached(s, net, training) for s, net in zip(sessions, nets, strict=True)]
    for name, point, settings in training.hooks:
        body = {"name": name, "point": point, "settings": settings}
        added = server.rest("POST", f"/v1/models/{model}/hooks", json=body)
        assert added.status_code == 201, added.text
    receipts = []
    for step in range(steps):
        for number, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
            gradients(net, step, training, number)
            optimizer.step()
            receipts.append(told(optimizer.last_receipt))
    found = receipts, [bits(net) for net in nets]
    for session in sessions:
        session.close()
    return found


def model_of(name: str) -> str:
    return name.replace(" ", "-")


@pytest.mark.parametrize("name", TRAININGS)
def test_the_same_bits_as_one_server(alone: RunningServer, group: RankGroup, name: str) -> None:
    training, model = TRAININGS[name], model_of(name)
    receipts, parameters = trained(group.leader, model, training)
    expected_receipts, expected = trained(alone, model, training)
    assert receipts == expected_receipts
    assert parameters == expected


def test_four_workers_in_turn(alone: RunningServer, group: RankGroup) -> None:
    training = Training(adagrad, sparse=True)
    assert trained(group.leader, "four", training, 4) == trained(alone, "four", training, 4)


def test_the_map_names_every_rank(group: RankGroup, shown: str) -> None:
    with grpc.insecure_channel(group.leader.grpc) as channel:
        answer = TrainingServiceStub(channel).Join(pb.JoinRequest(model=shown, worker="reader"))
    shards = answer.member.shards
    assert shards.world == WORLD
    assert [shard.address for shard in shards.shards] == [rank.grpc for rank in group.ranks]


def test_rounds_of_three(alone: RunningServer, group: RankGroup) -> None:
    training = Training(adagrad, sparse=True)
    assert in_rounds(group.leader, training) == in_rounds(alone, training)


def in_rounds(server: RunningServer, training: Training, steps: int = STEPS) -> tuple[Any, ...]:
    """What three workers under `sync` end with, and are told."""
    nets = [Net(training.sparse) for _ in range(3)]
    sessions = [server.connect("rounds", f"w{number}") for number in range(3)]
    optimizers = [
        session.attach(training.optimizer(net), module=net, policy="sync", workers=3)
        for session, net in zip(sessions, nets, strict=True)
    ]

    def work(number: int) -> list[Any]:
        receipts = []
        for step in range(steps):
            gradients(nets[number], step, training, number)
            optimizers[number].step()
            receipts.append(told(optimizers[number].last_receipt))
        return receipts

    with ThreadPoolExecutor(3) as working:
        receipts = list(working.map(work, range(3)))
    for session in sessions:
        session.close()
    return receipts, [bits(net) for net in nets]


def test_skips_and_refusals_make_no_version(group: RankGroup) -> None:
    net = Net()
    session = group.leader.connect("refusals")
    optimizer = attached(session, net, Training())
    gradients(net, 0, Training())
    optimizer.step()
    before = bits(net)
    with torch.no_grad():
        assert net.weight.grad is not None
        net.weight.grad[-1] = torch.nan  # in the last rank
    with pytest.raises(NonfiniteGradient, match="'weight'"):
        optimizer.step()
    assert bits(net) == before
    gradients(net, 1, Training())
    optimizer.step()
    assert optimizer.last_receipt.version == 2
    session.close()


@pytest.mark.parametrize(
    ("hook", "settings"),
    [
        ("clipnorm", {"clipnorm": 1.0}),
        ("gradient_noise", {}),
        ("clip_grad_norm", {"max_norm": 1.0, "norm_type": 1.0}),
    ],
)
def test_hooks_that_need_the_whole_are_refused(
    group: RankGroup, shown: str, hook: str, settings: dict[str, Any]
) -> None:
    body = {"name": hook, "point": "step_pre", "settings": settings}
    answer = group.leader.rest("POST", "/v1/models/shown/hooks", json=body)
    assert (answer.status_code, answer.json()["code"]) == (409, "not_in_ranks")
    assert group.leader.rest("GET", "/v1/models/shown/hooks").json()["hooks"] == []


@pytest.mark.parametrize("route", ROUTES)
def test_what_needs_one_server_is_refused(group: RankGroup, shown: str, route: str) -> None:
    method, path = route.split()
    path = path.replace("{m}", shown).replace("{snapshot}", "t1-v6-e0-1").replace("{name:path}", "weight")
    answer = group.leader.rest(method, path, json={} if method in ("POST", "PATCH") else None)
    assert (answer.status_code, answer.json()["code"]) == (409, "not_in_ranks"), answer.text


@pytest.mark.parametrize(
    "call",
    [
        lambda rank: rank.Join(pb.JoinRequest(model="shown", worker="w")),
        lambda rank: next(rank.JoinInParts(iter([pb.JoinRequest(model="shown", worker="w")]))),
        lambda rank: rank.Heartbeat(pb.HeartbeatRequest(model="shown", identity=SOMEBODY)),
        lambda rank: rank.Leave(pb.LeaveRequest(model="shown", identity=SOMEBODY)),
        lambda rank: next(rank.Pull(pb.PullRequest(model="shown"))),
        lambda rank: next(rank.PullState(pb.PullStateRequest(model="shown"))),
        lambda rank: next(rank.PullExtras(pb.PullExtrasRequest(model="shown"))),
    ],
)
def test_only_rank_0_decides(group: RankGroup, shown: str, call: Callable[[Any], Any]) -> None:
    with grpc.insecure_channel(group.ranks[1].grpc) as channel, pytest.raises(grpc.RpcError) as raised:
        call(TrainingServiceStub(channel))
    assert isinstance(from_rpc_error(raised.value), NotTheCoordinator)
    assert group.ranks[1].http == ""


def test_operators_see_the_whole_and_steer_it(group: RankGroup, shown: str) -> None:
    rest = group.leader.rest
    model = rest("GET", f"/v1/models/{shown}").json()
    assert (model["parameters"], model["elements"]) == (4, 9000 * 16 + 50_000 + 300 * 64 + 10)
    listed = rest("GET", f"/v1/models/{shown}/parameters").json()["parameters"]
    assert {entry["name"]: entry["shape"] for entry in listed} == {
        "weight": [50_000],
        "narrow": [300, 64],
        "bias": [10],
        "table.weight": [9000, 16],
    }
    patched = rest("PATCH", f"/v1/models/{shown}/param-groups/0", json={"lr": 0.5})
    assert patched.status_code == 200, patched.text
    session, net = group.leader.connect(shown, "w1"), Net()
    with pytest.warns(RuntimeWarning, match="other values of lr"):
        optimizer = attached(session, net, Training())
    gradients(net, 0, Training())
    optimizer.step()
    assert optimizer.last_receipt.groups[0]["lr"] == 0.5
    session.close()
    taken = rest("POST", f"/v1/models/{shown}/snapshots")
    assert taken.status_code == 201, taken.text
    snapshots = [
        sorted(path.name for path in (group.data / f"rank-{rank}" / "models" / shown / "snapshots").iterdir())
        for rank in range(WORLD)
    ]
    assert all(any(name.startswith("t1-v7-") for name in found) for found in snapshots)
    assert rest("DELETE", f"/v1/models/{shown}").status_code == 204
    folders = [group.data / f"rank-{rank}" / "models" / shown for rank in range(WORLD)]
    assert not any(folder.exists() for folder in folders)


@pytest.mark.parametrize("name", ["adadelta", "rows"])
def test_a_state_dict_is_that_of_one_server(alone: RunningServer, group: RankGroup, name: str) -> None:
    training = TRAININGS[name]
    found = [state_of(server, f"state-{name}", training) for server in (group.leader, alone)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def state_of(server: RunningServer, model: str, training: Training) -> Any:
    session, net = server.connect(model, **dict(training.options)), Net(training.sparse)
    optimizer = attached(session, net, training)
    for step in range(3):
        gradients(net, step, training)
        optimizer.step()
    state = optimizer.state_dict()
    session.close()
    return state


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_creation_that_fails_in_one_rank_leaves_nothing_in_the_others(tmp_path: Path, rank: int) -> None:
    values = {"w": np.ones(30_000, np.float32)}
    with running_ranks(tmp_path, WORLD) as ranks:
        models = tmp_path / f"rank-{rank}" / "models"
        models.write_text("in the way of the folder")
        with ranks.leader.connect("m") as session, pytest.raises(StorageFailed):
            session.create(values)
        models.unlink()
        with ranks.leader.connect("m") as session:
            session.create(values)
            assert session.push(values).version == 1
