"""A worker on the server's own host: the same bits as over frames, through memory that both map."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import RunningServer
from twin import Make, Network, Twins, adadelta, adagrad, both
from wire import GROUPS, PARAMETERS

from pushstep.client import Outcome, Session


def files_of(pid: int) -> list[str]:
    """What the descriptors of a process are."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(entry))
        except FileNotFoundError:
            continue
    return found


def regions_of(pid: int) -> int:
    """How many pieces of shared memory a process holds open or mapped."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sum("memfd:pushstep" in line for line in [*files_of(pid), *maps])


def shares(session: Session) -> bool:
    """Whether a session's last step went through shared memory."""
    return session.memory.region is not None and session.memory.region.is_alive()


@pytest.mark.parametrize("door", ["unix", "loopback"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("make", [adadelta, adagrad, both])
def test_every_step_is_the_local_optimizers(
    server: RunningServer, model_name: str, make: Make, sparse: bool, door: str
) -> None:
    address = server.grpc if door == "loopback" else f"unix:{server.unix}"
    with server.connect(model_name, address=address, shared_memory=True) as session:
        twins = Twins(session, Network(sparse=sparse), make)
        twins.step(*range(8))
        twins.check_state()
        assert shares(session)
        lying = [p for p in twins.model.parameters() if p.grad is not None and not p.grad.is_sparse]
        assert lying
        assert all(session.memory.region is not None and session.memory.region.holds(p.grad) for p in lying)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [adadelta, adagrad])
def test_in_other_dtypes(server: RunningServer, model_name: str, make: Make, dtype: torch.dtype) -> None:
    with server.connect(model_name, shared_memory=True) as session:
        twins = Twins(session, Network(dtype=dtype), make)
        twins.step(*range(5))
        twins.check_state()
        assert shares(session)


def test_arrays(server: RunningServer, model_name: str) -> None:
    draw = np.random.default_rng(0)
    shared = server.connect(model_name, shared_memory=True)
    frames = server.connect(f"{model_name}-frames")
    for session in (shared, frames):
        session.create(PARAMETERS, GROUPS)
    for number in range(6):
        grads: dict[str, Any] = {
            name: draw.normal(size=value.shape).astype(np.float32) for name, value in PARAMETERS.items()
        }
        if number % 2:
            del grads["weight"]
            grads["table"] = (np.array([3, 1, 3]), draw.normal(size=(3, 3)).astype(np.float32))
        (receipt, got), (_, expected) = shared.exchange(grads), frames.exchange(grads)
        assert receipt.outcome is Outcome.APPLIED
        assert {name: a.tobytes() for name, a in got.items()} == {n: a.tobytes() for n, a in expected.items()}
    assert shares(shared)
    assert not shares(frames)
