"""The tests of a whole service again, with its models on another device: the same functions, the same expectations.

On a CUDA device, where there is one (`pytest -m gpu`): every one of them. On the model of one (see streams.py),
everywhere: those named here, which between them take every way to the device and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType

import pytest
import torch

from tests.support.servers import harness
from tests.support.servers.harness import RunningServer, running_server
from tests.system import (
    test_deaths,
    test_end_to_end,
    test_exports,
    test_many_workers,
    test_rounds,
    test_shared_memory,
    test_shared_memory_kills,
    test_snapshots_end_to_end,
)
from tests.system.test_deaths import short  # noqa: F401 - fixtures of what runs here
from tests.system.test_shared_memory_kills import tight, victims  # noqa: F401
from tests.system.test_snapshots_end_to_end import socket  # noqa: F401

MODULES = (
    test_end_to_end,
    test_exports,
    test_many_workers,
    test_rounds,
    test_shared_memory,
    test_shared_memory_kills,
    test_snapshots_end_to_end,
    test_deaths,
)
MODELLED = {
    "end_to_end": ("test_the_same_with_arrays", "test_two_optimizers_make_one_model"),
    "shared_memory": (
        "test_arrays",
        "test_partial_pushes_and_a_group_that_is_added",
        "test_a_restore_and_a_new_epoch_open_another_region",
    ),
}
pytestmark = pytest.mark.usefixtures("quiet_sparse_tensors")
_modelled: set[Callable[..., object]] = set()
for module in MODULES:
    subject = module.__name__.rpartition(".")[2].removeprefix("test_")
    for name, test in list(vars(module).items()):
        if name.startswith("test_") and isinstance(test, FunctionType):
            globals()[f"test_{subject}__{name.removeprefix('test_')}"] = test
            if name in MODELLED.get(subject, ()):
                _modelled.add(test)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    devices = [pytest.param("cuda", marks=pytest.mark.gpu)]
    if metafunc.function in _modelled:
        devices.append(pytest.param("modelled"))
    metafunc.parametrize("device", devices, indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where the servers of a test hold their models."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "DEVICE", request.param)
        yield


@pytest.fixture(scope="module")
def server(device: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """What the session's one is elsewhere."""
    with running_server(tmp_path_factory.mktemp("server") / "data", "--max-models", "10000") as running:
        yield running
