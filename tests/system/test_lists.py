"""Workers with many tensors and many tables, over frames and shared memory, against the local optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pushstep.client import Session
from pushstep.optim import Adadelta, Adagrad
from pushstep.proto.errors import RowOutOfRange, TooLong, UnknownParameter, WrongDtype
from tests.support.servers.harness import RunningServer

MEMORY = pytest.mark.parametrize("shared_memory", [True, False], ids=["shared", "frames"])


def _parameters() -> list[nn.Parameter]:
    """Of which some are small, some lend their place to backward, some are of another dtype, and one is empty."""
    torch.manual_seed(1)
    small = [nn.Parameter(torch.randn(k % 5 + 1, 3)) for k in range(90)]
    large = [nn.Parameter(torch.randn(20_000)) for _ in range(2)]
    half = [nn.Parameter(torch.randn(4).to(torch.bfloat16)) for _ in range(12)]
    return [*small[:50], *large, *half, nn.Parameter(torch.empty(0, 2)), *small[50:]]


@MEMORY
@pytest.mark.parametrize("make", [Adadelta, Adagrad])
def test_many_tensors(server: RunningServer, model_name: str, make: Any, shared_memory: bool) -> None:
    there, here = _parameters(), _parameters()
    with server.connect(model_name, shared_memory=shared_memory) as session:
        remote, local = session.attach(make(there)), make(here)
        for step in range(8):
            for optimizer, parameters in ((remote, there), (local, here)):
                optimizer.zero_grad()
                draw = torch.Generator().manual_seed(step)
                gradients = [torch.randn(p.shape, generator=draw).to(p.dtype) for p in parameters]
                if step % 2:  # as autograd leaves them, with its hooks
                    torch.autograd.backward(parameters, gradients)
                else:
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.grad = gradient
                if step == 3:
                    parameters[7].grad = parameters[60].grad = None
                elif step == 5:  # laid out in another way
                    parameters[4].grad = gradients[4].t().contiguous().t()
                elif step == 6:
                    parameters[8].data = parameters[8].data.clone()
                optimizer.step()
            assert all(map(torch.equal, there, here)), step
        held = [p.grad for p in there[50:52]]
        region = session.memory.region
        assert (region is not None) == shared_memory
        if region is not None:
            assert all(grad is not None and region.holds(grad) for grad in held)


@MEMORY
def test_many_tables(server: RunningServer, model_name: str, shared_memory: bool) -> None:
    shapes = [(50, 3), (4000, 8), (3, 2), (700, 1), (60, 5)]
    there, here = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    with (
        server.connect(model_name, "w0", shared_memory=shared_memory) as session,
        server.connect(model_name, "w1") as other,
    ):
        remote = session.attach(torch.optim.Adagrad(there), names=[f"t{k}" for k in range(5)])
        local = Adagrad(here)
        other.pull()
        for step in range(8):
            for optimizer, parameters in ((remote, there), (local, here)):
                draw = torch.Generator().manual_seed(step)
                for k, parameter in enumerate(parameters):
                    ids = torch.randint(
                        0, parameter.shape[0], (1, [200, 1, 0, 33, 2][(k + step) % 5]), generator=draw
                    )
                    rows = torch.randn(ids.shape[1], parameter.shape[1], generator=draw)
                    parameter.grad = torch.sparse_coo_tensor(
                        ids, rows, parameter.shape, check_invariants=False
                    )
                optimizer.step()
            if step % 3 == 1:  # a reader behind by several versions
                pulled = other.pull()
                assert all(np.array_equal(pulled[f"t{k}"], p.detach().numpy()) for k, p in enumerate(here))
            assert all(map(torch.equal, there, here)), step


@pytest.fixture
def tables(server: RunningServer, model_name: str) -> Session:
    session = server.connect(model_name)
    draw = np.random.default_rng(0)
    values = {f"t{k}": draw.normal(size=(40 + k, k + 1)).astype(np.float32) for k in range(4)}
    session.create(values, [{"rule": "adagrad", "params": list(values)}])
    return session


def test_rows_of_several_tables_at_one_version(tables: Session) -> None:
    values = tables.pull()
    wanted = {
        "t2": np.array([3, 1, 3, 41]),
        "t0": torch.tensor([0]),
        "t3": [5, 6, 7],
        "t1": np.array([], np.int64),
    }
    rows = tables.pull_rows(wanted)
    assert list(rows) == list(wanted)
    assert all(np.array_equal(rows[name], values[name][np.asarray(ids)]) for name, ids in wanted.items())
    assert np.array_equal(tables.pull_rows("t2", [3, 1, 3]), values["t2"][[3, 1, 3]])
    for rows_of in rows.values():
        rows_of[:] = 0  # the caller's own
    assert np.array_equal(tables.pull_rows("t3", [5, 6, 7]), values["t3"][[5, 6, 7]])


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ({"t0": [1], "t1": [41]}, RowOutOfRange),
        ({"t0": [1], "t1": [-1]}, RowOutOfRange),
        ({"t0": [1], "t1": [0.5]}, WrongDtype),
        ({"t0": [1], "nothing": [1]}, UnknownParameter),
    ],
)
def test_rows_that_there_are_not(tables: Session, wanted: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        tables.pull_rows(wanted)


def test_ids_of_several_tables_that_do_not_fit_into_a_message(server: RunningServer, model_name: str) -> None:
    with server.connect(model_name) as session:
        session.create({"a": np.zeros((600_000, 1), np.float32), "b": np.zeros((4, 1), np.float32)})
        with pytest.raises(TooLong):
            session.pull_rows({"a": np.arange(600_000), "b": [0]})
        assert session.pull_rows("a", np.arange(600_000)).shape == (600_000, 1)
