"""bfloat16 and float16: exact conversions, float32 arithmetic and state, what is kept on load."""

from __future__ import annotations

import pytest
import torch

from pushstep.optim import RULES, Adadelta, Adagrad
from pushstep.optim.rules.mlx import rounded

HALF = [torch.bfloat16, torch.float16]


def _all_bits(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_half_number_is_read_exactly(dtype):
    values = _all_bits(dtype)
    copied = torch.zeros(values.numel())
    rule = RULES["adagrad"]
    rule.step_dense(
        values.clone(),
        torch.zeros(values.numel()),
        [torch.ones(values.numel())],
        {**rule.defaults, "lr": 0.0},
        step=1,
        copy_out=copied,
    )
    expected = values.float()
    assert torch.equal(copied.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_float32_is_rounded_as_torch_rounds_it(dtype):
    torch.manual_seed(0)
    halves = _all_bits(dtype).float()
    middles = (halves + torch.roll(halves, 1)) / 2
    special = torch.tensor([65504.0, 65519.996, 65520.0, 65536.0, 3.4e38, 5.96e-8, 2.98e-8, 2.9803e-8, 1e-45])
    random = (
        torch.randint(-(2**31), 2**31 - 1, (1 << 20,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    )
    values = torch.cat([halves, middles, special, -special, torch.nextafter(middles, halves), random])
    copied = torch.zeros(values.numel(), dtype=dtype)
    rule = RULES["adagrad"]
    zeros, ones = torch.zeros(values.numel()), torch.ones(values.numel())
    rule.step_dense(values.clone(), zeros, [ones], {**rule.defaults, "lr": 0.0}, step=1, copy_out=copied)
    expected = values.to(dtype)
    assert torch.equal(copied.isnan(), expected.isnan())
    same = ~expected.isnan()
    assert torch.equal(copied[same].view(torch.int16), expected[same].view(torch.int16))


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MIXES = [  # parameter, gradient, state
    (F32, BF16, F32),
    (F32, F16, F32),
    (BF16, BF16, F32),
    (F16, F16, F32),
    (BF16, F32, F32),
    (BF16, BF16, BF16),
    (F16, F16, F16),
    (F16, BF16, BF16),
]


# A kernel is compiled for each; the rules in Keras's and MLX's terms differ from torch's in no conversion.
SAMPLE = ((BF16, BF16, F32), (F16, BF16, BF16))
MIXED = [
    pytest.param(
        name, *mix, marks=[] if name in ("adadelta", "adagrad") or mix in SAMPLE else pytest.mark.soak
    )
    for name in RULES
    for mix in MIXES
]


@pytest.mark.parametrize(("name", "param", "grad", "state"), MIXED)
def test_mixed_dtypes_are_the_float32_step_rounded_once(name, param, grad, state):
    rule = RULES[name]
    torch.manual_seed(0)
    n = 1003
    p, g = torch.randn(n).to(param), torch.randn(n).to(grad)
    states = [torch.rand(n).to(state) for _ in rule.state_names]
    wide = [p.float().clone(), *(s.float().clone() for s in states)]
    # MLX's lr has the parameter's dtype
    lr = rounded(rule.defaults["lr"], param) if name.startswith("mlx_") else rule.defaults["lr"]
    rule.step_dense(wide[0], g.float(), wide[1:], {**rule.defaults, "lr": lr}, step=3, factor=0.3)
    rule.step_dense(p, g, states, rule.defaults, step=3, factor=0.3)
    for narrow, reference in zip([p, *states], wide, strict=True):
        assert torch.equal(narrow, reference.to(narrow.dtype))


@pytest.mark.parametrize("make", [Adadelta, Adagrad])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_states_are_float32_and_stay_so_through_a_load(make, dtype):
    p = torch.nn.Parameter(torch.randn(64).to(dtype))
    optimizer = make([p])
    for _ in range(3):
        p.grad = torch.randn(64).to(dtype)
        optimizer.step()
    key = optimizer.rule.state_names[0]
    assert optimizer.state[p][key].dtype == torch.float32
    seen = []
    twin = make([p])
    twin.register_load_state_dict_post_hook(lambda o: seen.append(o.state[p][key].dtype))
    twin.load_state_dict(optimizer.state_dict())
    assert seen == [torch.float32]
    assert torch.equal(twin.state[p][key], optimizer.state[p][key])
    base = make.__bases__[1]
    plain = base([p])
    plain.load_state_dict(optimizer.state_dict())
    assert plain.state[p][key].dtype == dtype  # plain torch rounds
    twin.load_state_dict(plain.state_dict())
    assert twin.state[p][key].dtype == torch.float32
    as_torch = make([p], state_dtype="param")
    as_torch.load_state_dict(optimizer.state_dict())
    assert as_torch.state[p][key].dtype == dtype
    as_torch.step()
    assert as_torch.path(p).fused


def test_an_invalid_state_dtype():
    with pytest.raises(ValueError, match="Invalid state_dtype value: 'float32'"):
        Adagrad([torch.nn.Parameter(torch.ones(1))], state_dtype="float32")


@pytest.mark.parametrize("make", [Adadelta, Adagrad])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("path", [{"fused": False}, {"foreach": True}], ids=str)
def test_torchs_path_takes_float32_states_too(make, dtype, path):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(64).to(dtype))
    q = torch.nn.Parameter(p.detach().clone())
    one, two = make([p]), make([q], **path)
    for _ in range(3):
        p.grad = torch.randn(64).to(dtype)
        q.grad = p.grad.clone()
        one.step()
        two.step()
    torch.testing.assert_close(p, q, rtol=2e-2, atol=1e-2)


def test_half_adagrad_does_not_turn_zero_gradients_into_nan():
    for n in (5, 67):
        p = torch.nn.Parameter(torch.ones(n, dtype=torch.float16))
        p.grad = torch.zeros(n, dtype=torch.float16)
        Adagrad([p]).step()
        assert (p == 1).all()


def test_float32_states_do_not_stall_where_bfloat16_ones_do():
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = Adagrad([p])
    for _ in range(300):
        p.grad = torch.ones(4, dtype=torch.bfloat16)
        optimizer.step()
    assert (optimizer.state[p]["sum"] == 300).all()
