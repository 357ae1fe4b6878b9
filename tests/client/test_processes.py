"""Other processes beside a session: data loaders' workers, Hogwild's trainers, copies that must not be made."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pushstep.client import RemoteOptimizer, Session
from pushstep.proto.errors import ForkedSession
from tests.support.processes.trainer import held, train
from tests.support.servers.harness import RunningServer
from tests.support.trainings.network import Network, loss_of
from tests.support.trainings.optimizers import adagrad, backward
from tests.support.trainings.twins import Twins


class NosyItems(Dataset[torch.Tensor]):
    """Items whose process tries the parent's session, which it inherited, in every way."""

    def __init__(self, remote: RemoteOptimizer, session: Session) -> None:
        self.remote = remote
        self.session = session

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> torch.Tensor:
        refused = 0
        for touch in (self.session.pull, self.session.member, self.remote.step, self.remote.state_dict):
            try:
                touch()
            except ForkedSession:
                refused += 1
        self.session.close()  # the parent's goes on
        return torch.tensor(refused)


@pytest.mark.parametrize(("method", "epochs"), [("fork", 3), ("spawn", 1)])
def test_a_data_loader_with_two_workers(
    server: RunningServer, model_name: str, method: str, epochs: int
) -> None:
    """Children are made and end while pushes, heartbeats and their threads are under way."""
    twins = Twins(server.connect(model_name), Network(), adagrad)
    twins.step(0)
    steps, data = 0, TensorDataset(torch.arange(16))
    for _ in range(epochs):
        seen: list[int] = []
        for (batch,) in DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context=method):
            steps += 1
            twins.step(steps)
            seen += batch.tolist()
        assert seen == list(range(16))
    assert twins.remote.last_receipt is not None
    assert twins.remote.last_receipt.version == steps + 1 == 4 * epochs + 1
    assert server.rest("GET", f"/v1/models/{model_name}").json()["workers_live"] == 1


def test_a_forked_worker_that_touches_the_session_is_told(server: RunningServer, model_name: str) -> None:
    session = server.connect(model_name)
    twins = Twins(session, Network(), adagrad)
    loader = DataLoader(NosyItems(twins.remote, session), batch_size=4, num_workers=2)
    for number, batch in enumerate(loader):
        assert batch.tolist() == [4, 4, 4, 4]
        twins.step(number)
    assert server.rest("GET", f"/v1/models/{model_name}").json()["workers_live"] == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_trainers_forked_from_one_with_a_session(server: RunningServer, model_name: str, method: str) -> None:
    model = Network()
    session = server.connect(model_name)
    remote = session.attach(adagrad(model), module=model)
    backward(model, [remote], 0)
    remote.step()
    held.append(remote)
    try:
        context: Any = multiprocessing.get_context(method)
        results = context.Queue()
        arguments = [(server.grpc, model_name, number, model, results) for number in range(2)]
        with warnings.catch_warnings():
            # Python's own word on forking a process with threads, which gRPC's and torch's are
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            children = [context.Process(target=train, args=each) for each in arguments]
            for child in children:
                child.start()
        for seed in range(1, 5):
            backward(model, [remote], seed)
            remote.step()
        found = sorted(results.get(timeout=60) for _ in children)
        for child in children:
            child.join(60)
    finally:
        held.clear()
    assert found == [(0, 5), (1, 5)]
    assert [child.exitcode for child in children] == [0, 0]
    backward(model, [remote], 5)
    remote.step()
    assert remote.last_receipt is not None
    assert remote.last_receipt.version == 16, "every push of every process, once"


def test_a_remote_optimizer_is_not_copied(server: RunningServer, model_name: str) -> None:
    model = Network()
    remote = server.connect(model_name).attach(adagrad(model), module=model)
    for act in (copy.copy, copy.deepcopy, pickle.dumps, lambda o: pickle.loads(pickle.dumps([o]))):
        with pytest.raises(TypeError, match="state_dict"):
            act(remote)
    loss_of(model, 0).backward()
    remote.step()


def test_a_session_is_not_copied(server: RunningServer, model_name: str) -> None:
    """Nor is what holds one: a module, a trainer."""
    session = server.connect(model_name)
    for act in (copy.copy, copy.deepcopy, pickle.dumps, lambda s: copy.deepcopy({"session": s})):
        with pytest.raises(TypeError, match=r"live connection.*connect\(\) again"):
            act(session)
    twins = Twins(session, Network(), adagrad)
    twins.step(0)
