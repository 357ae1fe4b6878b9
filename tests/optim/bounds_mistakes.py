"""That the checked build finds what it is for: operands that are too short, each with the check before it left out.

`test_bounds` runs this file; without the checks these kernels would do what their mistakes say.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pushstep.optim import RULES
from pushstep.optim.cpu import (
    copies as cpu_copies,
)
from pushstep.optim.cpu import (
    dense as cpu,
)
from pushstep.optim.cpu import (
    norms as cpu_norms,
)
from pushstep.optim.cpu import (
    pointer_table as table,
)
from pushstep.optim.cpu import (
    rows as cpu_rows,
)
from pushstep.optim.kernels import dense as kernels
from pushstep.optim.ops import quantise, select, sums
from pushstep.optim.ops import streaming as arriving
from pushstep.optim.ops.quantise import code_bytes
from pushstep.optim.step.step import RowStep, Step
from tests.support.numbers import checked_kernels

N = 300


@pytest.fixture(autouse=True)
def _nobody_looks(monkeypatch):
    """Leave out what looks before, and have one thread do it: its error is what is raised."""
    for module in (arriving, cpu_copies, quantise, select, cpu_rows):
        for name in ("check_run", "check_rows", "check_bounds"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *_, **__: None)
    monkeypatch.setattr("pushstep.optim.step.operands.check_run", lambda *_, **__: None)
    checked_kernels.operands.clear()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def dense(**wrong):
    """A step whose table says something else than its tensors do."""
    tensors = [torch.rand(N) for _ in range(6)]
    step = Step(
        rule="adadelta", params=tensors[:1], grads=tensors[1:2], states=[[t] for t in tensors[2:4]], lr=0.1, eps=1e-6,
        rho=0.9, ema=tensors[4:5], copy_out=tensors[5:],
    )  # fmt: skip
    found = table.table_of(step)
    changed = dataclasses.replace(
        found, **{name: change(getattr(found, name)) for name, change in wrong.items()}
    )
    launch = cpu._launch(step, changed, torch.ones(2, 2, dtype=torch.float64).numpy())

    def run(_=tensors):  # which live as long
        launch()

    return run


def moved(column, nbytes):
    """A table in which one operand lies elsewhere."""

    def change(addresses):
        changed = addresses.copy()
        changed[:, column] += nbytes
        return changed

    return change


def by_rows(**wrong):
    """A step over rows of which something is too short."""
    given = {
        "param": torch.rand(20, 5), "ids": torch.tensor([3, 19, 3]), "rows": torch.rand(3, 5), "unique": False,
        "states": [torch.rand(20, 5)], **wrong,
    }  # fmt: skip
    return cpu_rows.plan_rows(RowStep(rule="adagrad", lr=0.1, eps=1e-6, **given))


def coded(**wrong):
    """Codes that are made of too little, or of which too few fit."""
    given = {
        "source": torch.rand(N), "residual": torch.rand(N), "rest": torch.rand(N), "length": N, "block": 256,
        "codes": torch.zeros(code_bytes(N, 256), dtype=torch.uint8), **wrong,
    }  # fmt: skip
    return lambda: quantise.quantise(**given)


CODES = torch.zeros(code_bytes(N, 256), dtype=torch.uint8)
MISTAKES = {
    "a tensor longer than it is": lambda: dense(starts=lambda starts: starts + starts // N),
    "two tensors where one is": lambda: dense(starts=lambda starts: np.array([0, N, 2 * N])),
    **{
        f"column {column} begins {name}": lambda column=column, nbytes=nbytes: dense(
            addresses=moved(column, nbytes)
        )
        for column in range(kernels.STEP_COLUMN)
        for name, nbytes in (("early", -4), ("late", 4), ("on no border", 1))
    },
    "an id beyond the table": lambda: by_rows(ids=torch.tensor([3, 20, 3])),
    "an id before the table": lambda: by_rows(ids=torch.tensor([-1, 4, 3]), unique=True),
    "rows that are too few": lambda: by_rows(rows=torch.rand(2, 5)),
    "rows that are narrow": lambda: by_rows(rows=torch.rand(3, 4)),
    "a state of fewer rows": lambda: by_rows(states=[torch.rand(10, 1)]),
    "a short gradient to quantise": coded(residual=torch.rand(N - 1)),
    "a short rest": coded(rest=torch.rand(N - 1)),
    "few codes": coded(codes=torch.zeros(code_bytes(N, 256) - 1, dtype=torch.uint8)),
    "few codes to read": lambda: quantise.dequantise(CODES[1:].clone(), torch.zeros(N), [N], block=256),
    "few values": lambda: quantise.dequantise(CODES, torch.zeros(N - 1), [N], block=256),
    "few of which to select": lambda: select.select(
        torch.rand(N), torch.rand(N - 1), torch.zeros(N), 5, wire=torch.float32
    ),
    "no room for what is left": lambda: select.select(torch.rand(N), None, torch.zeros(N - 1), 5, wire=torch.float32),
    "a short term": lambda: sums.weighted_sum(
        torch.zeros(N), [torch.rand(N), torch.rand(N - 1)], [1.0, 1.0], 2.0, [N]
    ),
    "a short sum": lambda: sums.weighted_sum(torch.zeros(N - 1), [torch.rand(N)], [1.0], 2.0, [N]),
    "a body that is short": lambda: arriving.floats(torch.rand(N - 1), arriving.Blocks([N])).advance(4 * N),
    "a copy of more than there is": lambda: cpu_copies.copy_wider(
        torch.zeros(N), torch.zeros(N - 1, dtype=torch.bfloat16)
    ),
    "a copy of few lines": lambda: cpu_copies.copy_bytes(torch.zeros(2 * N), torch.zeros(N)),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_found(mistake):
    with pytest.raises(IndexError):
        mistake()()


def test_arrays_are_looked_at_too():
    values = torch.rand(2 * N)
    kernel = cpu_norms.compiled(cpu_norms.block_sums, cpu_norms.SIGNATURE, 0)
    numbers = torch.tensor([[values.data_ptr(), 2 * N], [2 * N, 0], [0, 1]]).numpy()
    plan = torch.tensor([1, 1, 2, *[0] * 5, 0, 2, *[0] * 6]).numpy()  # two blocks, of which there is one
    with pytest.raises(IndexError):
        kernel(
            numbers[0, :1], numbers[1, :1], numbers[2], torch.zeros(1, dtype=torch.float64).numpy(), plan, 0
        )


def test_without_a_mistake_nothing_is_found():
    dense()()
    by_rows()()
    coded()()
    rule = RULES["adagrad"]
    rule.step_dense(torch.rand(N), torch.rand(N), [torch.rand(N)], rule.defaults, step=1)
