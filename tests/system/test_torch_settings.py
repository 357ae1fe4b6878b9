"""Nothing depends on torch's global settings: the surface of optim and client gives the same bits under each."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.numbers.torch_settings import BY_TORCH, SETTINGS
from tests.support.processes import surface
from tests.support.processes.forked import workers
from tests.support.processes.surface import PARTS
from tests.support.servers import harness
from tests.support.servers.harness import RunningServer, running_server

ROOT = Path(__file__).parents[2]
PACKAGES = ("optim", "client", "server", "proto")
Results = dict[tuple[str, str], str]
# with as many threads as a program has that sets nothing
RUN = f"""
import os, runpy, torch, warnings
torch.set_num_threads(len(os.sched_getaffinity(0)))
warnings.simplefilter("ignore")
runpy.run_module({surface.__name__!r}, run_name="__main__")
"""


def results(server: RunningServer, prefix: str, *arguments: str) -> Results:
    """What came of each part of the surface under each setting, in a process of its own: it may be left in any state."""
    done = workers().call(RUN, server.grpc, server.http, prefix, *arguments, timeout_s=600.0)
    found = {(setting, part): came for setting, part, came in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, f"after {list(found)[-1:]}: {done.stderr[-2000:]}"
    return found


@pytest.fixture(scope="module")
def under_each(server: RunningServer) -> Results:
    """The whole table, from one process."""
    return results(server, "settings")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_surface_gives_the_same_bits(setting: str, under_each: Results) -> None:
    for part in PARTS:
        came, expected = under_each[setting, part], under_each["none", part]
        assert " " not in came, f"{part}: {came}"
        if (setting, part) not in BY_TORCH:
            assert came == expected, part


def test_a_server_s_process_may_have_other_settings(
    under_each: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (sys.executable, ROOT / "tests" / "support" / "servers" / "changed_server.py")
    monkeypatch.setitem(harness.COMMANDS, harness.DEVICE, command)
    with running_server(tmp_path / "data", "--max-models", "100") as server:
        found = results(server, "changed", "none")
    for part in PARTS:
        assert found["none", part] == under_each["none", part], part


# torch's functions that make tensors: what is not said, a global setting says.
MAKERS = frozenset(
    (
        "arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace",
        "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor",
        "sparse_compressed_tensor", "sparse_coo_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
    )
)  # fmt: skip
# These take the default dtype or device and cannot be told another.
NEVER = frozenset(("Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "LongTensor"))


def unsaid(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) of every call that leaves a dtype or device to torch's defaults, also through `partial`."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called, given = node.func, {keyword.arg for keyword in node.keywords}
        if isinstance(called, ast.Name) and called.id == "partial" and node.args:
            called = node.args[0]
        if (
            isinstance(called, ast.Attribute)
            and isinstance(called.value, ast.Name)
            and called.value.id == "torch"
        ):
            missing = {"dtype", "device"} - given if called.attr in MAKERS else set()
            if called.attr == "frombuffer" and "dtype" not in given:  # it takes no device
                missing = {"dtype"}
            if missing or called.attr in NEVER:
                yield node.lineno, f"torch.{called.attr} without {', '.join(sorted(missing)) or 'either'}"


def test_every_tensor_that_is_made_says_its_dtype_and_device() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if "_pb2" not in path.name
        for line, what in unsaid(path.read_text())
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.zeros(3)", 1),
        ("torch.zeros(3, dtype=d)", 1),
        ("torch.zeros(3, dtype=d, device=e)", 0),
        ("partial(torch.empty, dtype=torch.uint8)", 1),
        ("torch.as_tensor(values)", 1),
        ("torch.Tensor([1.0])", 1),
        ("torch.zeros_like(x)\ntorch.from_numpy(y)\nx.new_zeros(3)", 0),
    ],
)
def test_the_search_for_them_finds_them(source: str, found: int) -> None:
    assert len(list(unsaid(source))) == found
