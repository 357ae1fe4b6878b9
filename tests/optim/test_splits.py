"""The same bits for any number of threads, any split, list and arena form, and from several Python threads at once."""

from __future__ import annotations

import threading

import pytest
import torch

from pushstep.optim import RULES, Adadelta, Adagrad
from pushstep.optim.cpu import dense as backend
from pushstep.optim.rules.rule import backend_of
from pushstep.optim.step.operands import STATES
from pushstep.optim.step.step import Step
from tests.support.numbers.row_steps import row_step
from tests.support.numbers.torch_settings import threads_at_most

SIZES = [1, 7, 4096, 0, 65537, 300_001, 1000, 16]
OPTIONS = {
    "plain": {},
    "everything": {
        "factor": 0.37,
        "clip_value": 0.9,
        "weight_decay": 0.01,
        "maximize": True,
        "grad_scale": 8.0,
        "ema_momentum": 0.9,
    },
    "decoupled": {"weight_decay": 0.01, "decoupled": True, "zero_grad": True},
    "keras": {"eps_inside_root": True, "multiply_first": True},
}


def _operands(name, dtype, extras):
    torch.manual_seed(0)
    total = sum(SIZES)
    rule = RULES[name]
    arenas = [
        torch.randn(total).to(dtype),
        torch.randn(total).to(dtype),
        *(torch.rand(total) for _ in rule.state_names),
    ]
    if extras:
        arenas += [torch.randn(total), torch.zeros(total, dtype=torch.bfloat16)]
    return arenas


def _views(arenas):
    return [list(arena.split(SIZES)) for arena in arenas]


def _step(name, lists, options):
    rule = RULES[name]
    count = len(rule.state_names)
    more = {}
    if len(lists) > 2 + count:
        more = {"ema": lists[2 + count], "copy_out": lists[3 + count]}
    given = {"lr": 0.5, "eps": 1e-6, "rho": 0.9, **options}
    backend.step(
        Step(
            rule=name,
            params=lists[0],
            grads=lists[1],
            states=lists[2 : 2 + count],
            step=3,
            lr_decay=0.1,
            **given,
            **more,
        )
    )


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_threads_splits_list_and_arena(name, dtype, options, monkeypatch):
    extras = options == "everything"
    results = []

    def record(arenas):
        results.append([a.clone() for a in arenas])

    for threads, slice_size in ((1, 1 << 16), (2, 1 << 16), (7, 1 << 10), (3, 1001)):
        monkeypatch.setattr(backend, "SLICE_ELEMENTS", slice_size)
        monkeypatch.setattr(backend, "INLINE_ELEMENTS", 0)
        with threads_at_most(threads):
            arenas = _operands(name, dtype, extras)
            _step(name, [[a] for a in arenas], OPTIONS[options])  # one flat run
            record(arenas)
            arenas = _operands(name, dtype, extras)
            _step(name, _views(arenas), OPTIONS[options])  # a list of tensors
            record(arenas)
    arenas = _operands(name, dtype, extras)
    for start in range(0, arenas[0].numel(), 77_777):  # ranges, as the server's shards are
        _step(name, [[a[start : start + 77_777]] for a in arenas], OPTIONS[options])
    record(arenas)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("make", [Adadelta, Adagrad])
def test_the_class_and_the_rule_give_the_same_bits(make):
    torch.manual_seed(0)
    rule = RULES[make.rule.name]
    p = torch.nn.Parameter(torch.randn(10_000))
    q = p.detach().clone()
    states = [torch.zeros(10_000) for _ in rule.state_names]
    optimizer = make([p], weight_decay=0.1)
    for k in range(5):
        p.grad = torch.randn(10_000)
        optimizer.step()
        rule.step_dense(q, p.grad, states, {**rule.defaults, "weight_decay": 0.1}, step=k + 1)
    assert torch.equal(p.detach(), q)


@pytest.mark.parametrize("name", RULES)
def test_several_python_threads_step_at_once(name):
    rule = RULES[name]
    torch.manual_seed(0)
    n = 200_000
    start, grad = torch.randn(n), torch.randn(n)
    expected = [start.clone(), *(torch.zeros(n) for _ in rule.state_names)]
    for step in range(1, 6):
        rule.step_dense(expected[0], grad, expected[1:], rule.defaults, step=step)
    results: list[list[torch.Tensor]] = []

    def work():
        own = [start.clone(), *(torch.zeros(n) for _ in rule.state_names)]
        torch.set_num_threads(4)  # of this thread
        for step in range(1, 6):
            rule.step_dense(own[0], grad, own[1:], rule.defaults, step=step)
        results.append(own)

    threads = [threading.Thread(target=work) for _ in range(8)]
    with threads_at_most(torch.get_num_threads()):
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert len(results) == 8
    for own in results:
        for a, b in zip(own, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("row_wise", [False, True])
@pytest.mark.parametrize("name", STATES)
def test_rows_give_the_same_bits_for_any_number_of_threads(name, row_wise, threads):
    rule = RULES[name]
    torch.manual_seed(0)
    ids, rows = torch.randint(0, 5000, (20_000,)), torch.randn(20_000, 17)
    results = []
    for count in (1, threads):
        param = torch.ones(5000, 17)
        states = [torch.zeros(5000, 1 if row_wise else 17) for _ in rule.state_names]
        with threads_at_most(count):
            backend_of(param).step_rows(row_step(rule, param, ids, rows, states, unique=False))
        results.append([param, *states])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
