"""What all tests share: one server for those that only need their own model, and a name for that model."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported, for this process and those that it starts: on cores that other tests use, too, threads that
# spin while they wait for each other make steps of microseconds take a scheduler's turn each.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from hypothesis.internal.conjecture import providers

from pushstep.client import Session
from tests.support.servers.harness import RunningServer, running_server

_numbers = itertools.count()


def pytest_configure() -> None:
    """Hypothesis also draws the constants of the project's modules that are loaded already.

    Which ones are depends on the test files that ran before in the same process, so the same test would
    draw other examples in another run. None are drawn.
    """
    if not hasattr(providers, "_get_local_constants"):
        raise RuntimeError(
            "this version of hypothesis takes constants from modules in another way: look there"
        )
    none = providers.Constants()
    providers._get_local_constants = lambda: none


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for the whole run. Tests that stop, restart or reconfigure a server start their own."""
    with running_server(tmp_path_factory.mktemp("server") / "data", "--max-models", "10000") as running:
        yield running


@pytest.fixture
def model_name(request: pytest.FixtureRequest) -> str:
    """A model name of the test's own."""
    return f"m{next(_numbers)}"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder of the test's own."""
    return tmp_path / "data"


@pytest.fixture
def session(server: RunningServer, model_name: str) -> Iterator[Session]:
    """A session of the test's own model, which is not there yet."""
    with server.connect(model_name) as joined:
        yield joined


@pytest.fixture
def quiet_sparse_tensors() -> Iterator[None]:
    """torch's sparse Adagrad warns until somebody decides; the gradients here are autograd's own."""
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        yield
