"""What all tests share: one server for those that only need their own model, and a name for that model."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported, for this process and those that it starts: on cores that other tests use, too, threads that
# spin while they wait for each other make steps of microseconds take a scheduler's turn each.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from _pytest.assertion import rewrite
from hypothesis.internal.conjecture import providers

from pushstep.client import Session
from tests.support.servers.harness import RunningServer, running_server

_numbers = itertools.count()
# Files that take the longest, often with few tests: the last to begin would keep one process busy when the others are done.
LONG_FIRST = (
    "system/test_kills.py",
    "system/test_random_kills.py",
    "system/test_crash_points.py",
    "system/test_faulty_disk.py",
    "optim/test_cuda.py",
    "optim/test_process.py",
    "system/test_remote_snapshots.py",
    "docs/test_blocks.py",
    "page/test_page.py",
    "system/test_starvation.py",
    "client/test_attach_undone.py",
    "client/test_session_life.py",
    "optim/test_bounds.py",
    "server/test_unread_answers.py",
    "system/test_torch_settings.py",
    "system/test_shared_memory_kills.py",
    "system/test_device_memory_kills.py",
    "server/test_loop.py",
    "server/test_mutations.py",
    "server/test_kept_bytes.py",
    "client/test_demo_end_to_end.py",
    "system/test_exports.py",
    "server/test_openapi.py",
    "server/test_openapi_roles.py",
    "client/test_trainings.py",
    "examples/test_scripts.py",
    "simulation/test_simulation.py",
    "system/test_end_to_end.py",
    "system/test_rank_crash_points.py",
    "system/test_rank_deaths.py",
    "system/test_rank_exports.py",
    "system/test_shards.py",
    "simulation/test_stories.py",
    "optim/test_parity.py",
    "server/test_connections.py",
    "client/test_keras_fit.py",
    "system/test_deaths.py",
    "system/test_long_messages.py",
    "system/test_small_disk.py",
    "system/test_traces.py",
    "system/test_storms.py",
    "test_promises.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Before any test."""
    _heed_ctrl_c()
    _draw_no_constants()
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        _compile_once(config)


def _compile_once(config: pytest.Config) -> None:
    """Write what pytest makes of the tests' files, with their assertions taken apart, before the processes that collect them begin.

    Each of these would make it for itself, which is 5 s of CPU.
    """
    if sys.dont_write_bytecode:
        return
    state = config.stash[rewrite.assertstate_key]
    here = Path(__file__).parent
    for path in (*here.rglob("test_*.py"), *here.rglob("conftest.py")):
        folder = rewrite.get_cache_dir(path)
        written = folder / (path.stem + rewrite.PYC_TAIL)
        if rewrite.try_makedirs(folder) and rewrite._read_pyc(path, written, state.trace) is None:
            told, code = rewrite._rewrite_test(path, config)
            rewrite._write_pyc(state, code, told, written)


def _heed_ctrl_c() -> None:
    """Whoever starts the tests in the background may have SIGINT ignored; what the tests start would ignore it, too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _draw_no_constants() -> None:
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the long files begin first; the others, and the tests of each, stay in their order."""
    folder = Path(__file__).parent
    order = {folder / name: number for number, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish() -> None:
    """What is imported by now stays: a collection need not look through it again."""
    gc.collect()
    gc.freeze()


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
