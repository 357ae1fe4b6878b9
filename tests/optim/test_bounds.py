"""No kernel reads or writes outside of its operands, and the checks that say so can fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.numbers.guards import Guards

ROOT = Path(__file__).parents[2]


def run(name, *options):
    """pytest in a process of its own, in which every kernel is compiled with checks."""
    plugins = ("-p", "no:cacheprovider", "-p", "tests.support.numbers.checked_kernels")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *plugins, *options, f"tests/optim/{name}.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(600)  # kernels are compiled the first time: 25 s of a core
@pytest.mark.parametrize(
    "name, options",
    [
        ("bounds_cases", ["-m", "not soak"]),
        ("bounds_mistakes", []),
        pytest.param("bounds_cases", ["--timeout", "600"], marks=pytest.mark.soak),
    ],
    ids=["sample", "mistakes", "all"],
)
def test_in_the_build_that_looks(name, options):
    """All of them take at most 10 minutes."""
    done = run(name, *options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_guards_notice_a_byte():
    for at in (-1, 0):
        guards = Guards()
        tensor = guards.around(torch.rand(5))
        guards.check()
        memory, begin, end = guards._kept[0]
        assert tensor.data_ptr() == memory.data_ptr() + begin
        memory[end if at == 0 else begin - 1] += 1
        with pytest.raises(AssertionError, match="written to"):
            guards.check()
