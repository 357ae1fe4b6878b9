"""Every option of the one pass, against the same thing written in plain torch operations."""

from __future__ import annotations

import copy

import pytest
import torch

from pushstep.optim import RULES
from pushstep.optim.backends import reference as eager
from pushstep.optim.cpu import dense as backend
from pushstep.optim.step.operands import STATES
from pushstep.optim.step.step import RowStep, Step

OPTIONS = [
    {},
    {"factor": 0.25},
    {"factor": 3.0, "maximize": True},
    {"clip_value": 0.5},
    {"clip_value": 0.5, "factor": 2.0, "maximize": True, "weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled": True},
    {"grad_scale": torch.tensor(1024.0)},
    {"grad_scale": 1024.0, "found_inf": torch.tensor(0.0), "zero_grad": True},
    {"found_inf": torch.tensor(1.0), "zero_grad": True},
    {"zero_grad": True},
    {"eps_inside_root": True},
    {"multiply_first": True},
    {"ema": True, "ema_momentum": 0.9},
    {"copy_out": torch.bfloat16},
    {"copy_out": torch.float16, "ema": True},
    {"steps": True, "lr_decay": 0.5},
]


def _step(name, options, layout):
    torch.manual_seed(0)
    rule = RULES[name]
    shapes = [(33, 65), (7,), (0,), ()]
    options = dict(options)

    def make(fill):
        made = [fill(shape) for shape in shapes]
        return [t.t().contiguous().t() if layout == "transposed" and t.dim() == 2 else t for t in made]

    if options.get("ema"):
        options["ema"] = make(torch.randn)
    if options.get("copy_out"):
        options["copy_out"] = [t.to(options["copy_out"]) for t in make(torch.zeros)]
    if options.get("steps"):
        options["steps"] = [torch.tensor(float(k)) for k in range(4)]
    return Step(
        rule=name,
        params=make(torch.randn),
        grads=[torch.randn(shape) for shape in shapes],
        states=[make(torch.rand) for _ in rule.state_names],
        **{"lr": 0.5, "eps": 1e-6, "rho": 0.9, "step": 2, **options},
    )


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_kernels_do_what_plain_operations_do(name, options, layout):
    fused = _step(name, options, layout)
    plain = copy.deepcopy(fused)
    before = copy.deepcopy(fused)
    backend.step(fused)
    eager.step(plain)
    for a, b in zip(fused.written(), plain.written(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if a.dtype == torch.float32 else 1e-2, atol=1e-6)
    for a, b in zip(fused.grads, plain.grads, strict=True):
        torch.testing.assert_close(a, b)
    if options.get("found_inf") == 1.0:
        for a, b in zip(fused.written(), before.written(), strict=True):
            assert torch.equal(a, b)
    elif options.get("zero_grad"):
        assert not any(g.any() for g in fused.grads)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("row_wise", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"factor": 0.25, "maximize": True},
        {"grad_scale": 8.0, "weight_decay": 0.1},
        {"steps": torch.tensor(3.0), "lr_decay": 0.5},
        {"found_inf": 1.0},
    ],
    ids=str,
)
def test_row_kernels_do_what_plain_operations_do(name, row_wise, options):
    torch.manual_seed(0)
    rule = RULES[name]
    fused = RowStep(
        rule=name,
        param=torch.randn(50, 9),
        ids=torch.randint(0, 50, (80,)),
        rows=torch.randn(80, 9),
        unique=False,
        states=[torch.rand(50, 1 if row_wise else 9) for _ in rule.state_names],
        **{"lr": 0.5, "eps": 1e-6, "rho": 0.9, **copy.deepcopy(options)},
    )
    plain = copy.deepcopy(fused)
    backend.step_rows(fused)
    eager.step_rows(plain)
    for a, b in zip(fused.written(), plain.written(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_factor_for_each_tensor():
    for name, count in STATES.items():
        torch.manual_seed(0)
        params, grads = [torch.randn(5), torch.randn(6)], [torch.randn(5), torch.randn(6)]
        states = [[torch.rand(5), torch.rand(6)] for _ in range(count)]
        fused = Step(
            rule=name, params=params, grads=grads, states=states, lr=0.1, eps=1e-6, factor=[0.5, 1.0]
        )
        plain = copy.deepcopy(fused)
        backend.step(fused)
        eager.step(plain)
        for a, b in zip(fused.written(), plain.written(), strict=True):
            torch.testing.assert_close(a, b)


def test_nan_goes_through_the_clip():
    p, g = torch.ones(3), torch.tensor([float("nan"), float("inf"), -5.0])
    states = [[torch.zeros(3)]]
    backend.step(
        Step(rule="adagrad", params=[p], grads=[g], states=states, lr=1.0, eps=1e-10, clip_value=2.0)
    )
    assert p[0].isnan()
    assert p[1:].tolist() == [0.0, 2.0]


def test_writes_through_the_rule_are_counted():
    rule = RULES["adadelta"]
    tensors = [torch.randn(4) for _ in range(5)]
    p, g, v, u, copied = tensors
    versions = [t._version for t in tensors]
    rule.step_dense(p, g, [v, u], rule.defaults, step=1, copy_out=copied)
    assert [t._version - before for t, before in zip(tensors, versions, strict=True)] == [1, 0, 1, 1, 1]
