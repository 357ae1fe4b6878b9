"""torch's own optimizer inputs, error inputs and behaviours, on both classes, fused and not."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import sys
import types
import warnings

import pytest
import torch

from pushstep.optim import Adadelta, Adagrad

OURS = {"Adadelta": Adadelta, "Adagrad": Adagrad}
TORCHS = {"Adadelta": torch.optim.Adadelta, "Adagrad": torch.optim.Adagrad}
# how many inputs torch has for each
INPUTS = {"Adadelta": 6, "Adagrad": 7}
PATHS = [
    {},
    {"fused": True},
    {"fused": False},
    {"foreach": True},
    {"foreach": False},
]


@functools.cache
def torchs_tests():
    """What torch tests its own with. Importing it takes 2 s, which each process that collects these tests would pay, too."""
    if (
        "expecttest" not in sys.modules
    ):  # torch's test package imports it for a base class that is not used here
        try:
            import expecttest  # noqa: F401
        except ImportError:
            import unittest

            sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_optimizers
    return common_optimizers


def info_of(name):
    (found,) = (info for info in torchs_tests().optim_db if info.name == name)
    return found


@functools.cache
def inputs_of(name):
    return info_of(name).optim_inputs_func(device="cpu")


@pytest.mark.parametrize("name", OURS)
def test_each_of_torchs_inputs_is_tried(name):
    assert len(inputs_of(name)) == INPUTS[name]
    assert info_of(name).optim_cls is TORCHS[name]


def _model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def _train(model, optimizer, steps=5, dtype=torch.float32):
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(6, 4, dtype=dtype)).square().mean()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name in OURS for number in range(INPUTS[name])]
)
@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_parameters_and_state_as_torch(name, number, path, dtype):
    given = inputs_of(name)[number]
    mine, torchs = _model().to(dtype), _model().to(dtype)
    ours = OURS[name](mine.parameters(), **copy.deepcopy(given.kwargs), **path)
    theirs = TORCHS[name](torchs.parameters(), **copy.deepcopy(given.kwargs))
    _train(mine, ours, dtype=dtype)
    _train(torchs, theirs, dtype=dtype)
    for p, q in zip(mine.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        a, b = ours.state[p], theirs.state[q]
        assert list(a) == list(b)
        torch.testing.assert_close(dict(a), dict(b))
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert group.keys() - {"fused"} == other.keys() - {"fused"}
    extra = {"fused"} if name == "Adadelta" else set()
    assert set(ours.state_dict()["param_groups"][0]) == set(theirs.state_dict()["param_groups"][0]) | extra


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_torchs_error_inputs(name, path):
    for error in info_of(name).optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = error.optimizer_error_input
        params = given.params if given.params is not None else [torch.nn.Parameter(torch.randn(2))]
        kwargs = {**given.kwargs, **path}
        if error.error_on is not torchs_tests().OptimizerErrorEnum.CONSTRUCTION_ERROR:
            continue
        if issubclass(error.error_type, Warning):
            with pytest.warns(error.error_type, match=error.error_regex):
                OURS[name](params, **kwargs)
        else:
            with pytest.raises(error.error_type, match=error.error_regex):
                OURS[name](params, **kwargs)


@pytest.mark.parametrize("name", OURS)
def test_the_error_texts_of_hyperparameters_are_torchs(name):
    bad = [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"eps": -1.0},
        {"weight_decay": -0.1},
        {"rho": 1.5},
        {"rho": -0.5},
        {"lr_decay": -1.0},
        {"initial_accumulator_value": -2.0},
        {"lr": torch.tensor(-3.0)},
        {"lr": torch.ones(2)},
    ]
    ours, theirs = OURS[name], TORCHS[name]
    for kwargs in bad:
        with pytest.raises((ValueError, TypeError)) as expected:
            theirs([torch.zeros(1, requires_grad=True)], **kwargs)
        with pytest.raises(expected.type) as got:
            ours([torch.zeros(1, requires_grad=True)], **kwargs)
        if expected.type is ValueError:
            assert str(got.value) == str(expected.value)
            if not isinstance(kwargs.get("lr"), torch.Tensor):
                with pytest.raises(ValueError) as cheap:
                    ours.rule.validate(kwargs)
                assert str(cheap.value) == str(expected.value)
    with pytest.raises(KeyError, match="momentum"):
        ours.rule.validate({"momentum": 0.9})
    ours([torch.zeros(1, requires_grad=True)], lr=float("inf"))


def test_fused_refuses_what_torch_refuses():
    p = torch.nn.Parameter(torch.randn(3))
    for make in OURS.values():
        with pytest.raises(RuntimeError, match="`fused` does not support `differentiable`"):
            make([p], fused=True, differentiable=True)
        with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
            make([p], fused=True, foreach=True)
        c = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))
        c.grad = torch.randn(3, dtype=torch.complex64)
        optimizer = make([c], fused=True)
        with pytest.raises(RuntimeError, match="requires all the params to be floating point Tensors"):
            optimizer.step()
    p.grad = torch.randn(3)
    with pytest.raises(
        AssertionError, match="If capturable=True, params and state_steps must be on supported"
    ):
        Adadelta([p], capturable=True).step()
    with pytest.raises(AssertionError, match="don't support autograd"):
        Adadelta([p], foreach=True, differentiable=True).step()


@pytest.mark.parametrize("name", OURS)
def test_complex_parameters_take_torchs_path(name):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5, dtype=torch.complex64))
    r = torch.nn.Parameter(torch.randn(5))
    q, s = (torch.nn.Parameter(x.detach().clone()) for x in (p, r))
    ours, theirs = OURS[name]([p, r]), TORCHS[name]([q, s])
    for _ in range(3):
        p.grad, r.grad = torch.randn(5, dtype=torch.complex64), torch.randn(5)
        q.grad, s.grad = p.grad.clone(), r.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close((p, r), (q, s))
    assert not ours.path(p).fused
    assert "complex64" in ours.path(p).reason
    assert ours.path(r) == ("cpu", "cpu kernels")


@pytest.mark.parametrize("name", OURS)
def test_a_missing_gradient_is_skipped_and_a_zero_gradient_steps(name):
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = OURS[name]([p, q])
    p.grad = torch.zeros(3)
    optimizer.step()
    assert optimizer.state[p]["step"] == 1
    assert optimizer.state[q].get("step", 0) == 0


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("direction", ["torch to ours", "ours to torch", "ours to ours"])
def test_state_dicts_cross_over(name, direction):
    makes = {"torch": TORCHS[name], "ours": OURS[name]}
    first, second = (makes[word] for word in direction.split(" to "))
    a, b = _model(), _model()
    one = first(a.parameters(), lr=0.5)
    _train(a, one)
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    b.load_state_dict(a.state_dict())
    two = second(b.parameters())
    two.load_state_dict(torch.load(buffer, weights_only=True))
    assert two.param_groups[0]["lr"] == 0.5
    _train(a, one)
    _train(b, two)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        assert one.state[p]["step"] == two.state[q]["step"] == 10


@pytest.mark.parametrize("name", OURS)
def test_loading_a_wrong_state_dict_raises_torchs_errors(name):
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = OURS[name]([p])
    two_groups = OURS[name]([{"params": [p]}, {"params": [q]}]).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(two_groups)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(OURS[name]([p, q]).state_dict())
    p.grad = torch.ones(3)
    optimizer.step()


@pytest.mark.parametrize("name", OURS)
def test_a_state_of_another_shape_is_refused_before_memory_is_touched(name):
    p, q = torch.nn.Parameter(torch.ones(7)), torch.nn.Parameter(torch.ones(3))
    small = OURS[name]([q])
    q.grad = torch.ones(3)
    small.step()
    optimizer = OURS[name]([p])
    optimizer.load_state_dict(small.state_dict())  # torch does not look at shapes here
    p.grad = torch.ones(7)
    with pytest.raises(RuntimeError, match=r"state has shape \(3,\), its parameter \(7,\)"):
        optimizer.step()
    assert (p == 1).all()


@pytest.mark.parametrize("name", OURS)
def test_pickle_and_deepcopy_keep_options_and_hooks_work_after(name):
    p = torch.nn.Parameter(torch.ones(4, 3))
    p.grad = torch.ones(4, 3)
    optimizer = OURS[name]([p], row_wise=True, state_dtype="param")
    optimizer.step()
    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert (twin.row_wise, twin.state_dtype) == (True, "param")
        called = []
        twin.register_step_post_hook(lambda *_, called=called: called.append(1))
        (q,) = twin.param_groups[0]["params"]
        q.grad = torch.ones(4, 3)
        twin.step()
        assert called == [1]
        assert twin.state[q]["step"] == 2
    assert optimizer.state[p]["step"] == 1


@pytest.mark.parametrize("name", OURS)
def test_an_old_pickle_without_the_new_keys(name):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = OURS[name]([p])
    optimizer.step()
    state = optimizer.__getstate__()
    for key in ("state_dtype", "row_wise", "sparse"):
        del state[key]
    for group in state["param_groups"]:
        for key in ("fused", "foreach", "maximize", "differentiable"):
            del group[key]
    state["state"][p]["step"] = 1.0
    twin = OURS[name].__new__(OURS[name])
    twin.__setstate__(state)
    twin.step()
    assert twin.state[p]["step"] == 2
    assert twin.param_groups[0]["fused"] is None


@pytest.mark.parametrize("name", OURS)
def test_add_param_group_named_parameters_and_share_memory(name):
    model = _model()
    named = list(model.named_parameters())
    optimizer = OURS[name](named[:2], lr=0.1)
    optimizer.add_param_group({"params": named[2:], "lr": 0.2})
    _train(model, optimizer, steps=2)
    assert optimizer.state_dict()["param_groups"][1]["param_names"] == ["2.weight", "2.bias"]
    optimizer.share_memory()
    for p in model.parameters():
        for key in optimizer.rule.state_names:
            assert optimizer.state[p][key].is_shared()
    _train(model, optimizer, steps=2)  # the shared states have moved: nothing may write where they lay
    assert all(optimizer.state[p]["step"] == 4 for p in model.parameters())


@pytest.mark.parametrize("name", OURS)
def test_parameters_given_other_data_between_steps(name):
    p = torch.nn.Parameter(torch.ones(1000))
    optimizer = OURS[name]([p])
    reference = torch.nn.Parameter(torch.ones(1000))
    other = TORCHS[name]([reference])
    for k in range(4):
        p.grad, reference.grad = torch.full((1000,), k + 1.0), torch.full((1000,), k + 1.0)
        optimizer.step()
        other.step()
        p.data = p.data.clone()
        optimizer.state[p] = {key: value.clone() for key, value in optimizer.state[p].items()}
        torch.testing.assert_close(p, reference)


@pytest.mark.parametrize("name", OURS)
def test_torch_compile_traces_torchs_path(name):
    p = torch.nn.Parameter(torch.ones(16))
    q = torch.nn.Parameter(torch.ones(16))
    optimizer, other = OURS[name]([p]), TORCHS[name]([q])
    p.grad, q.grad = torch.randn(16, generator=torch.manual_seed(1)), None
    q.grad = p.grad.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(optimizer.step, backend="eager")()
    other.step()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("scheduler", ["StepLR", "ExponentialLR", "ReduceLROnPlateau"])
def test_schedulers_steer(name, scheduler):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = OURS[name]([p], lr=1.0)
    given = {
        "StepLR": {"step_size": 1, "gamma": 0.5},
        "ExponentialLR": {"gamma": 0.5},
        "ReduceLROnPlateau": {},
    }
    schedule = getattr(torch.optim.lr_scheduler, scheduler)(optimizer, **given[scheduler])
    p.grad = torch.ones(3)
    optimizer.step()
    before = p.detach().clone()
    if scheduler == "ReduceLROnPlateau":
        for _ in range(12):
            schedule.step(1.0)
    else:
        schedule.step()
    assert optimizer.param_groups[0]["lr"] < 1.0
    optimizer.step()
    assert not torch.equal(p, before)


def test_the_closure_runs_once_with_gradients_enabled():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Adadelta([p])
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert calls == [True]
    assert optimizer.state[p]["step"] == 1


def test_a_step_between_forward_and_backward_is_noticed():
    for make in OURS.values():
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = make([p])
        p.grad = torch.ones(3)
        loss = (p * p).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_differentiable_lets_gradients_through():
    for make in OURS.values():
        start = torch.ones(3, requires_grad=True)
        p = start.clone()
        p.retain_grad()
        optimizer = make([p], differentiable=True, lr=torch.tensor(0.1))
        p.grad = torch.ones(3)
        optimizer.step()
        assert p.grad_fn is not None
