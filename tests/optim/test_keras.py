"""Keras's terms against the real Keras: values, order of operations, errors; and what torch adds to them."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch

from pushstep.optim import keras as terms
from tests.support.numbers.optimizer_peers import KerasRun, keras
from tests.support.numbers.parity_table import KERAS as OPTIONS

RULES = ("Adadelta", "Adagrad")
SHAPES = ((67, 113), (1031,), ())


def make(name, values, dtype=torch.float32, **options):
    params = [torch.nn.Parameter(value.clone().to(dtype)) for value in values]
    return getattr(terms, name)(params, **options), params


def step(optimizer, params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.to(param.dtype)
    optimizer.step()


def one(name, value=1.0, dtype=torch.float64, **options):
    optimizer, (param,) = make(name, [torch.full((1,), value)], dtype, **options)
    return optimizer, param


def data(dtype=torch.float32, steps=20, missing=False):
    """Values and gradients that `dtype` holds exactly. With `missing`, the second has none now and then."""
    torch.manual_seed(11)
    values = [torch.randn(shape).to(dtype) for shape in SHAPES]
    grads = []
    for k in range(steps):
        grads.append([(torch.randn(shape) * (0.1 + k % 3)).to(dtype) for shape in SHAPES])
        if missing and k % 4 in (1, 2):
            grads[-1][1] = None
    return values, grads


def quietly(run, grads):
    """A step of the real Keras, which warns when a gradient is missing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Gradients do not exist", UserWarning)
        run.step(grads)


def test_golden_values_of_keras_own_tests():
    optimizer, (param,) = make("Adadelta", [torch.ones(10)], learning_rate=1.0, rho=0.8, epsilon=1e-6)
    grads = [torch.full((10,), 0.01), *[torch.arange(0.1, 1.05, 0.1)] * 4]
    for grad, expected in zip(grads, (0.9978, 0.9947, 0.9915, 0.9882, 0.9849), strict=True):
        step(optimizer, [param], [grad])
        torch.testing.assert_close(param.detach(), torch.full((10,), expected), rtol=0, atol=5e-4)
    optimizer, param = one("Adadelta", 2.0, learning_rate=1.0, weight_decay=0.004)
    for _ in range(3):
        step(optimizer, [param], [torch.zeros(1)])
    assert param.item() == pytest.approx(1.9760959, rel=1e-6)


def clipped(grads, options):
    """Gradients clipped by the formulas, and what is then left of the options.

    Keras rounds a norm to float32 when it compares it with the limit, whatever the gradients are.
    """
    rest = dict(options)
    own, overall = rest.pop("clipnorm", None), rest.pop("global_clipnorm", None)
    grads = [None if g is None else g.double() / rest.get("loss_scale_factor", 1.0) for g in grads]
    norms = [torch.zeros(()) if g is None else g.norm() for g in grads]
    if own is not None:
        limits = [own / max(norm, own) for norm in norms]
    else:
        norm = torch.stack([n.double() for n in norms]).norm()
        limits = [1.0 if overall is None else overall / max(norm, overall)] * len(grads)
    grads = [None if g is None else g * limit for g, limit in zip(grads, limits, strict=True)]
    rest.pop("loss_scale_factor", None)
    return grads, rest


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", RULES)
def test_float64_is_keras_float64(name, options):
    values, grads = data(missing=True)
    options = {"learning_rate": 0.3, **OPTIONS[options]}
    exact = "gradient_accumulation_steps" not in options or "global_clipnorm" not in options
    theirs = clipped(grads[0], options)[1] if exact else options
    optimizer, params = make(name, values, torch.float64, **options)
    peer = KerasRun(name, values, torch.float64, **theirs)
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if exact else {"rtol": 1e-5, "atol": 1e-6}
    for now in grads:
        step(optimizer, params, now)
        quietly(peer, clipped(now, options)[0] if exact else now)
        for param, value in zip(params, peer.params, strict=True):
            torch.testing.assert_close(param.detach(), value.detach(), **tolerance)
    for param, states in zip(params, peer.states, strict=True):
        assert optimizer.state[param].keys() == states.keys()
        for state, value in states.items():
            torch.testing.assert_close(optimizer.state[param][state], value.detach(), **tolerance)
    assert optimizer.iterations == int(peer.optimizer.iterations)


# ---- errors --------------------------------------------------------------------------------------------------

BAD = [
    {"learning_rate": 1},
    {"learning_rate": "fast"},
    {"learning_rate": None},
    {"gradient_accumulation_steps": 1},
    {"gradient_accumulation_steps": -3},
    {"use_ema": True, "ema_momentum": 1.5},
    {"use_ema": True, "ema_momentum": -0.1},
    {"use_ema": True, "ema_overwrite_frequency": 2.5},
    {"use_ema": True, "ema_overwrite_frequency": -1},
    {"clipnorm": 1.0, "clipvalue": 0.0},
    {"clipnorm": 1.0, "global_clipnorm": 2.0, "clipvalue": 3.0},
    {"momentum": 0.9, "nesterov": True},
]


@pytest.mark.parametrize("options", BAD, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_constructors_refuse_what_keras_refuses_in_its_words(name, options):
    with pytest.raises(ValueError) as theirs:
        getattr(keras.optimizers, name)(**options)
    with pytest.raises(ValueError) as ours:
        one(name, **options)
    assert str(ours.value) == str(theirs.value)


def test_what_keras_lets_pass_passes():
    one("Adadelta", ema_momentum=7.0, ema_overwrite_frequency=-2, gradient_accumulation_steps=0)
    for options in ({"rho": -1.0}, {"epsilon": 0.0}, {"clipnorm": -1.0}):
        keras.optimizers.Adadelta(**options)
        one("Adadelta", **options)
    with pytest.warns(UserWarning, match="Argument `decay` is no longer supported and will be ignored."):
        one("Adagrad", decay=0.1)


def test_apply_refuses_what_keras_refuses_in_its_words():
    values = [torch.ones(2), torch.ones(3)]
    optimizer, params = make("Adagrad", values)
    peer = KerasRun("Adagrad", values, torch.float32)
    for grads in ([torch.ones(2)], [None, None]):
        with pytest.raises(ValueError) as theirs:
            peer.optimizer.apply(grads)
        with pytest.raises(ValueError) as ours:
            optimizer.apply(grads)
        assert str(ours.value) == str(theirs.value)
    with pytest.raises(ValueError, match=r"Unknown variable: .*This optimizer can only be called for the va"):
        optimizer.apply([torch.ones(2)], [torch.ones(2)])
    assert optimizer.iterations == 0
    assert optimizer.apply([]) is None
    with pytest.warns(UserWarning, match=r"Gradients do not exist for variables \['0.1'\] when minimizing"):
        optimizer.apply([torch.ones(2), None])
    assert optimizer.iterations == 1
    with pytest.raises(ValueError) as theirs:
        ema = KerasRun("Adagrad", values, torch.float32, use_ema=True)
        ema.optimizer.finalize_variable_values(ema.variables[:1])
    optimizer, params = make("Adagrad", values, use_ema=True)
    with pytest.raises(ValueError) as ours:
        optimizer.finalize_variable_values(params[:1])
    assert str(ours.value) == str(theirs.value)


def test_apply_takes_gradients_and_leaves_grad_alone():
    optimizer, (a, b) = make("Adadelta", [torch.ones(2), torch.ones(3)])
    other, (c, d) = make("Adadelta", [torch.ones(2), torch.ones(3)])
    kept = b.grad = torch.full((3,), 7.0)
    assert optimizer.apply_gradients([(torch.ones(2), a)]) == 1
    assert a.grad is None
    assert b.grad is kept
    c.grad = torch.ones(2)
    other.step()
    assert torch.equal(a, c)
    assert torch.equal(b, d)
    optimizer.apply([torch.ones(2, dtype=torch.float64), torch.zeros(3)])
    assert optimizer.iterations == 2


# ---- order of operations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_bad_element_is_clipped_as_keras_clips_it(bad):
    values = [torch.ones(3), torch.ones(2)]
    grads = [torch.tensor([1.0, bad, 2.0]), torch.tensor([3.0, 4.0])]
    for options in ({"clipnorm": 1.0}, {"global_clipnorm": 1.0}, {"clipvalue": 1.0}):
        optimizer, params = make("Adagrad", values, **options)
        peer = KerasRun("Adagrad", values, torch.float32, **options)
        step(optimizer, params, grads)
        peer.step(grads)
        for param, theirs in zip(params, peer.params, strict=True):
            torch.testing.assert_close(param.detach(), theirs.detach(), equal_nan=True)


def test_a_norm_too_large_for_float32_clips_instead_of_vanishing():
    optimizer, params = make("Adagrad", [torch.ones(2)], learning_rate=1.0, clipnorm=1.0)
    step(optimizer, params, [torch.tensor([3e25, 4e25])])
    expected = 1 - torch.tensor([0.6, 0.8]) / torch.tensor([0.46, 0.74]).sqrt()
    torch.testing.assert_close(params[0].detach(), expected)


def test_gradients_are_not_written_to():
    accumulating = {**OPTIONS["accumulation, all else"], "loss_scale_factor": 3.0}
    for options in (accumulating, {"loss_scale_factor": 1024.0, "clipvalue": 0.5}):
        optimizer, params = make("Adadelta", [torch.ones(4)], **options)
        for _ in range(3):
            params[0].grad = torch.arange(4.0)
            optimizer.step()
            assert torch.equal(params[0].grad, torch.arange(4.0))


def test_the_average_first_copies_and_finalize_writes_it():
    optimizer, (param,) = make("Adagrad", [torch.ones(5)], learning_rate=0.5, use_ema=True, ema_momentum=0.9)
    optimizer.finalize_variable_values()
    assert torch.equal(param.detach(), torch.ones(5))
    step(optimizer, [param], [torch.ones(5)])
    assert torch.equal(optimizer.state[param]["average"], param)
    first = param.detach().clone()
    step(optimizer, [param], [torch.ones(5)])
    second = param.detach().clone()
    elsewhere = torch.nn.Parameter(torch.zeros(5))
    optimizer.finalize_variable_values([elsewhere])
    torch.testing.assert_close(elsewhere.detach(), 0.9 * first + 0.1 * second)
    assert torch.equal(param, second)
    optimizer.finalize_variable_values()
    assert torch.equal(param, elsewhere)


def test_a_parameter_that_joins_late_is_averaged_from_itself():
    optimizer, (param,) = make("Adagrad", [torch.ones(2)], use_ema=True)
    step(optimizer, [param], [torch.ones(2)])
    late = torch.nn.Parameter(torch.full((2,), 5.0))
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    assert [group["iterations"] for group in optimizer.param_groups] == [1, 1]
    step(optimizer, [param, late], [torch.ones(2), None])
    torch.testing.assert_close(optimizer.state[late]["average"], torch.full((2,), 5.0))


def test_only_the_accumulators_of_this_micro_step_are_applied_and_all_are_cleared():
    values, grads = [torch.ones(2), torch.ones(2)], [torch.ones(2), torch.ones(2)]
    optimizer, params = make("Adagrad", values, gradient_accumulation_steps=2)
    peer = KerasRun("Adagrad", values, torch.float32, gradient_accumulation_steps=2)
    for now in (grads, [torch.ones(2), None], grads, grads):
        step(optimizer, params, now)
        quietly(peer, now)
    for param, theirs in zip(params, peer.params, strict=True):
        torch.testing.assert_close(param.detach(), theirs.detach())
    assert optimizer.iterations == int(peer.optimizer.iterations) == 2


def test_excluded_parameters_do_not_decay():
    torch.manual_seed(0)
    values = [torch.randn(4), torch.randn(3), torch.randn(2)]
    grads = [torch.randn_like(value) for value in values]
    names = ["dense.kernel", "dense.bias", "norm.scale"]
    params = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer = terms.Adagrad(zip(names, params, strict=True), learning_rate=0.5, weight_decay=0.25)
    with pytest.raises(ValueError, match="needs parameters with names"):
        terms.Adagrad(params).exclude_from_weight_decay(var_names=["bias"])
    peer = KerasRun("Adagrad", values, torch.float32, learning_rate=0.5, weight_decay=0.25)
    for now in (
        lambda o, p: None,
        lambda o, p: o.exclude_from_weight_decay(var_list=[p[0]]),
        lambda o, p: o.exclude_from_weight_decay(var_list=[p[2]], var_names=["bias$|_1", "embed"]),
        lambda o, p: o.exclude_from_weight_decay(),
    ):
        now(optimizer, params)
        now(peer.optimizer, peer.variables)
        step(optimizer, params, grads)
        peer.step(grads)
        for param, theirs in zip(params, peer.params, strict=True):
            torch.testing.assert_close(param.detach(), theirs.detach())


# ---- learning rates ------------------------------------------------------------------------------------------


def test_schedules_see_the_micro_steps_taken_before():
    schedules = keras.optimizers.schedules
    values, grads = data(steps=8)
    for schedule in (
        schedules.ExponentialDecay(0.5, 2, 0.5),
        schedules.PiecewiseConstantDecay([2, 5], [0.5, 0.25, 0.125]),
        schedules.CosineDecay(0.5, 6, warmup_target=1.0, warmup_steps=3),
    ):
        for options in ({}, {"gradient_accumulation_steps": 3}, {"weight_decay": 0.1}):
            optimizer, params = make("Adagrad", values, learning_rate=schedule, **options)
            peer = KerasRun("Adagrad", values, torch.float32, learning_rate=schedule, **options)
            for now in grads:
                assert optimizer.learning_rate == pytest.approx(float(peer.optimizer.learning_rate))
                step(optimizer, params, now)
                peer.step(now)
            for param, theirs in zip(params, peer.params, strict=True):
                torch.testing.assert_close(param.detach(), theirs.detach(), rtol=1e-5, atol=1e-5)


def test_a_schedule_may_be_any_object_called_with_the_step():
    seen = []

    class Mine:
        def __call__(self, step):
            seen.append(step)
            return 1.0 / (step + 1)

    optimizer, param = one("Adadelta", learning_rate=Mine())
    for _ in range(3):
        step(optimizer, [param], [torch.ones(1)])
    assert seen == [0, 0, 1, 2]
    assert optimizer.param_groups[0]["lr"] == 1.0 / 3


def test_a_callable_without_arguments_is_asked_once_an_update():
    rates = iter([9.0, 0.5, 0.25])
    optimizer, param = one(
        "Adagrad", learning_rate=lambda: next(rates), weight_decay=0.1, gradient_accumulation_steps=2
    )
    for _ in range(4):
        step(optimizer, [param], [torch.ones(1)])
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_setting_the_learning_rate():
    optimizer, param = one("Adagrad", learning_rate=0.5)
    optimizer.learning_rate = 2
    assert optimizer.learning_rate == 2.0 == optimizer.param_groups[0]["lr"]
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
    optimizer.learning_rate = schedule
    step(optimizer, [param], [torch.ones(1)])
    assert optimizer.learning_rate == 0.25
    theirs = keras.optimizers.Adagrad(schedule)
    with pytest.raises(TypeError) as refused:
        theirs.learning_rate = 0.1
    with pytest.raises(TypeError) as ours:
        optimizer.learning_rate = 0.1
    assert str(ours.value) == str(refused.value)
    optimizer.learning_rate = lambda: 0.75
    assert optimizer.learning_rate == 0.75


def test_torch_schedulers_steer_a_number_and_are_refused_beside_a_schedule():
    optimizer, param = one("Adagrad", learning_rate=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(3):
        step(optimizer, [param], [torch.ones(1)])
        scheduler.step()
    assert optimizer.learning_rate == 0.125
    optimizer, param = one("Adagrad", learning_rate=lambda count: 1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    step(optimizer, [param], [torch.ones(1)])
    scheduler.step()
    with pytest.raises(TypeError, match=r"lr was set to 0.5, but this optimizer's learning rate is a sched"):
        step(optimizer, [param], [torch.ones(1)])
    with pytest.raises(ValueError, match="cannot have an lr of its own"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 1.0})


# ---- as a torch optimizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_a_loaded_state_dict_continues_bit_for_bit(name, dtype):
    values, grads = data(steps=9)
    options = {**OPTIONS["accumulation, all else"], "learning_rate": 0.5}
    optimizer, params = make(name, values, dtype, **options)
    for now in grads[:5]:  # in the middle of an accumulation
        step(optimizer, params, now)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second, second_params = make(name, params, dtype, **{**options, "learning_rate": 0.001})
    second.load_state_dict(torch.load(file))
    third, third_params = pickle.loads(pickle.dumps((optimizer, params)))
    fourth, fourth_params = copy.deepcopy((optimizer, params))
    for now in grads[5:]:
        for some, their_params in (
            (optimizer, params),
            (second, second_params),
            (third, third_params),
            (fourth, fourth_params),
        ):
            step(some, their_params, now)
    for k, param in enumerate(params):
        for some, their_params in ((second, second_params), (third, third_params), (fourth, fourth_params)):
            assert torch.equal(param, their_params[k])
            assert some.state[their_params[k]].keys() == optimizer.state[param].keys()
            for state, value in optimizer.state[param].items():
                assert value.dtype == some.state[their_params[k]][state].dtype == torch.float32
                assert torch.equal(value, some.state[their_params[k]][state])
    assert second.iterations == third.iterations == optimizer.iterations == 4


def test_a_state_dict_that_does_not_fit_is_refused():
    values = [torch.ones(3)]

    def stepped(cls=terms.Adadelta, **options):
        params = [torch.nn.Parameter(value.clone()) for value in values]
        optimizer = cls(params, **options)
        step(optimizer, params, values)
        return optimizer

    plain, averaging = stepped(), stepped(use_ema=True)
    accumulating = stepped(gradient_accumulation_steps=2)
    for saved, target, why in (
        (stepped(torch.optim.Adadelta), plain, "no 'iterations'.*conversion"),
        (averaging, plain, "holds .*'average'.*; this optimizer's settings keep"),
        (plain, averaging, "this optimizer's settings keep .*'average'"),
        (accumulating, plain, "gradient_accumulation_steps=2, this optimizer with None"),
        (stepped(terms.Adagrad), plain, "accumulator"),
    ):
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(ValueError, match=why):
            target.load_state_dict(saved.state_dict())
        torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0)


def test_it_is_a_torch_optimizer():
    torch.manual_seed(2)
    model = torch.nn.Linear(4, 1)
    optimizer = terms.Adadelta(
        [{"params": [model.weight], "rho": 0.5, "weight_decay": 0.25}, {"params": [model.bias]}],
        learning_rate=1.0,
        loss_scale_factor=1024.0,
    )
    assert isinstance(optimizer, torch.optim.Optimizer)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = optimizer.scale_loss(model(torch.ones(2, 4)).square().sum())
        loss.backward()
        return loss

    optimizer.share_memory()
    assert all(held.is_shared() for state in optimizer.state.values() for held in state.values())
    first, version = optimizer.step(closure), model.weight._version
    assert optimizer.step(closure) < first
    assert model.weight._version > version
    assert calls == ["pre", "post"] * 2
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.iterations == 2  # no gradient anywhere: nothing happened
    assert [group["rho"] for group in optimizer.param_groups] == [0.5, 0.95]


def test_a_grad_scaler_leaves_out_steps_with_infinities():
    optimizer, (param,) = make("Adagrad", [torch.ones(2)], use_ema=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.iterations == 2
    assert torch.isfinite(param).all()


def test_other_layouts_and_kinds_of_gradients():
    torch.manual_seed(4)
    value, grad = torch.randn(6, 8), torch.randn(8, 6).t()
    optimizer, (param,) = make("Adadelta", [value], use_ema=True, learning_rate=1.0)
    other, (like,) = make("Adadelta", [value], use_ema=True, learning_rate=1.0)
    for _ in range(2):
        param.grad, like.grad = grad, grad.contiguous()
        optimizer.step()
        other.step()
    assert torch.equal(param, like)
    table = torch.nn.Embedding(7, 3, sparse=True)
    whole = copy.deepcopy(table)
    whole.sparse = False
    for layer in (table, whole):
        layer(torch.tensor([1, 5, 5])).sum().backward()
        terms.Adagrad(layer.parameters(), weight_decay=0.1, learning_rate=1.0).step()
    assert torch.equal(table.weight, whole.weight)
    with pytest.raises(TypeError, match=r"Keras has no rule for torch\.complex64"):
        terms.Adagrad([torch.nn.Parameter(torch.ones(1, dtype=torch.complex64))])
    empty, _ = make("Adadelta", [torch.zeros(0, 3)], clipnorm=1.0)
    empty.apply([torch.zeros(0, 3)])
    insisting, (param,) = make("Adagrad", [torch.ones(1)], fused=True)
    param.grad = torch.ones(1).as_subclass(Sub)
    with pytest.raises(RuntimeError, match=r"fused=True, but no kernel takes this step: .*subclass"):
        insisting.step()
    with pytest.raises(ValueError, match="Invalid state_dtype value: 'float32'"):
        make("Adagrad", [value], state_dtype="float32")


class Sub(torch.Tensor):
    pass
