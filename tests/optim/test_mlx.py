"""MLX's terms against the real MLX: values, counting, errors; and what torch adds to them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from pushstep.optim import mlx as terms
from tests.support.numbers.optimizer_peers import MlxRun, mlx_optimizers, mx

RULES = ("AdaDelta", "Adagrad")
SHAPES = ((67, 113), (1031,), ())


def make(name, values, dtype=torch.float32, **options):
    params = [torch.nn.Parameter(value.clone().to(dtype)) for value in values]
    return getattr(terms, name)(params, **options), params


def step(optimizer, params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.to(param.dtype)
    optimizer.step()


def data(dtype=torch.float32, steps=20):
    """Values and gradients that `dtype` holds exactly, none of them so near 0 that its float16 square is."""
    torch.manual_seed(12)
    values = [torch.randn(shape).to(dtype) for shape in SHAPES]
    grads = [[torch.randn(shape) * (0.1 + k % 3) for shape in SHAPES] for k in range(steps)]
    return values, [[g.where(g.abs() > 2e-3, torch.tensor(2e-3)).to(dtype) for g in now] for now in grads]


@pytest.mark.parametrize("name", RULES)
def test_float64_is_mlx_float64(name):
    values, grads = data()
    optimizer, params = make(name, values, torch.float64, learning_rate=0.125)
    peer = MlxRun(name, values, torch.float64, learning_rate=0.125)
    for k, now in enumerate(grads):
        now = [None if k % 4 == 2 and i == 1 else grad for i, grad in enumerate(now)]
        step(optimizer, params, now)
        peer.step(now)
    for param, value, states in zip(params, peer.params, peer.states, strict=True):
        torch.testing.assert_close(param.detach(), value, rtol=1e-12, atol=1e-15)
        for state, held in states.items():
            torch.testing.assert_close(optimizer.state[param][state], held, rtol=1e-12, atol=1e-18)
    assert optimizer.steps == peer.optimizer.step.item() == 20


def test_the_learning_rate_is_rounded_to_the_gradients_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rounded = torch.tensor(0.1).to(dtype).item()
        one, (a,) = make("Adagrad", [torch.zeros(3)], dtype, learning_rate=0.1)
        two, (b,) = make("Adagrad", [torch.zeros(3)], torch.float64, learning_rate=rounded)
        for optimizer, param in ((one, a), (two, b)):
            step(optimizer, [param], [torch.tensor([1.0, -2.0, 0.5])])
        torch.testing.assert_close(a.detach(), b.detach().to(dtype), rtol=0, atol=0)


def test_a_small_float16_gradient_is_not_divided_by_zero():
    """In MLX its square and eps are 0 in float16; here states and arithmetic are float32."""
    optimizer, (param,) = make("Adagrad", [torch.ones(1)], torch.float16, learning_rate=0.125)
    peer = MlxRun("Adagrad", [torch.ones(1)], torch.float16, learning_rate=0.125)
    step(optimizer, [param], [torch.tensor([1e-4])])
    peer.step([torch.tensor([1e-4])])
    assert not torch.isfinite(peer.params[0]).any()
    assert param.item() == 0.875


def test_schedules_of_mlx_see_the_steps_taken_before():
    values, grads = data(steps=6)
    for schedule in (
        mlx_optimizers.exponential_decay(0.5, 0.5),
        mlx_optimizers.step_decay(0.5, 0.5, 2),
        mlx_optimizers.cosine_decay(0.5, 4),
        mlx_optimizers.linear_schedule(0.0, 0.5, 4),
        mlx_optimizers.join_schedules(
            [mlx_optimizers.linear_schedule(0.0, 0.5, 3), mlx_optimizers.cosine_decay(0.5, 9)], [3]
        ),
    ):
        optimizer, params = make("Adagrad", values, learning_rate=schedule)
        peer = MlxRun("Adagrad", values, torch.float32, learning_rate=schedule)
        for now in grads:
            step(optimizer, params, now)
            peer.step(now)
            assert optimizer.learning_rate == pytest.approx(
                float(mx.array(peer.optimizer.learning_rate).item()), rel=1e-6
            )
        for param, value in zip(params, peer.params, strict=True):
            torch.testing.assert_close(param.detach(), value, rtol=1e-5, atol=1e-5)


def test_every_step_counts_and_the_callable_is_asked_on_the_count_before():
    seen = []

    def schedule(count):
        seen.append(count)
        return 1.0 / (1 + count)

    optimizer, (param, other) = make("AdaDelta", [torch.ones(2), torch.ones(2)], learning_rate=schedule)
    peer = mlx_optimizers.AdaDelta(learning_rate=0.1)
    step(optimizer, [param, other], [torch.ones(2), None])
    step(optimizer, [param, other], [None, None])
    peer.apply_gradients({"w": mx.ones(2)}, {"w": mx.ones(2)})
    peer.apply_gradients({}, {})
    assert optimizer.steps == peer.step.item() == 2
    assert seen == [0, 0, 1]
    assert optimizer.learning_rate == 0.5
    assert len(optimizer.state[other]) == 0
    with pytest.raises(TypeError, match="would put its own value back"):
        optimizer.learning_rate = 0.1
    optimizer.param_groups[0]["lr"] = 7.0
    with pytest.raises(
        TypeError, match=r"lr was set to 7\.0, but this optimizer's learning rate is a schedule"
    ):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdaDelta", {"rho": -0.5}),
        ("AdaDelta", {"eps": 0.0}),
        ("AdaDelta", {"rho": -1, "eps": -1e-3}),
        ("Adagrad", {"eps": 0}),
        ("Adagrad", {"eps": -1.0}),
    ],
)
def test_ranges_are_refused_in_mlx_words(name, options):
    with pytest.raises(ValueError) as theirs:
        getattr(mlx_optimizers, name)(learning_rate=0.1, **options)
    with pytest.raises(ValueError) as ours:
        make(name, [torch.ones(1)], learning_rate=0.1, **options)
    assert str(ours.value) == str(theirs.value)


def test_what_mlx_lets_pass_passes():
    for options in ({"rho": 1.5}, {"learning_rate": -1.0}, {"learning_rate": 1}):
        options = {"learning_rate": 0.1, **options}
        mlx_optimizers.AdaDelta(**options)
        make("AdaDelta", [torch.ones(1)], **options)
    with pytest.raises(TypeError, match="learning_rate"):
        terms.AdaDelta([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(TypeError, match=r"MLX has no rule for torch\.complex64"):
        make("Adagrad", [torch.ones(1)], torch.complex64, learning_rate=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_dtype", [None, "param"])
@pytest.mark.parametrize("name", RULES)
def test_a_loaded_state_dict_continues_bit_for_bit(name, dtype, state_dtype):
    values, grads = data(dtype, steps=6)
    options = {"learning_rate": 0.25, "state_dtype": state_dtype}
    optimizer, params = make(name, values, dtype, **options)
    for now in grads[:3]:
        step(optimizer, params, now)
    second, second_params = make(name, params, dtype, **{**options, "learning_rate": 1.0})
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    third, third_params = pickle.loads(pickle.dumps((optimizer, params)))
    for now in grads[3:]:
        for some, its_params in ((optimizer, params), (second, second_params), (third, third_params)):
            step(some, its_params, now)
    expected = torch.float32 if state_dtype is None else dtype
    for k, param in enumerate(params):
        for some, its_params in ((second, second_params), (third, third_params)):
            assert torch.equal(param, its_params[k])
            for state, value in optimizer.state[param].items():
                assert value.dtype == some.state[its_params[k]][state].dtype == expected
                assert torch.equal(value, some.state[its_params[k]][state])
    assert second.steps == third.steps == optimizer.steps == 6
    torchs = torch.optim.Adadelta(params)
    with pytest.raises(ValueError, match="no 'step' in its param groups, so it is not in MLX's terms"):
        optimizer.load_state_dict(torchs.state_dict())


def test_it_is_a_torch_optimizer():
    values = [torch.ones(2), torch.ones(3)]
    params = [torch.nn.Parameter(value) for value in values]
    groups = [{"params": [params[0]], "rho": 0.5}, {"params": [params[1]], "lr": 0.25}]
    optimizer = terms.AdaDelta(groups, 1.0)
    assert isinstance(optimizer, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = sum(param.square().sum() for param in params)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    scheduler.step()
    assert optimizer.step(closure) < first
    assert calls == ["pre", "post"] * 2
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.125]
    assert [group["step"] for group in optimizer.param_groups] == [2, 2]
    optimizer.learning_rate = 0.75
    assert [group["lr"] for group in optimizer.param_groups] == [0.75, 0.75]
