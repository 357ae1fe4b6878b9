"""torch's LR schedulers steer a remote optimizer as they steer a local one: same numbers, no warnings."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from pushstep.client import RemoteOptimizer
from tests.support.servers.harness import RunningServer
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import Make, adadelta, adagrad, both
from tests.support.trainings.twins import Twins

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[1, 3], gamma=0.1),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.25, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=5, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.8),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=10, cycle_momentum=False),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, base_lr=0.01, max_lr=0.2, step_size_up=2, cycle_momentum=False
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.ConstantLR(o, factor=0.1, total_iters=2), lr_scheduler.ExponentialLR(o, gamma=0.5)],
        milestones=[3],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, factor=0.1, total_iters=2), lr_scheduler.ExponentialLR(o, gamma=0.9)]
    ),
}
STEPS = 6


def _lrs(optimizers: list[torch.optim.Optimizer]) -> list[Any]:
    return [float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]


def _run(twins: Twins, remote: LRScheduler, local: LRScheduler) -> set[float]:
    """Train both sides with their schedulers; every lr that was stepped with."""
    seen: set[float] = set()
    for seed in range(STEPS):
        before = _lrs([twins.remote])
        assert before == _lrs(twins.local)
        twins.step(seed)
        assert twins.remote.last_receipt is not None
        assert [group["lr"] for group in twins.remote.last_receipt.groups] == before
        assert twins.remote.last_receipt.ignored_edits == []
        seen.update(before)
        remote.step()
        local.step()
        assert remote.get_last_lr() == local.get_last_lr()
    return seen


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_made_before_or_after_attach(
    server: RunningServer, model_name: str, name: str, when: str
) -> None:
    make_scheduler = SCHEDULERS[name]
    made: list[LRScheduler] = []

    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        optimizer = adagrad(model)
        if when == "before":
            made.append(make_scheduler(optimizer))
        return optimizer

    twins = Twins(server.connect(model_name), Network(), make)
    if when == "after":
        made = [make_scheduler(twins.remote), make_scheduler(twins.local[0])]
    assert len(_run(twins, *made)) > 1, "the scheduler must have moved the lr"
    twins.check_state()  # with the scheduler's own keys, such as initial_lr
    if name not in ("ChainedScheduler", "SequentialLR"):
        states = [{k: v for k, v in one.state_dict().items() if k != "lr_lambdas"} for one in made]
        assert states[0] == states[1]


@pytest.mark.parametrize("when", ["before", "after"])
def test_reduce_on_plateau(server: RunningServer, model_name: str, when: str) -> None:
    made: list[lr_scheduler.ReduceLROnPlateau] = []

    def schedule(optimizer: torch.optim.Optimizer) -> None:
        made.append(lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1))

    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        optimizer = adadelta(model)
        if when == "before":
            schedule(optimizer)
        return optimizer

    twins = Twins(server.connect(model_name), Network(), make)
    if when == "after":
        schedule(twins.remote)
        schedule(twins.local[0])
    for seed, metric in enumerate([1.0, 2.0, 2.0, 2.0, 2.0]):
        twins.step(seed)
        for scheduler in made:
            scheduler.step(metric)
    assert _lrs([twins.remote]) == _lrs(twins.local) == [0.175]


@pytest.mark.parametrize("make", [adadelta, adagrad])
def test_a_tensor_lr_is_steered_in_place(server: RunningServer, model_name: str, make: Make) -> None:
    def with_tensor(model: torch.nn.Module) -> torch.optim.Optimizer:
        optimizer = make(model)
        assert isinstance(optimizer, torch.optim.Optimizer)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
        return optimizer

    twins = Twins(server.connect(model_name), Network(), with_tensor)
    held = twins.remote.param_groups[0]["lr"]
    schedulers = [lr_scheduler.ExponentialLR(o, gamma=0.7) for o in (twins.remote, twins.local[0])]
    for seed in range(4):
        twins.step(seed)
        for scheduler in schedulers:
            scheduler.step()
    assert twins.remote.param_groups[0]["lr"] is held
    assert torch.equal(held, twins.local[0].param_groups[0]["lr"])
    assert float(held) != 0.5


@pytest.mark.parametrize("when", ["before", "after"])
def test_each_optimizer_of_a_list_keeps_its_own(server: RunningServer, model_name: str, when: str) -> None:
    """Before attach: one for each. After: one over all groups."""
    made: list[LRScheduler] = []

    def make(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
        assert isinstance(model, Network)
        optimizers = both(model)
        if when == "before":
            made.append(lr_scheduler.ExponentialLR(optimizers[0], gamma=0.5))
            made.append(lr_scheduler.StepLR(optimizers[1], step_size=2, gamma=0.1))
        return optimizers

    twins = Twins(server.connect(model_name), Network(sparse=True), make)
    if when == "after":
        made = [lr_scheduler.ExponentialLR(o, gamma=0.5) for o in (twins.remote, *twins.local)]
    for seed in range(4):
        twins.step(seed)
        assert _lrs([twins.remote]) == _lrs(twins.local)
        for scheduler in made:
            scheduler.step()
    assert _lrs([twins.remote]) == _lrs(twins.local)
    twins.check_state()


def test_a_scheduler_sees_a_step_that_the_server_refused(server: RunningServer, model_name: str) -> None:
    """lr moves on as in torch after a step that did nothing, and the server learns of it with the next push."""
    twins = Twins(server.connect(model_name, on_reject="skip"), Network(), adagrad)
    schedulers = [lr_scheduler.ExponentialLR(o, gamma=0.5) for o in (twins.remote, twins.local[0])]
    twins.step(0)
    for scheduler in schedulers:
        scheduler.step()
    twins.model.out.bias.grad = torch.full((1,), float("nan"))
    with pytest.warns(RuntimeWarning, match="push rejected"):
        twins.remote.step()
    for scheduler in schedulers:
        scheduler.step()
    assert _lrs([twins.remote]) == _lrs(twins.local) == [pytest.approx(0.025)]
    twins.step(1)
    assert server.rest("GET", f"/v1/models/{model_name}/param-groups/0").json()["lr"] == 0.025


def test_an_edit_whose_push_was_skipped_travels_with_the_next(server: RunningServer, model_name: str) -> None:
    """Chained schedulers compute from the lr they find: one that was taken back would stay lost."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = server.connect(model_name).attach(torch.optim.Adadelta([weight], lr=1.0), names=["w"])
    guard = {"name": "finite_guard", "point": "step_pre", "settings": {"action": "skip"}}
    assert server.rest("POST", f"/v1/models/{model_name}/hooks", json=guard).status_code == 201
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    applied = []
    for number in range(6):
        weight.grad = torch.full((2,), float("nan") if number == 2 else 1.0)
        optimizer.step()
        assert optimizer.last_receipt is not None
        applied.append(
            (str(optimizer.last_receipt.outcome), round(optimizer.last_receipt.effective_lr[0], 9))
        )
        scheduler.step()
    lrs = [1.0, 1.0, 1.0, 0.1, 0.01, 0.01]  # the receipt of the skipped one shows what held before its edit
    outcomes = ["applied", "applied", "skipped", *["applied"] * 3]
    assert applied == list(zip(outcomes, lrs, strict=True))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


def test_four_workers_with_a_scheduler_each_decay_once(server: RunningServer, model_name: str) -> None:
    """Every one runs the same script. The lead's counts; did all four, lr would be 0.0625."""
    optimizers: list[RemoteOptimizer] = []
    schedulers: list[LRScheduler] = []
    for number in range(4):
        weight = torch.nn.Parameter(torch.zeros(2))
        session = server.connect(model_name, f"w{number}")
        optimizers.append(session.attach(torch.optim.Adadelta([weight], lr=1.0), names=["w"]))
        schedulers.append(lr_scheduler.StepLR(optimizers[-1], step_size=10, gamma=0.5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(11):
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
                optimizer.step()
                if step < 10:
                    scheduler.step()
        warned = [one for one in caught if "only the lead worker's count" in str(one.message)]
    lr = server.rest("GET", f"/v1/models/{model_name}/param-groups/0").json()["lr"]
    assert lr == 0.5
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [0.5] * 4
    assert all(one.filename == __file__ for one in warned)
    assert len(warned) <= 3
