"""Row-sparse gradients: torch's Adagrad, Adadelta on rows, row-wise state, merging of duplicates."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from pushstep.optim import RULES, Adadelta, Adagrad
from pushstep.optim.ops import norms, rows
from pushstep.optim.rules.rule import backend_of
from tests.support.numbers.row_steps import row_step

ROW_RULES = ("adadelta", "adagrad")  # Keras has none over rows

# torch's own sparse Adagrad step warns so, once per process
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")


def _sparse(ids, values, shape):
    return torch.sparse_coo_tensor(
        torch.as_tensor(ids).reshape(1, -1), values, shape, check_invariants=True, is_coalesced=False
    )


def _ids(n, count, seed=0):
    return torch.randint(0, n, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [(), (1,), (5,), (32,), (4, 8)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 0.5, "lr_decay": 0.1}, {"maximize": True}, {"initial_accumulator_value": 0.1}],
    ids=str,
)
def test_adagrad_is_torchs_and_its_sums_are_to_the_bit(width, options):
    torch.manual_seed(0)
    start = torch.randn(500, *width)
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours, theirs = Adagrad([p], **options), torch.optim.Adagrad([q], **options)
    for k in range(20):
        ids = _ids(500, 300, k)
        values = torch.randn(300, *width)
        p.grad = _sparse(ids, values, start.shape)
        # torch promises no order for the sum of three duplicates, so it gets them summed
        unique, merged = rows.coalesce(ids, values)
        q.grad = _sparse(unique, merged, start.shape)
        ours.step()
        theirs.step()
        assert torch.equal(ours.state[p]["sum"], theirs.state[q]["sum"])
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert ours.state[p]["step"] == 20
    assert ours.path(p).fused


def test_adagrad_with_weight_decay_refuses_sparse_gradients():
    p = torch.nn.Parameter(torch.randn(5, 2))
    p.grad = _sparse([1], torch.ones(1, 2), p.shape)
    with pytest.raises(RuntimeError, match="weight_decay option is not compatible with sparse gradients"):
        Adagrad([p], weight_decay=0.1).step()


def test_adadelta_refuses_sparse_gradients_unless_told():
    p = torch.nn.Parameter(torch.randn(5, 2))
    p.grad = _sparse([1], torch.ones(1, 2), p.shape)
    for fused in (None, True, False):
        with pytest.raises(RuntimeError, match="Adadelta does not support sparse gradients"):
            Adadelta([p], fused=fused).step()
    optimizer = Adadelta([{"params": [p], "sparse": True}])
    optimizer.step()
    optimizer.load_state_dict(torch.optim.Adadelta([p]).state_dict())
    optimizer.step()  # the group's own word outlives a load that does not know it


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gaps", [False, True])
def test_adadelta_on_rows_is_the_dense_rule_on_the_rows_named(fused, dtype, gaps):
    torch.manual_seed(0)
    start = torch.randn(50, 7, 2).to(dtype)
    p = torch.nn.Parameter(start.clone()[..., 0] if gaps else start[..., 0].contiguous())
    before = p.detach().clone()
    optimizer = Adadelta([p], sparse=True, fused=fused, weight_decay=0.1)
    ids = torch.tensor([3, 41, 7, 3])
    values = torch.randn(4, 7).to(dtype)
    p.grad = _sparse(ids, values, p.shape)
    optimizer.step()
    named = torch.tensor([3, 7, 41])
    twin = torch.nn.Parameter(before[named].clone())
    twin.grad = torch.stack([(values[0].float() + values[3].float()).to(dtype), values[2], values[1]])
    dense = Adadelta([twin], weight_decay=0.1)
    dense.step()
    bound = {"rtol": 1e-2, "atol": 1e-3} if dtype.itemsize == 2 else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(p.detach()[named], twin.detach(), **bound)
    rest = torch.ones(50, dtype=torch.bool)
    rest[named] = False
    assert torch.equal(p[rest], before[rest])
    for name in ("square_avg", "acc_delta"):
        assert not optimizer.state[p][name][rest].any()
        torch.testing.assert_close(optimizer.state[p][name][named], dense.state[twin][name])


@pytest.mark.parametrize("name", ROW_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_here_or_there_gives_the_same_bits(name, dtype):
    rule = RULES[name]
    torch.manual_seed(0)
    ids, values = _ids(300, 2000), torch.randn(2000, 33).to(dtype)
    results = []
    for merge_first in (False, True):
        param = torch.ones(300, 33, dtype=dtype)
        state = [torch.full((300, 33), 0.1) for _ in rule.state_names]
        some, their_rows = rows.coalesce(ids, values) if merge_first else (ids, values)
        step = row_step(rule, param, some, their_rows, state, factor=0.5, unique=merge_first)
        backend_of(param).step_rows(step)
        results.append([param, *state])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_coalesce_sums_in_order_of_appearance(dtype, count):
    torch.manual_seed(count)
    ids, values = _ids(60, count), torch.randn(count, 3, 2).to(dtype)
    unique, merged = rows.coalesce(ids, values)
    expected: dict[int, torch.Tensor] = {}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for k, row in zip(ids.tolist(), values, strict=True):
        expected[k] = expected[k] + row.to(wide) if k in expected else row.to(wide)
    assert unique.tolist() == sorted(expected)
    assert merged.dtype == dtype
    for k, row in zip(unique.tolist(), merged, strict=True):
        assert torch.equal(row, expected[k].to(dtype))
    again = rows.coalesce(unique, merged)
    assert torch.equal(again[0], unique)
    assert torch.equal(again[1], merged)


def test_coalesce_with_large_ids_keeps_them():
    ids = torch.tensor([2**40 + 3, 5, 2**40 + 3, 2**33])
    unique, merged = rows.coalesce(ids, torch.tensor([[1.0], [2.0], [4.0], [8.0]]))
    assert unique.tolist() == [5, 2**33, 2**40 + 3]
    assert merged.reshape(-1).tolist() == [2.0, 8.0, 5.0]


@pytest.mark.parametrize("unique", [True, False])
@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_an_id_outside_the_table_is_an_error_and_writes_nothing(unique, bad):
    rule = RULES["adagrad"]
    param, state = torch.ones(10, 4), [torch.zeros(10, 4)]
    with pytest.raises(IndexError, match=f"index {bad} is out of bounds for dimension 0 with size 10"):
        step = row_step(rule, param, torch.tensor([3, bad]), torch.ones(2, 4), state, unique=unique)
        backend_of(param).step_rows(step)
    assert (param == 1).all()
    assert not state[0].any()


def test_a_gradient_sparse_in_two_dimensions():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, 5))
    q = copy.deepcopy(p)
    dense = torch.zeros(6, 5)
    dense[1, 2], dense[5, 0] = 3.0, -1.0
    p.grad, q.grad = dense.to_sparse(), dense.to_sparse()
    Adagrad([p]).step()
    torch.optim.Adagrad([q]).step()
    torch.testing.assert_close(p, q)


def test_an_empty_sparse_gradient_counts_a_step():
    p = torch.nn.Parameter(torch.ones(6, 5))
    p.grad = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 5), (6, 5))
    optimizer = Adagrad([p])
    optimizer.step()
    assert (p == 1).all()
    assert optimizer.state[p]["step"] == 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True, "lr": 0.5}], ids=str)
def test_adadelta_on_complex_rows_is_torchs_dense_rule_on_the_rows_named(dtype, options):
    torch.manual_seed(0)
    start = torch.randn(50, 7, dtype=dtype)
    p, named = torch.nn.Parameter(start.clone()), torch.tensor([3, 7, 41])
    twin = torch.nn.Parameter(start[named].clone())
    rows_alone, dense = Adadelta([p], sparse=True, **options), torch.optim.Adadelta([twin], **options)
    for _ in range(3):
        values = torch.randn(4, 7, dtype=dtype)
        p.grad = _sparse([41, 3, 7, 3], values, p.shape)
        twin.grad = torch.stack([values[1] + values[3], values[2], values[0]])
        rows_alone.step()
        dense.step()
    torch.testing.assert_close(p.detach()[named], twin.detach(), rtol=1e-6, atol=1e-7)
    for name in ("square_avg", "acc_delta"):
        torch.testing.assert_close(
            rows_alone.state[p][name][named], dense.state[twin][name], rtol=1e-5, atol=1e-9
        )
    rest = torch.ones(50, dtype=torch.bool)
    rest[named] = False
    assert torch.equal(p[rest], start[rest])


@pytest.mark.parametrize("name", ROW_RULES)
@pytest.mark.parametrize("conjugated", [False, True])
def test_a_rule_steps_real_and_imaginary_parts_apart(name, conjugated):
    torch.manual_seed(0)
    rule = RULES[name]
    param, grad = (torch.randn(5, 3, dtype=torch.complex64) for _ in range(2))
    states = [torch.zeros_like(param) for _ in rule.state_names]
    twins = [torch.view_as_real(tensor).clone() for tensor in (param, *states)]
    given = grad.conj() if conjugated else grad
    rule.step_dense(param, given, states, rule.defaults, step=1)
    rule.step_dense(twins[0], torch.view_as_real(given.resolve_conj()), twins[1:], rule.defaults, step=1)
    ids = torch.tensor([4, 1])
    rule.step_rows(param, ids, given[:2], states, rule.defaults, step=2)
    rule.step_rows(
        twins[0], ids, torch.view_as_real(given[:2].resolve_conj()), twins[1:], rule.defaults, step=2
    )
    for got, want in zip((param, *states), twins, strict=True):
        torch.testing.assert_close(torch.view_as_real(got), want)


@pytest.mark.parametrize("init_scale", [1024.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", ["Adagrad", "Adadelta"])
def test_a_grad_scaler_leaves_rows_as_torch_leaves_them(make, dtype, init_scale):
    ours = {"Adagrad": Adagrad, "Adadelta": lambda params: Adadelta(params, sparse=True)}[make]

    def run(optimizer_of, explicitly):
        torch.manual_seed(0)
        table = torch.nn.Parameter(torch.randn(30, 5, dtype=dtype))
        plain = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = optimizer_of([table, plain])
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        for k in range(3):
            optimizer.zero_grad()
            table.grad = _sparse([7, 2, 7, 9], scaler.scale(torch.randn(4, 5).to(dtype)), table.shape)
            plain.grad = scaler.scale(torch.full((3,), k + 1.0, dtype=dtype))
            if explicitly:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return table, optimizer

    torchs, _ = run(torch.optim.Adagrad, explicitly=False)
    twin, unscaled = run(ours, explicitly=True)
    table, optimizer = run(ours, explicitly=False)
    assert optimizer._step_supports_amp_scaling
    for other in (torchs, twin):
        assert torch.equal(table.grad._indices(), other.grad._indices())
        assert torch.equal(table.grad._values(), other.grad._values())
    assert torch.equal(table, twin)
    for name, value in unscaled.state[twin].items():
        assert torch.equal(optimizer.state[table][name], value)


def test_rows_stay_scaled_where_the_scaler_found_infinity():
    table = torch.nn.Parameter(torch.ones(4, 2))
    optimizer = Adagrad([table])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    values = scaler.scale(torch.tensor([[1.0, torch.inf]]))
    table.grad = _sparse([1], values.clone(), table.shape)
    scaler.step(optimizer)
    assert torch.equal(table.grad._values(), values)
    assert (table == 1).all()
    assert optimizer.state[table]["step"] == 0


@pytest.mark.parametrize("name", ROW_RULES)
def test_states_that_lie_otherwise(name):
    """With gaps, negated or one number per row: the values are what counts."""
    torch.manual_seed(0)
    rule = RULES[name]
    ids, values = torch.tensor([3, 1]), torch.randn(2, 4)
    lying = {
        "gaps": lambda t: torch.stack([t, torch.randn_like(t)], dim=-1)[..., 0],
        "negated": lambda t: torch._neg_view(-t),
    }
    for shape in ((6, 4), (6, 1)):
        for lie in lying.values():
            plain = [torch.rand(6, 4), *(torch.rand(shape) for _ in rule.state_names)]
            odd = [lie(t) for t in plain]
            for tensors in (plain, odd):
                rule.step_rows(tensors[0], ids, values, tensors[1:], rule.defaults, step=1)
                rule.step_dense(tensors[0], values.repeat(3, 1), tensors[1:], rule.defaults, step=2)
            for a, b in zip(odd, plain, strict=True):
                assert torch.equal(a.resolve_neg(), b)


@pytest.mark.parametrize("name", ROW_RULES)
def test_zeros_that_were_never_written(name):
    rule = RULES[name]
    lazy = torch._efficientzerotensor(6, 4)
    made = [torch.ones(6, 4), *(torch.ones(6, 4) for _ in rule.state_names)]
    want = [tensor.clone() for tensor in made]
    for tensors, grad in ((made, lazy), (want, torch.zeros(6, 4))):
        rule.step_dense(tensors[0], grad, tensors[1:], rule.defaults, step=1)
        rule.step_rows(tensors[0], torch.arange(6), grad, tensors[1:], rule.defaults, step=2)
    for a, b in zip(made, want, strict=True):
        assert torch.equal(a, b)
    assert norms.square_sums([lazy, torch.ones(2)]) == [0.0, 2.0]
    assert norms.square_sum(lazy) == 0.0


def _row_wise_reference(name, p, g, states, lr):
    p, g = p.double(), g.double()
    if name == "adagrad":
        (h,) = (s.double() for s in states)
        h = h + g.square().mean(1, keepdim=True)
        return p - lr * g / (h.sqrt() + 1e-10), [h]
    v, u = (s.double() for s in states)
    v = 0.9 * v + 0.1 * g.square().mean(1, keepdim=True)
    d = ((u + 1e-6) / (v + 1e-6)).sqrt() * g
    return p - lr * d, [v, 0.9 * u + 0.1 * d.square().mean(1, keepdim=True)]


@pytest.mark.parametrize("make", [Adadelta, Adagrad])
@pytest.mark.parametrize("sparse", [True, False])
def test_row_wise_state_is_fed_by_the_mean_over_the_row(make, sparse):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(40, 9))
    more = {"sparse": True} if make is Adadelta else {}
    optimizer = make([p], lr=0.5, row_wise=True, **more)
    name = optimizer.rule.name
    states = [torch.zeros(40, 1) for _ in optimizer.rule.state_names]
    expected = p.detach().clone()
    for k in range(3):
        g = torch.randn(40, 9)
        if sparse:
            ids = torch.arange(k, 40, 3)
            p.grad = _sparse(ids, g[ids], p.shape)
        else:
            ids = torch.arange(40)
            p.grad = g
        moved, new = _row_wise_reference(name, expected[ids], g[ids], [s[ids] for s in states], 0.5)
        expected[ids] = moved.float()
        for s, n in zip(states, new, strict=True):
            s[ids] = n.float()
        optimizer.step()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)
        for key, s in zip(optimizer.rule.state_names, states, strict=True):
            assert optimizer.state[p][key].shape == (40, 1)
            torch.testing.assert_close(optimizer.state[p][key], s, rtol=1e-5, atol=1e-9)


def test_row_wise_states_are_refused_by_other_loads():
    p = torch.nn.Parameter(torch.randn(4, 3))
    p.grad = torch.randn(4, 3)
    row_wise, plain = Adagrad([p], row_wise=True), Adagrad([p])
    row_wise.step()
    with pytest.raises(ValueError, match="sum is row-wise"):
        plain.load_state_dict(row_wise.state_dict())
    with pytest.raises(ValueError, match="row_wise=True keeps"):
        row_wise.load_state_dict(plain.state_dict())
    Adagrad([p], row_wise=True).load_state_dict(row_wise.state_dict())
    refused = Adagrad([p], row_wise=True, foreach=True)
    with pytest.raises(RuntimeError, match="row_wise=True needs the fused path, which is not taken: foreach"):
        refused.step()


def test_only_named_rows_of_a_huge_table_are_touched():
    table = torch.from_numpy(np.zeros((1 << 24, 32), np.float32))  # 2 GB of pages nobody has asked for yet
    state = torch.from_numpy(np.zeros((1 << 24, 32), np.float32))
    rule = RULES["adagrad"]
    ids = torch.arange(0, 1 << 24, 1 << 18)  # each touches a huge page of either
    rule.step_rows(table, ids, torch.ones(len(ids), 32), [state], rule.defaults, step=1)
    assert (table[ids] < 0).all()
    assert not table[ids + 1].any()
