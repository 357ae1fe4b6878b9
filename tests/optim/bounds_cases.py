"""Every kernel over operands between guards. `test_bounds` runs this file in the build that looks before it reads.

Compiling takes nearly all of its time, so all but a sample of each table is marked as a soak.
"""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from pushstep.optim import RULES, Adadelta, Adagrad
from pushstep.optim.cpu import dense as cpu
from pushstep.optim.ops import norms, rows
from pushstep.optim.ops import streaming as arriving
from pushstep.optim.ops.copies import TORCH_ELEMENTS, copy
from pushstep.optim.ops.digest import LEAST_BYTES, xxh3_64
from pushstep.optim.ops.quantise import code_bytes, dequantise, dequantise_rows, quantise
from pushstep.optim.ops.select import select
from pushstep.optim.ops.sums import weighted_sum
from pushstep.optim.ops.varints import Varints
from pushstep.optim.step.step import RowStep, Step
from tests.support.numbers import checked_kernels
from tests.support.numbers.guards import Guards
from tests.support.numbers.parity_table import ROWS, Row

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
# Around the borders of vectors, lines, blocks of codes, and blocks of norms.
SIZES = (0, 1, 7, 64, 255, 256, 257, 4095, 4096, 4097, 9000)


def sampled(table, *sample):
    """A table of which all but the sample is left to `make soak`."""
    return [
        case if case in sample else pytest.param(*_arguments(case), marks=pytest.mark.soak) for case in table
    ]


def _arguments(case):
    return case if type(case) is tuple else (case,)


@pytest.fixture
def guards():
    checked_kernels.operands.clear()
    made = Guards()
    yield made
    made.check()


@pytest.fixture(autouse=True)
def _short_slices(monkeypatch):
    """Several slices and threads, also of few elements."""
    for module in (cpu, __import__("pushstep.optim.cpu.rows", fromlist=["*"])):
        monkeypatch.setattr(module, "SLICE_ELEMENTS", 1 << 10)
        monkeypatch.setattr(module, "INLINE_ELEMENTS", 1 << 11)


ROW_SAMPLE = (
    Row("torch", "Adadelta", "maximize, decay", layout="transposed grad"), Row("torch", "Adagrad", "lr_decay", BF16),
    Row("keras", "Adadelta", "accumulation, all else"), Row("mlx", "AdaDelta", "plain", F16, "gaps"),
)  # fmt: skip
KERNEL_ROWS = [row for row in ROWS if row.backend == "kernels"]


@pytest.mark.parametrize("row", sampled(KERNEL_ROWS, *ROW_SAMPLE), ids=str)
def test_the_parity_table(row, guards):
    torch.manual_seed(0)
    optimizer, params = row.ours(row.values())
    for param in params:
        param.data = guards.around(param.data)
    for _ in range(2):
        for param, grad in zip(params, row.grads(), strict=True):
            param.grad = guards.around(grad)
        optimizer.step()
        for state in optimizer.state.values():
            for name, value in state.items():
                state[name] = guards.around(value)
    optimizer.step()


OPTIONS = {
    "all": {
        "factor": 0.5, "clip_value": 0.5, "weight_decay": 0.1, "grad_scale": 8.0, "maximize": True, "ema": F32,
        "copy_out": BF16, "steps": True,
    },
    "decoupled, zeroed": {"weight_decay": 0.1, "decoupled": True, "zero_grad": True, "ema": F64, "copy_out": F16},
    "Keras's order": {"multiply_first": True, "eps_inside_root": True, "ema": BF16, "copy_out": F32},
}  # fmt: skip


STEPS = [
    ("adadelta", (F32, F32), "all"), ("adadelta", (F64, F64), "decoupled, zeroed"),
    ("adadelta", (BF16, F32), "Keras's order"), ("adagrad", (F16, F16), "all"),
    ("adagrad", (F32, F32), "decoupled, zeroed"), ("adagrad", (F32, F32), "Keras's order"),
]  # fmt: skip


@pytest.mark.parametrize("name, dtypes, options", sampled(STEPS, STEPS[0], STEPS[-1]), ids=str)
def test_dense_steps(name, dtypes, options, guards):
    param_dtype, state_dtype = dtypes
    options = dict(OPTIONS[options])

    def some(dtype):
        return [guards.around(torch.rand(n).to(dtype)) for n in SIZES]

    for extra in ("ema", "copy_out"):
        if extra in options:
            options[extra] = some(options[extra])
    if options.get("steps"):
        options["steps"] = [guards.around(torch.tensor(1.0)) for _ in SIZES]
    cpu.step(
        Step(
            rule=name, params=some(param_dtype), grads=some(param_dtype),
            states=[some(state_dtype) for _ in RULES[name].state_names], lr=0.1, eps=1e-6, rho=0.9, **options,
        )
    )  # fmt: skip


IDS = {
    "the ends": [0, 39],
    "all": list(range(40)),
    "twice": [39, 0, 39, 7, 0, 39],
    "one, often": [39] * 50,
    "none": [],
}


ROW_STEPS = [("adadelta", BF16), ("adadelta", F32), ("adagrad", F32)]


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("width", [1, 3, 33], ids=str)
@pytest.mark.parametrize("row_wise", [False, True], ids=["elements", "row-wise"])
@pytest.mark.parametrize("name, dtype", sampled(ROW_STEPS, ROW_STEPS[0]), ids=str)
def test_steps_over_rows(name, dtype, row_wise, width, ids, guards):
    step = RowStep(
        rule=name, param=guards.around(torch.rand(40, width).to(dtype)),
        ids=guards.around(torch.tensor(ids, dtype=torch.int64)), rows=guards.around(torch.rand(len(ids), width).to(dtype)),
        unique=len(set(ids)) == len(ids), lr=0.1, eps=1e-6, rho=0.9, steps=guards.around(torch.tensor(1.0)),
        states=[guards.around(torch.rand(40, 1 if row_wise else width)) for _ in RULES[name].state_names],
    )  # fmt: skip
    cpu.step_rows(step)
    options = {"maximize": True, "weight_decay": 0.1, "factor": 0.5, "grad_scale": 4.0}
    cpu.step_rows(dataclasses.replace(step, **options))


def sparse_adadelta(params, **options):
    return Adadelta(params, sparse=True, **options)


@pytest.mark.parametrize("sparse_dim", [1, 2])
@pytest.mark.parametrize("gaps", [False, True], ids=["whole", "gaps"])
@pytest.mark.parametrize("row_wise", [False, True], ids=["elements", "row-wise"])
@pytest.mark.parametrize("make", sampled([sparse_adadelta, Adagrad], Adagrad))
def test_optimizers_over_rows(make, row_wise, gaps, sparse_dim, guards):
    if sparse_dim == 2 and (row_wise or gaps):
        return  # one number per row of what?
    start = torch.rand(12, 5, 2)[..., 0] if gaps else torch.rand(12, 5)
    param = torch.nn.Parameter(guards.around(start))
    optimizer = make([param], row_wise=row_wise)
    for _ in range(2):
        for name, value in optimizer._state_of(param, optimizer.param_groups[0]).items():
            optimizer.state[param][name] = guards.around(value)
        ids = torch.tensor([[11, 0, 11, 4], [4, 0, 4, 2]])[:sparse_dim]
        values = guards.around(torch.rand(4, *(5,) * (2 - sparse_dim)))
        param.grad = torch.sparse_coo_tensor(guards.around(ids), values, (12, 5), check_invariants=True)
        optimizer.step()
        param.grad = guards.around(torch.rand(12, 5))
        optimizer.step()


@pytest.mark.parametrize("dtype", sampled(DTYPES, BF16), ids=str)
def test_norms_merging_and_sums(dtype, guards):
    tensors = [guards.around(torch.rand(n).to(dtype)) for n in SIZES]
    norms.square_sums(tensors)
    for tensor in tensors:
        norms.square_sum(tensor)
    for ids in IDS.values():
        for width in (1, 5, 33):
            rows.coalesce(
                guards.around(torch.tensor(ids, dtype=torch.int64)),
                guards.around(torch.rand(len(ids), width).to(dtype)),
            )
    total = torch.float64 if dtype == F64 else torch.float32
    for terms in (1, 3):
        flat = [guards.around(torch.rand(sum(SIZES)).to(dtype)) for _ in range(terms)]
        weighted_sum(guards.around(torch.zeros(sum(SIZES), dtype=total)), flat, [2.0] * terms, 3.0, SIZES)


@pytest.mark.parametrize("dtype", sampled([F32, BF16, F64], F32), ids=str)
def test_codes(dtype, guards):
    block = 256
    for n in SIZES[1:]:
        for units in (1, 3):
            codes = guards.around(torch.zeros(units * code_bytes(n, block), dtype=torch.uint8))
            source = torch.rand(units * n)
            if n == 257:
                source[0] = torch.inf
            quantise(
                guards.around(source.to(dtype)), guards.around(torch.rand(units * n)),
                guards.around(torch.zeros(units * n)), codes, length=n, block=block,
            )  # fmt: skip
            dequantise_rows(codes, guards.around(torch.zeros(units, n)), block=block)
            dequantise(codes, guards.around(torch.zeros(units * n)), [n] * units, block=block)


def test_bodies_that_arrive(guards):
    for dtype in DTYPES:
        values = guards.around(torch.rand(sum(SIZES)).to(dtype))
        body = arriving.floats(values, arriving.Blocks(SIZES))
        for arrived in (0, 100, 5000, values.nbytes):
            body.advance(arrived)
        body.square_sums()
    source = guards.around(torch.zeros(sum(code_bytes(n, 256) for n in SIZES), dtype=torch.uint8))
    body = arriving.codes(source, guards.around(torch.zeros(sum(SIZES))), arriving.Blocks(SIZES), block=256)
    for arrived in (0, 100, 5000, source.nbytes):
        body.advance(arrived)
    body.square_sums()


@pytest.mark.parametrize(
    "dtype, owed", sampled([(F32, True), (BF16, False), (F64, True)], (F32, True)), ids=str
)
def test_the_largest_elements(dtype, owed, guards):
    held = F64 if dtype == F64 else F32
    for n in SIZES[1:]:
        for k in {1, n // 2 or 1, n}:
            source = torch.rand(n)
            source[:: n // 3 + 1] = torch.nan
            residual = guards.around(torch.rand(n, dtype=held)) if owed else None
            select(
                guards.around(source.to(dtype)),
                residual,
                guards.around(torch.zeros(n, dtype=held)),
                k,
                wire=dtype,
            )


COPIES = [(F32, F32), (F32, BF16), (F32, F16), (F16, F16)]


@pytest.mark.parametrize("more", sampled([1, 15, 17, 5000, (8 << 20) // 4 + 3], 1, 17))
@pytest.mark.parametrize("target_dtype, source_dtype", sampled(COPIES, *COPIES[:2]), ids=str)
def test_copies(target_dtype, source_dtype, more, guards):
    target, source = (
        torch.rand(TORCH_ELEMENTS + more + 3).to(dtype) for dtype in (target_dtype, source_dtype)
    )
    for at, of in ((0, 0), (1, 3), (3, 1)):
        end = len(target) - 3
        copy(guards.around(target[at : at + end]), guards.around(source[of : of + end]))


def test_digests(guards):
    for more in (0, 1, 1023, 1025):
        xxh3_64(b"head", [guards.around(torch.zeros(LEAST_BYTES + more, dtype=torch.uint8))])


MESSAGE = b"\x0a\x01m\x1a\x03\x01\x80\x02\x18\xff\x7f\x21" + bytes(8) + b"\x2d" + bytes(4)


def test_messages():
    """Whole, cut short, and with each byte another: numbers, lengths and tags that lead beyond the end."""
    bodies = [MESSAGE[:n] for n in range(len(MESSAGE))]
    for at in range(len(MESSAGE)):
        bodies += [MESSAGE[:at] + bytes([byte]) + MESSAGE[at + 1 :] for byte in (0, 0x7F, 0xFF)]
    for body in bodies:
        with contextlib.suppress(ValueError):  # no message
            Varints(body, 3).numbers()
    assert Varints(MESSAGE, 3).numbers().tolist() == [1, 256, 16383]
