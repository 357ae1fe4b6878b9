"""Every row of the parity table beside its peer: twenty steps, in ulps and against float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from pushstep import optim
from pushstep.optim import Adadelta, Adagrad
from tests.support.numbers.closeness import compare
from tests.support.numbers.guards import Guards
from tests.support.numbers.parity_table import EXTRA_ULPS, F32, GOLDEN, PARAMETER_ULPS, ROWS
from tests.support.numbers.ulps import STATE_ULPS


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The number of threads changes no bit of ours (test_splits.py), and the peers' are as fast with one for so few elements."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


RULES = {
    "adadelta": (Adadelta, torch.optim.Adadelta, ("square_avg", "acc_delta")),
    "adagrad": (Adagrad, torch.optim.Adagrad, ("sum",)),
}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_step_is_as_near_to_the_peer_and_nearer_to_float64(row):
    torch.manual_seed(11)
    values, guards = row.values(), Guards()
    ours, peer = row.ours(values), row.theirs(values)
    for param in ours[1]:
        param.data = guards.around(param.data)
    steps = [[guards.around(grad) for grad in row.grads()] for _ in range(20)]
    # Beside Keras one step may be unlucky: a clip factor is a single number, and its rounding is in every element.
    apart = compare(ours, row.twin(values), peer, steps, every_step=row.peer == "torch")
    guards.check()
    optimizer, params = ours
    assert {optimizer.path(p).fused for p in params} == {row.backend == "kernels"}
    if row.dtype == F32 and row.backend == "kernels":
        assert apart.pop("parameter", 0.0) <= PARAMETER_ULPS[row.peer]
        if row.peer == "torch":
            for name, far in apart.items():
                assert far <= STATE_ULPS[name] + EXTRA_ULPS.get(row.options, 0), name
    if row.peer == "torch":
        for param, held in zip(params, peer.states, strict=True):
            assert optimizer.state[param].keys() == held.keys()
            assert torch.equal(optimizer.state[param]["step"], held["step"])
            assert all(
                optimizer.state[param][name].stride() == value.stride() for name, value in held.items()
            )


@pytest.mark.parametrize(("peer", "rule", "options", "value", "states"), GOLDEN)
@pytest.mark.parametrize("fused", [None, False])
def test_golden_values(peer, rule, options, value, states, fused):
    param = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    family = optim if peer == "torch" else getattr(optim, peer)
    optimizer = getattr(family, rule)([param], fused=fused, **options)
    for grad in (1.0, -2.0, 0.5):
        param.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
    assert param.item() == pytest.approx(value, rel=1e-14, abs=0)
    for name, expected in states.items():
        assert optimizer.state[param][name].item() == pytest.approx(expected, rel=1e-13, abs=0)


# ---- many elements, where the largest error is no matter of luck -----------------------------------------------


def _step_from(state, params, grads, make, options):
    """One step of `make(params, **options)` from a given state dict; its params and states after."""
    params = [torch.nn.Parameter(p.clone(memory_format=torch.preserve_format)) for p in params]
    optimizer = make(params, **options)
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))
    for p, g in zip(params, grads, strict=True):
        p.grad = g.to(p.dtype) if p.dtype != g.dtype else g
    optimizer.step()
    return [p.detach() for p in params], optimizer


def _double(state):
    out = copy.deepcopy(state)
    for entry in out["state"].values():
        for name, value in entry.items():
            if name != "step":
                entry[name] = value.double()
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", RULES)
def test_one_step_is_no_farther_from_float64_than_torch_in_mean_and_max(rule, seed):
    ours, theirs, bounds = RULES[rule]
    torch.manual_seed(seed)
    n = 300_001  # the largest rounding error of so many is no longer a matter of luck
    params, grads = [torch.randn(n)], [torch.randn(n)]
    _, warm = _step_from(None, params, [torch.randn(n)], theirs, {})
    state = warm.state_dict()
    mine, my_optimizer = _step_from(state, params, grads, ours, {})
    torchs, torch_optimizer = _step_from(state, params, grads, theirs, {})
    exact, exact_optimizer = _step_from(_double(state), [p.double() for p in params], grads, theirs, {})
    triples = [(mine[0], torchs[0], exact[0])]
    made = (my_optimizer, torch_optimizer, exact_optimizer)
    triples += [tuple(o.state_dict()["state"][0][name] for o in made) for name in bounds]
    for m, t, e in triples:
        my_error, torch_error = (m.double() - e).abs(), (t.double() - e).abs()
        assert my_error.mean() <= 1.001 * torch_error.mean()
        assert my_error.max() <= 1.001 * torch_error.max()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_twenty_steps_stay_as_near_to_float64_as_torch_does(rule, dtype):
    ours, theirs, _ = RULES[rule]
    torch.manual_seed(5)
    start = torch.randn(100_003, dtype=dtype)
    runs = [torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())]
    exact = torch.nn.Parameter(start.double())
    optimizers = [ours([runs[0]]), theirs([runs[1]]), theirs([exact])]
    for _ in range(20):
        grad = torch.randn(100_003, dtype=dtype)
        for p in (*runs, exact):
            p.grad = grad.to(p.dtype)
        for optimizer in optimizers:
            optimizer.step()
    if dtype == torch.float64:
        torch.testing.assert_close(runs[0], runs[1], rtol=1e-14, atol=1e-15)
        return
    mine, torchs = ((p.detach().double() - exact.detach()).abs() for p in runs)
    assert mine.mean() <= 1.001 * torchs.mean()
    assert mine.max() <= 1.001 * torchs.max() + float(np.spacing(np.float32(4.0)))
