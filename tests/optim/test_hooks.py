"""Hooks in torch's order, each exactly once; GradScaler; what is asked of an optimizer around its step."""

from __future__ import annotations

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from pushstep.optim import Adadelta, Adagrad

MAKES = [Adadelta, Adagrad]


def _one(make, **options):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return p, make([p], **options)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("path", [{}, {"fused": False}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("torchs_own_ran_before", [False, True])
def test_step_hooks_run_once_in_torchs_order(make, path, torchs_own_ran_before):
    if torchs_own_ran_before:  # which wraps the parent class's step, too
        _, other = _one(make.__bases__[1])
        other.step()
    p, optimizer = _one(make, **path)
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    before = p.detach().clone()
    try:
        optimizer.step(lambda: seen.append("step"))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["global pre", "pre", "step", "post", "global post"]
    assert not torch.equal(p, before)
    assert optimizer.state[p]["step"] == 1


@pytest.mark.parametrize("make", MAKES)
def test_a_pre_hook_may_rewrite_the_arguments(make):
    _, optimizer = _one(make)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 42), {}))
    assert optimizer.step() == 42
    _, optimizer = _one(make)
    optimizer.register_step_pre_hook(lambda *_: 3)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


@pytest.mark.parametrize("make", MAKES)
def test_subclasses_of_ours_run_hooks_once(make):
    class Mine(make):
        def step(self, closure=None):
            return super().step(closure)

    class Silent(make):
        pass

    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    seen = []
    optimizer = Silent([p])
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    optimizer.step()
    assert seen == [1]
    twice = Mine([p])
    twice.step()
    assert twice.state[p]["step"] == 1


@pytest.mark.parametrize("make", MAKES)
def test_state_dict_hooks_in_order(make):
    _, optimizer = _one(make)
    optimizer.step()
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, d: seen.append("post") or {**d, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, d: seen.append("load pre"))
    optimizer.register_load_state_dict_pre_hook(lambda o, d: seen.append("load first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("load post"))
    state = optimizer.state_dict()
    assert state["mine"] == 1
    optimizer.load_state_dict(state)
    assert seen == ["pre", "post", "load first", "load pre", "load post"]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 2


@pytest.mark.parametrize("make", MAKES)
def test_a_load_hook_may_replace_what_is_loaded(make):
    _, optimizer = _one(make)
    optimizer.step()
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    twin = make([half])
    name = make.rule.state_names[0]

    def replace(_, state):
        state["state"] = {0: {**state["state"][0], name: torch.full((3,), 1 / 3)}}
        return state

    twin.register_load_state_dict_pre_hook(replace)
    twin.load_state_dict(optimizer.state_dict())
    assert torch.equal(twin.state[half][name], torch.full((3,), 1 / 3))


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"fused": False}, {"foreach": True}], ids=str)
def test_grad_scaler_gives_what_unscaled_training_gives(make, options):
    torch.manual_seed(0)
    scaled, plain = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    plain.load_state_dict(scaled.state_dict())
    optimizer, other = make(scaled.parameters(), **options), make(plain.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for k in range(6):
        x = torch.randn(5, 4)
        for model, opt in ((scaled, optimizer), (plain, other)):
            opt.zero_grad()
            loss = model(x).square().sum()
            if opt is other:
                loss.backward()
                if k != 3:
                    opt.step()
                continue
            scaler.scale(loss).backward()
            assert optimizer._step_supports_amp_scaling == (options in ({}, {"fused": True}))
            if k == 3:
                scaled.weight.grad[0, 0] = float("inf")
            scaler.step(opt)
            scaler.update()
        if k != 3:
            torch.testing.assert_close(
                scaled.weight.grad, plain.weight.grad
            )  # left unscaled, as torch leaves it
        torch.testing.assert_close(scaled.weight, plain.weight)
    assert optimizer.state[scaled.weight]["step"] == 5
    assert not hasattr(optimizer, "grad_scale")


@pytest.mark.parametrize("make", MAKES)
def test_scaling_is_left_to_the_scaler_if_one_group_is_not_fused(make):
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = make([{"params": [p]}, {"params": [q], "foreach": True}])
    p.grad = torch.ones(3)
    assert optimizer._step_supports_amp_scaling
    q.grad = torch.ones(3)
    assert not optimizer._step_supports_amp_scaling
    assert "foreach" in optimizer.path(q).reason
