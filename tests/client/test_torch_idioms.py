"""What people write around an optimizer, unchanged: each is run on a remote one and, bit for bit the same, on a local one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.support.servers.harness import RunningServer
from tests.support.trainings.bits import check_state_dict
from tests.support.trainings.network import Network, finite, loss_of
from tests.support.trainings.optimizers import adadelta, adagrad
from tests.support.trainings.twins import Twins

Optimizers = list[torch.optim.Optimizer]
Train = Callable[[nn.Module, Optimizers], Any]
STEPS = 4


def _step(optimizers: Optimizers, closure: Callable[[], Any] | None = None) -> None:
    for optimizer in optimizers:
        optimizer.step(closure)  # type: ignore[arg-type]


def _closure(model: nn.Module, optimizers: Optimizers) -> list[float]:
    """As Lightning steps: the closure zeroes, computes and propagates."""

    def closure() -> Tensor:
        optimizers[0].zero_grad()
        loss = loss_of(model, 1)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    losses = [optimizers[0].step(closure) for _ in range(STEPS)]  # type: ignore[arg-type]
    return [loss.item() for loss in losses]


@contextmanager
def _toggled(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Lightning's toggle_optimizer: only this optimizer's parameters take gradients meanwhile."""
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in mine)
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)


def _toggle(model: nn.Module, optimizers: Optimizers) -> None:
    for seed in range(STEPS):
        with _toggled(model, optimizers[0]):
            loss_of(model, seed).backward()  # type: ignore[no-untyped-call]
            _step(optimizers)
            optimizers[0].zero_grad()


def _clip_values(model: nn.Module, optimizers: Optimizers) -> None:
    for seed in range(STEPS):
        optimizers[0].zero_grad()
        loss_of(model, seed).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
        _step(optimizers)


def _zeroes_in_place(model: nn.Module, optimizers: Optimizers) -> None:
    """Gradients that stay zero are pushed and stepped, as torch does; the memory is the same throughout."""
    loss_of(model, 0).backward()  # type: ignore[no-untyped-call]
    held = [p.grad for p in model.parameters()]
    for seed in range(STEPS):
        optimizers[0].zero_grad(set_to_none=False)
        if seed % 2:
            loss_of(model, seed).backward()  # type: ignore[no-untyped-call]
        _step(optimizers)
    assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))


def _accumulate(model: nn.Module, optimizers: Optimizers) -> None:
    for seed in range(2 * STEPS):
        (loss_of(model, seed) / 2).backward()
        if seed % 2:
            _step(optimizers)
            optimizers[0].zero_grad()


def _freeze(model: nn.Module, optimizers: Optimizers) -> None:
    """Frozen and thawed while training: without a gradient a parameter, its state and its step count stay."""
    frozen = next(model.parameters())
    for seed in range(STEPS):
        frozen.requires_grad_(seed not in (1, 2))
        optimizers[0].zero_grad()
        loss_of(model, seed).backward()  # type: ignore[no-untyped-call]
        _step(optimizers)


def _not_contiguous(model: nn.Module, optimizers: Optimizers) -> None:
    for seed in range(STEPS):
        generator = torch.Generator().manual_seed(seed)
        for number, parameter in enumerate(model.parameters()):
            values = torch.randn(parameter.shape, generator=generator)
            spread = torch.stack([values, values], dim=-1)[..., 0]
            values = (values.t().contiguous().t(), values[:1].expand_as(values), spread)[min(number, 2)]
            assert not values.is_contiguous() or values.numel() == 1
            parameter.grad = values
        _step(optimizers)


def _autocast(model: nn.Module, optimizers: Optimizers) -> None:
    for seed in range(STEPS):
        optimizers[0].zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, seed)
        loss.backward()  # type: ignore[no-untyped-call]
        _step(optimizers)


def _ema(model: nn.Module, optimizers: Optimizers) -> None:
    """Averages are read from the parameters and are a copy: nothing of it is an edit."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
    for seed in range(STEPS):
        optimizers[0].zero_grad()
        loss_of(model, seed).backward()  # type: ignore[no-untyped-call]
        _step(optimizers)
        average.update_parameters(model)
    averages = list(average.module.parameters())
    model.register_buffer("seen", torch.cat([p.detach().flatten() for p in averages]), persistent=False)
    assert not torch.equal(averages[1], list(model.parameters())[1])


def _compiled(model: nn.Module, optimizers: Optimizers) -> None:
    """Named before or after compiling, a parameter is the same."""
    compiled = torch.compile(model, backend="eager")
    for seed in range(STEPS):
        optimizers[0].zero_grad()
        loss_of(compiled, seed).backward()  # type: ignore[no-untyped-call]
        _step(optimizers)


def _inference_between(model: nn.Module, optimizers: Optimizers) -> None:
    for seed in range(STEPS):
        optimizers[0].zero_grad()
        loss_of(model, seed).backward()  # type: ignore[no-untyped-call]
        _step(optimizers)
        with torch.inference_mode():
            loss_of(model.eval(), seed)
        model.train()
        copy.deepcopy(model)
        model.state_dict()


IDIOMS: list[Train] = [
    _closure,
    _toggle,
    _clip_values,
    _zeroes_in_place,
    _accumulate,
    _freeze,
    _not_contiguous,
    _autocast,
    _ema,
    _compiled,
    _inference_between,
]


@pytest.mark.parametrize("make", [adadelta, adagrad])
@pytest.mark.parametrize("train", IDIOMS, ids=lambda train: train.__name__.lstrip("_"))
def test_it_is_bit_equal_to_local(
    server: RunningServer, model_name: str, train: Train, make: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    twins = Twins(server.connect(model_name), Network(), make)
    start = [p.detach().clone() for p in twins.model.parameters()]
    assert train(twins.local_model, twins.local) == train(twins.model, [twins.remote])
    assert finite(twins.model)
    assert not all(torch.equal(p, s) for p, s in zip(twins.model.parameters(), start, strict=True))
    twins.check_state()
    seen = dict(twins.model.named_buffers())
    assert all(torch.equal(seen[name], value) for name, value in twins.local_model.named_buffers())


def test_images_in_channels_last(server: RunningServer, model_name: str) -> None:
    """Parameters and gradients whose memory is not in the order of their indices."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 1))
        return layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    images = images.to(memory_format=torch.channels_last)
    ends = []
    for attach in (False, True):
        network = model()
        optimizer: Any = adagrad(network)
        if attach:
            optimizer = server.connect(model_name).attach(optimizer, module=network)
        for _ in range(STEPS):
            optimizer.zero_grad()
            network(images).square().mean().backward()
            optimizer.step()
        convolution = network[0].weight  # type: ignore[index]
        assert convolution.is_contiguous(memory_format=torch.channels_last)
        assert convolution.grad.is_contiguous(memory_format=torch.channels_last)
        ends.append((network.state_dict(), optimizer.state_dict()))
    for name, value in ends[0][0].items():
        assert torch.equal(value, ends[1][0][name]), name
    check_state_dict(ends[1][1], ends[0][1])


# torch's own, of any loss behind the end of a graph
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("attach", [{}, {"overlap": True}], ids=str)
@pytest.mark.parametrize("shared_memory", [False, True], ids=["frames", "shared memory"])
def test_a_whole_step_may_be_compiled(
    server: RunningServer, model_name: str, shared_memory: bool, attach: dict[str, bool]
) -> None:
    """Backward is in the graph, and the step behind its end, as torch's own zero_grad is; the bits are those without."""
    address = f"unix:{server.unix}" if shared_memory else server.grpc
    session = server.connect(model_name, address=address, shared_memory=shared_memory)
    twins = Twins(session, Network(), adagrad, **attach)
    ids, numbers = torch.randint(0, 9, (6,)), torch.randn(6, 2)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(ids, numbers).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    compiled = torch.compile(step, backend="eager")
    for _ in range(STEPS):
        assert torch.equal(compiled(twins.model, twins.remote), step(twins.local_model, twins.local[0]))
    twins.check_state()
    assert twins.remote.last_receipt is not None and twins.remote.last_receipt.version == STEPS


def test_a_compiled_module_and_its_original_are_one_model(server: RunningServer, model_name: str) -> None:
    names = []
    for number, wrap in enumerate((lambda m: m, lambda m: torch.compile(m, backend="eager"))):
        model = wrap(Network())
        session = server.connect(model_name, f"w{number}")
        session.attach(adagrad(model), module=model)
        names.append([slot.name for slot in session.member().layout.slots])
    assert names[0] == names[1]
