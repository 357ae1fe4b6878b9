"""Steps to try the CUDA kernels with: options, dtypes, sizes around the borders of blocks."""

from __future__ import annotations

import dataclasses

import torch

from pushstep.optim.cuda.kernels import BLOCK
from pushstep.optim.step.step import RowStep, Step

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

SIZES = (5, 0, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3)
DUPLICATES = [3, 7, 3, 39, 7, 3, 0, 3, 11]

OPTIONS = {
    "plain": {},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "coupled": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled": True},
    "factor": {"factor": 0.25},
    "factors": {"factor": [0.5, 1.0, 0.25, 2.0, 0.1, 0.3]},
    "clip": {"clip_value": 0.5},
    "unscale": {"grad_scale": 8.0},
    "zero": {"zero_grad": True},
    "ema": {"ema": True},
    "copy": {"copy_out": True},
    "inside": {"eps_inside_root": True},
    "first": {"multiply_first": True},
    "all": {
        "maximize": True, "weight_decay": 0.1, "decoupled": True, "factor": 0.25, "clip_value": 0.5, "grad_scale": 8.0,
        "zero_grad": True, "ema": True, "copy_out": True, "eps_inside_root": True, "multiply_first": True,
    },
}  # fmt: skip
# parameter, gradient, state
DTYPES = [(F32, F32, F32), (F64, F64, F64), (BF16, BF16, F32), (F16, F16, F32), (F32, BF16, F32), (BF16, BF16, BF16),
          (F64, F16, F64), (F32, F32, F64)]  # fmt: skip


def make_step(rule, sizes=SIZES, dtypes=(F32, F32, F32), options=None, seed=0, **fields):
    """A dense step on the CPU, with states of a run that has begun."""
    generator = torch.Generator().manual_seed(seed)
    options = dict(options or {})

    def tensors(dtype, scale=1.0):
        return [torch.randn(n, generator=generator).mul(scale).to(dtype) for n in sizes]

    if options.pop("ema", False):
        fields["ema"] = tensors(F32)
    if options.pop("copy_out", False):
        fields["copy_out"] = tensors(BF16)
    states = [[t.abs() for t in tensors(dtypes[2])] for _ in range(2 if rule == "adadelta" else 1)]
    given = {"lr": 0.1, "rho": 0.9, "eps": 1e-6, **options, **fields}
    return Step(rule=rule, params=tensors(dtypes[0]), grads=tensors(dtypes[1], 2.0), states=states, **given)


def moved(step, device):
    """The same step with every tensor, nested or not, copied to the device."""

    def go(value):
        if isinstance(value, torch.Tensor):
            return value.to(device, copy=True)
        if isinstance(value, (list, tuple)):
            return [go(v) for v in value]
        return value

    return dataclasses.replace(step, **{f.name: go(getattr(step, f.name)) for f in dataclasses.fields(step)})


def make_rows(rule, ids, width=8, table=40, row_wise=False, dtypes=(F32, F32, F32), **fields):
    torch.manual_seed(1)
    shape = (table, *width) if isinstance(width, tuple) else (table, width)
    rows = torch.randn(len(ids), *shape[1:]).to(dtypes[1])
    states = [
        torch.rand((table, 1) if row_wise else shape).to(dtypes[2])
        for _ in range(2 if rule == "adadelta" else 1)
    ]
    given = {"lr": 0.1, "rho": 0.9, "eps": 1e-6, "unique": len(set(ids)) == len(ids), **fields}
    return RowStep(
        rule=rule, param=torch.randn(shape).to(dtypes[0]), ids=torch.tensor(ids, dtype=torch.int64), rows=rows,
        states=states, **given,
    )  # fmt: skip
