"""Memory that is used again between two steps, as something else: nothing that was learned of it holds any longer."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from pushstep.optim import Adadelta, Adagrad, mlx
from pushstep.optim import keras as keras

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
GUARD = 0x5A
MAKES = {
    "Adadelta": Adadelta,
    "Adagrad": Adagrad,
    "Keras": lambda params: keras.Adadelta(params, 0.5, use_ema=True),
    "MLX": lambda params: mlx.Adagrad(params, 0.5),
}


class Memory:
    """Bytes that tensors are laid over, always from the same address on, with more behind them."""

    def __init__(self):
        self.bytes = torch.full((1 << 12,), GUARD, dtype=torch.uint8)

    def hold(self, values, stride=None):
        """A tensor of these values over the memory; all that is behind it is the guard again."""
        extent = values.nbytes if stride is None else values.nbytes * max(stride)
        self.bytes[:] = GUARD
        tensor = self.bytes[:extent].view(values.dtype).as_strided(values.shape, stride or values.stride())
        tensor.copy_(values)
        self.used = extent
        return tensor

    def check(self):
        """Raise if anything behind the tensor was written to."""
        assert (self.bytes[self.used :] == GUARD).all()


def _ones(dtype, *shape):
    return torch.ones(shape, dtype=dtype)


# What lay there at the first step and what lies there at the second: values, and their strides if not contiguous.
CHANGES = {
    "float32, then bfloat16": ((_ones(F32, 16),), (_ones(BF16, 16),)),
    "bfloat16, then float32": ((_ones(BF16, 16),), (_ones(F32, 16),)),
    "bfloat16, then float16": ((_ones(BF16, 16),), (_ones(F16, 16),)),
    "float64, then float32": ((_ones(F64, 16),), (_ones(F32, 16),)),
    "shorter": ((_ones(F32, 40),), (_ones(F32, 7),)),
    "longer": ((_ones(F32, 7),), (_ones(F32, 40),)),
    "none at all": ((_ones(F32, 7),), (_ones(F32, 0),)),
    "transposed": (
        (torch.arange(12.0).view(3, 4),),
        (torch.arange(12.0).view(3, 4), (1, 3)),
    ),
    "with gaps": ((_ones(F32, 6),), (_ones(F32, 6), (2,))),
    "another shape": ((_ones(F32, 3, 4),), (_ones(F32, 4, 3),)),
}


def _grad(param, k):
    draw = torch.Generator().manual_seed(k)
    return torch.randn(param.shape, generator=draw).to(param.dtype)


@pytest.mark.parametrize("first, second", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_parameter_over_memory_that_was_another(make, first, second):
    memory = Memory()
    param = torch.nn.Parameter(memory.hold(*first))
    optimizer = make([param])
    for k, placed in enumerate((first, second)):
        param.grad = None
        param.data = memory.hold(*placed)
        param.grad = _grad(param, k)
        if k:
            held = optimizer.state[param]
            if placed[0].shape != first[0].shape or F64 in (placed[0].dtype, first[0].dtype):
                held = {name: _fit(value, placed[0]) for name, value in held.items()}
                optimizer.state[param] = held
            twin = torch.nn.Parameter(placed[0].clone())
            twin.grad = param.grad.clone()
            fresh = make([twin])
            fresh.state[twin] = copy.deepcopy(held)
            for group, now in zip(fresh.param_groups, optimizer.param_groups, strict=True):
                group.update({name: now[name] for name in ("iterations", "step") if name in now})
        optimizer.step()
        memory.check()
    fresh.step()
    assert torch.equal(param.detach(), twin.detach())
    for name, value in fresh.state[twin].items():
        assert torch.equal(optimizer.state[param][name], value)


def _fit(value, param):
    """A state that goes with this parameter."""
    return value if value.dim() == 0 else torch.zeros_like(param, dtype=torch.promote_types(param.dtype, F32))


@pytest.mark.parametrize("dtype", [BF16, F64], ids=str)
@pytest.mark.parametrize("make", [Adadelta, Adagrad])
def test_states_over_memory_that_was_another(make, dtype):
    memories = [Memory() for _ in make.rule.state_names]
    param = torch.nn.Parameter(torch.ones(16))
    optimizer = make([param])
    for k, kind in enumerate((F32, dtype)):
        state = optimizer._state_of(param, optimizer.param_groups[0])
        for name, memory in zip(make.rule.state_names, memories, strict=True):
            state[name].data = memory.hold(torch.full((16,), 0.5, dtype=kind))
        start = param.detach().clone()
        param.grad = _grad(param, k)
        optimizer.step()
        for memory in memories:
            memory.check()
    twin = torch.nn.Parameter(start)
    fresh = make([twin])
    state = fresh._state_of(twin, fresh.param_groups[0])
    state["step"] += 1
    for name in make.rule.state_names:
        state[name] = torch.full((16,), 0.5, dtype=dtype)
    twin.grad = param.grad.clone()
    fresh.step()
    assert torch.equal(param.detach(), twin.detach())


@pytest.mark.parametrize("make", [Adadelta, Adagrad])
@pytest.mark.parametrize("elements", [15, 17])
def test_a_state_that_became_shorter_or_longer_is_refused(make, elements):
    memory = Memory()
    param = torch.nn.Parameter(torch.ones(16))
    optimizer = make([param])
    state = optimizer._state_of(param, optimizer.param_groups[0])
    name = make.rule.state_names[-1]
    state[name].data = memory.hold(torch.zeros(16))
    param.grad = torch.ones(16)
    optimizer.step()
    state[name].data = memory.hold(torch.zeros(elements))
    before = copy.deepcopy((param, dict(state)))
    with pytest.raises(ValueError, match=rf"state has shape \({elements},\), its parameter \(16,\)"):
        optimizer.step()
    memory.check()
    assert torch.equal(param, before[0])
    assert state["step"] == before[1]["step"] == 1


@pytest.mark.parametrize("make", [Adadelta, Adagrad])
def test_step_counters_over_memory_that_was_another(make):
    memory = Memory()
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = make(params)
    for p in params:
        p.grad = torch.ones(4)
        optimizer._state_of(p, optimizer.param_groups[0])
    for k, dtype in enumerate((F32, F64, torch.int64)):
        for p in params:
            optimizer.state[p]["step"] = torch.tensor(float(k), dtype=dtype)
        optimizer.state[params[0]]["step"].data = memory.hold(torch.tensor(float(k), dtype=dtype))
        optimizer.step()
        memory.check()
        assert [optimizer.state[p]["step"].item() for p in params] == [k + 1, k + 1]


@pytest.mark.parametrize("make", [Adadelta, Adagrad])
def test_gradients_over_memory_that_was_another(make):
    memory = Memory()
    param, twin = (torch.nn.Parameter(torch.ones(8)) for _ in range(2))
    ours, fresh = make([param]), make([twin])
    for dtype in (F32, BF16, F64, F16):
        grad = torch.arange(1.0, 9.0).to(dtype)
        for p, g in ((param, memory.hold(grad)), (twin, grad)):
            p.data, p.grad = p.data.to(dtype), None
            p.grad, p.data = g, p.data.to(F32)  # a gradient of the dtype that the parameter had
        ours.step()
        fresh.step()
        fresh.__dict__.pop("_memos", None)
        assert torch.equal(param.detach(), twin.detach())


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_what_was_learned_keeps_nothing_alive(make):
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = make([param])
    param.grad = torch.ones(4)
    optimizer.step()
    held = [param.grad, *optimizer.state[param].values()]
    gone = [weakref.ref(tensor) for tensor in held]
    param.grad = None
    optimizer.state.clear()
    del held
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)


@pytest.mark.parametrize("change", ["double", "half", "load_state_dict"])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_modules_swap_their_parameters_between_steps(make, change):
    def train(model, optimizer):
        dtype = model.weight.dtype
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()
        return dtype

    def run(swapped):
        torch.__future__.set_swap_module_params_on_conversion(swapped)
        try:
            torch.manual_seed(0)
            model = torch.nn.Linear(3, 2)
            optimizer = make(list(model.parameters()))
            saved = copy.deepcopy(model.state_dict())
            train(model, optimizer)
            getattr(model, change)(*[saved] if change == "load_state_dict" else [])
            optimizer.state.clear()
            train(model, optimizer)
            return [p.detach() for p in model.parameters()]
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)
