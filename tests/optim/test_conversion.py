"""State in other terms: what carries over carries over bit for bit, what does not is refused with its reason."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from pushstep.optim import Adadelta, Adagrad, conversion, mlx
from pushstep.optim import keras as keras
from pushstep.optim.conversion import ConversionError, convert, differences

SHAPES = ((3, 4), (5,), ())
ADADELTAS = {
    "torch": lambda p, **o: Adadelta(p, **o),
    "plain torch": lambda p, **o: torch.optim.Adadelta(p, **o),
    "Keras": lambda p, **o: keras.Adadelta(p, **{"learning_rate": 0.5, **o}),
    "MLX": lambda p, **o: mlx.AdaDelta(p, **{"learning_rate": 0.5, **o}),
}
ADAGRADS = {
    "torch": lambda p, **o: Adagrad(p, **o),
    "plain torch": lambda p, **o: torch.optim.Adagrad(p, **o),
    "Keras": lambda p, **o: keras.Adagrad(p, **{"learning_rate": 0.5, **o}),
    "MLX": lambda p, **o: mlx.Adagrad(p, **{"learning_rate": 0.5, **o}),
}
NAMES = {
    "adadelta": {
        "torch": ("square_avg", "acc_delta"),
        "plain torch": ("square_avg", "acc_delta"),
        "Keras": ("accumulated_grad", "accumulated_delta_var"),
        "MLX": ("v", "u"),
    },
    "adagrad": {"torch": ("sum",), "plain torch": ("sum",), "Keras": ("accumulator",), "MLX": ("v",)},
}
RULES = {"adadelta": ADADELTAS, "adagrad": ADAGRADS}
PAIRS = list(itertools.permutations(ADADELTAS, 2))


def parameters(dtype=torch.float32, shapes=SHAPES):
    torch.manual_seed(7)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def stepped(make, times=3, dtype=torch.float32, skip=(), shapes=SHAPES, **options):
    """An optimizer after some steps; the parameters `skip` never had a gradient."""
    params = parameters(dtype, shapes)
    optimizer = make(params, **options)
    for _ in range(times):
        for k, param in enumerate(params):
            param.grad = None if k in skip else torch.randn(param.shape).to(param.dtype)
        optimizer.step()
    return optimizer


def count_of(optimizer):
    group = optimizer.param_groups[0]
    if "iterations" in group:
        return group["iterations"]
    if "step" in group:
        return group["step"]
    return {int(state["step"]) for state in optimizer.state.values()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_accumulators_and_count_carry_over_bit_for_bit(rule, source, target):
    first = stepped(RULES[rule][source])
    saved = first.state_dict()
    kept = copy.deepcopy(saved)
    second = RULES[rule][target](parameters())
    groups = [{k: v for k, v in group.items() if k != "params"} for group in second.param_groups]
    second.load_state_dict(convert(saved, second))
    there, here = NAMES[rule][source], NAMES[rule][target]
    for param, other in zip(first.param_groups[0]["params"], second.param_groups[0]["params"], strict=True):
        for name, other_name in zip(there, here, strict=True):
            value, converted = first.state[param][name], second.state[other][other_name]
            assert torch.equal(value, converted)
            assert value.data_ptr() != converted.data_ptr()
    assert count_of(second) in (3, {3})
    for before, after in zip(groups, second.param_groups, strict=True):
        changed = {k for k in before if before[k] != after[k]}
        assert changed <= {"iterations", "step"}
    torch.testing.assert_close(saved, kept, rtol=0, atol=0)
    # and back again
    third = RULES[rule][source](parameters())
    third.load_state_dict(convert(second.state_dict(), third))
    torch.testing.assert_close(third.state_dict()["state"], kept["state"], rtol=0, atol=0)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_without_differences_the_next_steps_are_the_same_but_for_rounding(source, target):
    alike = {"torch": {"lr": 0.5}, "plain torch": {"lr": 0.5}, "MLX": {}}
    alike["Keras"] = {"rho": 0.9, "epsilon": 1e-6}
    first = stepped(ADADELTAS[source], **alike[source])
    second = ADADELTAS[target](parameters(), **alike[target])
    with torch.no_grad():
        for param, other in zip(
            first.param_groups[0]["params"], second.param_groups[0]["params"], strict=True
        ):
            other.copy_(param)
    second.load_state_dict(convert(first.state_dict(), second))
    assert differences(first, second) == []
    for _ in range(5):
        for param, other in zip(
            first.param_groups[0]["params"], second.param_groups[0]["params"], strict=True
        ):
            param.grad = torch.randn(param.shape)
            other.grad = param.grad.clone()
        first.step()
        second.step()
    for param, other in zip(first.param_groups[0]["params"], second.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(param, other, rtol=2e-6, atol=1e-7)


def test_differences_are_named():
    params = parameters()
    assert differences(Adagrad(params), mlx.Adagrad(params, 0.01, eps=1e-10)) == []
    assert differences(
        Adagrad(params, lr_decay=0.5, weight_decay=0.1, maximize=True),
        keras.Adagrad(params, learning_rate=0.01, epsilon=1e-10, weight_decay=0.1, clipnorm=1.0),
    ) == [
        "group 0: coupled weight decay: 0.1 there, 0.0 here",
        "group 0: decoupled weight decay: 0.0 there, 0.1 here",
        "group 0: maximize: True there, False here",
        "group 0: lr_decay: 0.5 there, 0.0 here",
        "group 0: place of eps: outside the root there, inside the root here",
        "clipnorm: None there, 1.0 here",
    ]
    assert differences(mlx.Adagrad(params, 0.01), keras.Adadelta(params)) == [
        "rule: Adagrad there, Adadelta here"
    ]
    no_eps = keras.Adagrad(params, learning_rate=0.01, epsilon=0.0)
    assert differences(no_eps, Adagrad(params, eps=0.0)) == []
    assert differences(Adadelta(params), keras.Adadelta(params)) == [
        "group 0: lr: 1.0 there, 0.001 here",
        "group 0: eps: 1e-06 there, 1e-07 here",
        "group 0: rho: 0.9 there, 0.95 here",
    ]
    scheduled = differences(mlx.Adagrad(params, 0.1), mlx.Adagrad(params, lambda step: 0.1))
    assert len(scheduled) == 1
    assert scheduled[0].startswith("learning rate: a number there, <function")


def test_accumulation_counts_updates():
    source = stepped(ADAGRADS["Keras"], times=6, gradient_accumulation_steps=3)
    assert source.iterations == 2
    target = mlx.Adagrad(parameters(), 0.5)
    target.load_state_dict(convert(source.state_dict(), target))
    assert target.steps == 2
    back = keras.Adagrad(parameters(), gradient_accumulation_steps=4)
    back.load_state_dict(convert(target.state_dict(), back))
    assert back.iterations == 2
    assert back.param_groups[0]["iterations"] == 8
    for state in back.state.values():
        assert not state["gradient_accumulator"].any()


def test_averages_stay_in_keras_terms():
    source = stepped(ADADELTAS["Keras"], use_ema=True)
    plain, averaging = Adadelta(parameters()), keras.Adadelta(parameters(), use_ema=True)
    with pytest.raises(ConversionError, match="keeps no moving average of the parameters"):
        convert(source.state_dict(), plain)
    plain.load_state_dict(convert(source.state_dict(), plain, drop=("average",)))
    with pytest.raises(ConversionError, match="torch's state has no average"):
        convert(plain.state_dict(), averaging)
    averaging.load_state_dict(convert(source.state_dict(), averaging))
    for a, b in zip(source.state.values(), averaging.state.values(), strict=True):
        assert torch.equal(a["average"], b["average"])


def test_parameters_never_stepped_have_no_say_in_the_count():
    target = keras.Adadelta(parameters())
    target.load_state_dict(convert(stepped(ADADELTAS["torch"], skip=(1,)).state_dict(), target))
    assert target.iterations == 3
    assert [bool(target.state[param]) for param in target.param_groups[0]["params"]] == [True, False, True]
    target = mlx.Adagrad(parameters(), 0.1)
    target.load_state_dict(convert(stepped(ADAGRADS["torch"], skip=(1,)).state_dict(), target))
    assert target.steps == 3


def test_counts_that_one_counter_cannot_say_are_refused():
    source = stepped(ADADELTAS["torch"], skip=(1,))
    for param in source.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    source.step()
    with pytest.raises(ConversionError, match=r"differ.*: 1 \(parameter 1\), 4 \(parameter 0\)"):
        convert(source.state_dict(), mlx.AdaDelta(parameters(), 0.1))
    for state in source.state.values():
        state["step"].fill_(2.0**24)
    with pytest.raises(ConversionError, match=r"stands still at 2\*\*24"):
        convert(source.state_dict(), mlx.AdaDelta(parameters(), 0.1))
    for state in source.state.values():
        state["step"] = state["step"].double() + 1
    target = mlx.AdaDelta(parameters(), 0.1)
    target.load_state_dict(convert(source.state_dict(), target))
    assert target.steps == 2**24 + 1
    with pytest.raises(ConversionError, match=r"16777217 does not fit"):
        convert(target.state_dict(), Adadelta(parameters()))


def test_half_states_are_refused_where_they_would_be_rounded():
    source = stepped(ADADELTAS["torch"], dtype=torch.bfloat16)
    params = parameters(torch.bfloat16)
    wide, narrow = mlx.AdaDelta(params, 0.1), mlx.AdaDelta(params, 0.1, state_dtype="param")
    wide.load_state_dict(convert(source.state_dict(), wide))
    assert {t.dtype for state in wide.state.values() for t in state.values()} == {torch.float32}
    with pytest.raises(
        ConversionError, match=r"square_avg is torch.float32 and \d+ of its values do not fit"
    ):
        convert(source.state_dict(), narrow)
    with pytest.raises(ConversionError, match=r"do not fit into the target's torch.bfloat16"):
        convert(wide.state_dict(), torch.optim.Adadelta(params))
    for state in source.state.values():  # representable values lose nothing
        for name in ("square_avg", "acc_delta"):
            state[name].copy_(state[name].bfloat16())
    narrow.load_state_dict(convert(source.state_dict(), narrow))
    for a, b in zip(source.state.values(), narrow.state.values(), strict=True):
        assert b["v"].dtype == torch.bfloat16
        assert torch.equal(a["square_avg"], b["v"].float())
    with pytest.raises(ConversionError, match="float64 and"):
        convert(stepped(ADADELTAS["MLX"], dtype=torch.float64).state_dict(), Adadelta(parameters()))


def rows(params, **options):
    return Adagrad(params, row_wise=True, **options)


@pytest.mark.parametrize(
    ("source", "target", "why"),
    [
        (
            lambda: stepped(ADAGRADS["torch"]),
            lambda: keras.Adadelta(parameters()),
            "Adagrad's state says nothing",
        ),
        (
            lambda: stepped(rows, shapes=[(3, 4)]),
            lambda: mlx.Adagrad(parameters(shapes=[(3, 4)]), 0.1),
            "row-wise",
        ),
        (
            lambda: stepped(ADAGRADS["MLX"], shapes=[(3, 4)]),
            lambda: rows(parameters(shapes=[(3, 4)])),
            "row-wise",
        ),
        (
            lambda: stepped(ADADELTAS["torch"], shapes=[(2,)], dtype=torch.complex64),
            lambda: mlx.AdaDelta(parameters(shapes=[(2,)]), 0.1),
            "is complex, which only torch's terms have",
        ),
        (
            lambda: stepped(ADADELTAS["torch"], shapes=[(2,)]),
            lambda: mlx.AdaDelta(parameters(shapes=[(3,)]), 0.1),
            r"parameter 0: square_avg has shape \(2,\), its parameter \(3,\)",
        ),
        (
            lambda: stepped(ADADELTAS["torch"], shapes=[(2,)]),
            lambda: mlx.AdaDelta(parameters(), 0.1),
            r"groups of \[1\] parameters do not match groups of \[3\]",
        ),
        (
            lambda: stepped(ADADELTAS["Keras"], gradient_accumulation_steps=2),
            lambda: mlx.AdaDelta(parameters(), 0.1),
            "1 of 2 gradients have been accumulated and not applied",
        ),
        (
            lambda: keras.Adagrad(parameters()),
            lambda: mlx.Adagrad(parameters(), 0.1),
            r"would start at 0\.1 in Keras's terms and at 0\.0 in the target",
        ),
        (
            lambda: torch.optim.Adam(parameters()),
            lambda: mlx.Adagrad(parameters(), 0.1),
            "neither Adadelta nor Adagrad in any known terms: the groups have .*'betas'",
        ),
    ],
)
def test_what_is_not_exact_is_refused(source, target, why):
    with pytest.raises(ConversionError, match=why):
        convert(source().state_dict(), target())


def test_a_state_under_the_wrong_names_is_refused():
    saved = stepped(ADADELTAS["torch"]).state_dict()
    saved["state"][1]["exp_avg"] = saved["state"][1].pop("acc_delta")
    with pytest.raises(ConversionError, match=r"parameter 1 holds .*'exp_avg'.*not torch Adadelta state"):
        convert(saved, mlx.AdaDelta(parameters(), 0.1))
    assert issubclass(conversion.ConversionError, ValueError)


def test_an_accumulator_not_made_yet_may_start_alike():
    target = mlx.Adagrad(parameters(), 0.1)
    source = keras.Adagrad(parameters(), initial_accumulator_value=0.0)
    target.load_state_dict(convert(source.state_dict(), target))
    assert target.steps == 0


def test_groups_keep_the_targets_hyperparameters():
    def groups():
        return [{"params": parameters()[:1]}, {"params": parameters()[1:], "lr": 0.25}]

    source, target = mlx.AdaDelta(groups(), 0.1), Adadelta(groups())
    target.load_state_dict(convert(source.state_dict(), target))
    assert [group["lr"] for group in target.param_groups] == [1.0, 0.25]
