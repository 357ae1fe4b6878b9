"""Runs the `cuda_*_cases` in Triton's interpreter, and on a device where there is one.

The interpreter is chosen by an environment variable that must be set before triton is imported, so the cases run in
a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = sorted(path.name for path in Path(__file__).parent.glob("cuda_*_cases.py"))


def run_cases(*arguments, **environment):
    files = [f"tests/optim/{name}" for name in CASES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.timeout(400)
def test_in_the_interpreter():
    run_cases("-m", "not gpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_on_a_device():
    run_cases(TRITON_INTERPRET="0")


def test_triton_is_imported_at_the_first_cuda_step():
    # torch's own optimizers import triton when they are made; this package must not before it needs it.
    code = (
        "import sys, torch, pushstep.optim as o\n"
        "early = 'triton' in sys.modules\n"
        "p = torch.zeros(3, requires_grad=True); p.grad = torch.ones(3)\n"
        "o.Adagrad([p]).step()\n"
        "sys.exit(early or 'pushstep.optim.cuda.kernels' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
