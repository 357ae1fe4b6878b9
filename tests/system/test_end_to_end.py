"""One worker, real sockets: every step is the local optimizer's, bit for bit, and torch's, to stated ulps.

Then what an operator changes in mid-training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.optim import lr_scheduler

from pushstep.client import Outcome, RemoteOptimizer, Session
from tests.support.numbers.ulps import (
    assert_parameter_close,
    assert_state_close,
    distance,
    parameter_distance,
)
from tests.support.servers.harness import RunningServer
from tests.support.servers.operators import add_hook, download, patch_group, remove_hook
from tests.support.trainings.bits import array_bits, bits, check_state_dict, parameter_bits, state_bits
from tests.support.trainings.gradients import drawn_gradients, gradients_of, merged, set_gradients, square_sum
from tests.support.trainings.local_training import Replay
from tests.support.trainings.network import ROWS, ScaledNetwork, loss_of
from tests.support.trainings.optimizers import OPTIMIZERS, both

STEPS = 25
TORCH = {"adadelta": torch.optim.Adadelta, "adagrad": torch.optim.Adagrad}
SET_ADAGRAD = {"lr": 0.1, "lr_decay": 0.05, "initial_accumulator_value": 0.1, "eps": 1e-8, "maximize": True}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "adadelta": ("adadelta", {}),
    "adadelta-set": ("adadelta", {"lr": 0.7, "rho": 0.95, "eps": 1e-5, "maximize": True}),
    "adadelta-decay": ("adadelta", {"lr": 0.5, "weight_decay": 0.01}),
    "adagrad": ("adagrad", {}),
    "adagrad-set": ("adagrad", SET_ADAGRAD),
    "adagrad-decay": ("adagrad", {"lr": 0.05, "weight_decay": 0.01}),
}
# weight decay does not go with row-sparse gradients
CASES = [
    pytest.param(rule, settings, kind, id=f"{name}-{kind}")
    for name, (rule, settings) in SETTINGS.items()
    for kind in (("dense",) if "weight_decay" in settings else ("dense", "sparse", "by turns"))
]


pytestmark = pytest.mark.usefixtures("quiet_sparse_tensors")


def attached(session: Session, rule: str, settings: dict[str, Any]) -> tuple[ScaledNetwork, RemoteOptimizer]:
    module = ScaledNetwork()
    return module, session.attach(OPTIMIZERS[rule](module.parameters(), **settings), module=module)


# --- the local optimizer's bits


@pytest.mark.parametrize(("rule", "settings", "kind"), CASES)
def test_every_step_is_the_local_optimizers(
    server: RunningServer, session: Session, rule: str, settings: dict[str, Any], kind: str
) -> None:
    mine, remote = attached(session, rule, settings)
    here = ScaledNetwork()
    local = OPTIMIZERS[rule](here.parameters(), **settings)
    for number in range(STEPS):
        for module, optimizer in ((mine, remote), (here, local)):
            module.table.sparse = kind == "sparse" or (kind == "by turns" and number % 2 == 0)
            optimizer.zero_grad()
            loss_of(module, number).backward()
            optimizer.step()
        assert remote.last_receipt is not None
        assert (remote.last_receipt.outcome, remote.last_receipt.version) == (Outcome.APPLIED, number + 1)
        assert parameter_bits(mine) == parameter_bits(here), number
        check_state_dict(remote.state_dict(), local.state_dict())
    assert parameter_bits(here) != parameter_bits(ScaledNetwork())
    expected = parameter_bits(here)
    assert array_bits(session.pull()) == expected
    tensors = load_safetensors(download(server, f"{session.model}/export", "safetensors"))
    assert {name: bits(tensor) for name, tensor in tensors.items()} == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("rule", ["adadelta", "adagrad"])
def test_the_same_in_other_dtypes(session: Session, rule: str, sparse: bool, dtype: torch.dtype) -> None:
    mine, here = (ScaledNetwork(sparse=sparse, dtype=dtype) for _ in range(2))
    settings = {} if rule == "adadelta" else {"lr": 0.1, "initial_accumulator_value": 0.1}
    remote = session.attach(OPTIMIZERS[rule](mine.parameters(), **settings), module=mine)
    local = OPTIMIZERS[rule](here.parameters(), **settings)
    for number in range(8):
        gradients = {name: g.to(dtype) for name, g in drawn_gradients(number, sparse=sparse).items()}
        for module, optimizer in ((mine, remote), (here, local)):
            set_gradients(module, gradients)
            optimizer.step()
        assert parameter_bits(mine) == parameter_bits(here), number
        assert state_bits(remote.state_dict()) == state_bits(local.state_dict()), number


def test_two_optimizers_make_one_model(session: Session) -> None:
    mine, here = ScaledNetwork(sparse=True), ScaledNetwork(sparse=True)
    remote = session.attach(both(mine), module=mine)
    replay = Replay(here, both)
    for number in range(STEPS):
        remote.zero_grad()
        loss_of(mine, number).backward()
        gradients = gradients_of(mine)
        remote.step()
        assert parameter_bits(mine) == replay.push(gradients), number
        assert [state_bits(entry) for entry in remote.state_dict()] == replay.state(), number


def test_parameters_larger_than_a_message_and_without_elements(session: Session) -> None:
    def make() -> tuple[nn.ParameterDict, torch.optim.Optimizer]:
        draw = torch.Generator().manual_seed(7)
        module = nn.ParameterDict(
            {
                "table": torch.randn(70_001, 5, generator=draw),  # 1.4 MB, more than one chunk
                "empty": torch.zeros(0, 3),
                "hollow": torch.zeros(4, 0),  # at the same place
                "wide": torch.randn(300_007, generator=draw),
            }
        )
        return module, OPTIMIZERS["adagrad"](module.parameters(), lr=0.1)

    mine, optimizer = make()
    remote = session.attach(optimizer, module=mine)
    here, local = make()
    draw = torch.Generator().manual_seed(8)
    for step in range(3):
        ids = torch.randint(0, 70_001, (60_000 if step == 1 else 50,), generator=draw)
        rows = torch.randn(len(ids), 5, generator=draw)
        gradients = {
            "table": torch.sparse_coo_tensor(ids[None], rows, (70_001, 5)),
            "empty": torch.zeros(0, 3),
            "hollow": None if step == 1 else torch.zeros(4, 0),
            "wide": torch.randn(300_007, generator=draw),
        }
        for module, stepped in ((mine, remote), (here, local)):
            set_gradients(module, gradients)
            stepped.step()
        assert parameter_bits(mine) == parameter_bits(here), step
        fetched, held = (state_bits(optimizer.state_dict()) for optimizer in (remote, local))
        assert fetched == held, step


def test_the_same_with_arrays(session: Session) -> None:
    here = ScaledNetwork()
    replay = Replay(here, lambda model: OPTIMIZERS["adagrad"](model.parameters(), lr=0.05))
    values = {name: parameter.detach().numpy().copy() for name, parameter in here.named_parameters()}
    session.create(values, [{"rule": "adagrad", "params": list(values), "lr": 0.05}])
    for number in range(STEPS):
        gradients = drawn_gradients(number, sparse=True)
        expected = replay.push(gradients)
        table = gradients["table.weight"]
        handed = {name: g.numpy() for name, g in gradients.items() if name != "table.weight"}
        pair = (table._indices()[0].numpy(), table._values().numpy())
        if number % 2:
            receipt = session.push({**handed, "table.weight": pair})
            arrays = session.pull()
        else:
            receipt, arrays = session.exchange({**handed, "table.weight": pair})
        assert receipt.version == session.version == number + 1
        assert array_bits(arrays) == expected, number
        ids = [ROWS - 1, 0, int(pair[0][0])]
        rows = session.pull_rows("table.weight", ids)
        assert np.array_equal(rows, here.table.weight.detach().numpy()[ids])


# --- torch's numbers


def numbers_of(state_dict: dict[str, Any], number: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = state_dict["state"].get(number, {})
    return found


def become(module: nn.Module, optimizer: torch.optim.Optimizer, of: nn.Module, state: dict[str, Any]) -> None:
    """Take over parameters and state, not the groups: those are what the test sets."""
    groups = optimizer.state_dict()["param_groups"]
    module.load_state_dict(of.state_dict())
    optimizer.load_state_dict({"state": copy.deepcopy(state["state"]), "param_groups": groups})


def torchs_step(rule: str, module: ScaledNetwork, optimizer: torch.optim.Optimizer) -> None:
    """torch's step. Its Adadelta refuses row-sparse gradients: then the dense rule, on the rows named only."""
    table, gradient = module.table.weight, module.table.weight.grad
    if rule == "adagrad" or gradient is None or not gradient.is_sparse:
        optimizer.step()
        return
    untouched = torch.ones(len(table), dtype=torch.bool)
    untouched[gradient._indices()[0]] = False
    before = table.detach().clone()
    states = {name: value.clone() for name, value in optimizer.state[table].items()}
    table.grad = merged(gradient).to_dense()
    optimizer.step()
    with torch.no_grad():
        table[untouched] = before[untouched]
        for name in ("square_avg", "acc_delta"):
            optimizer.state[table][name][untouched] = states[name][untouched] if states else 0.0


@pytest.mark.parametrize(("rule", "settings", "kind"), CASES)
def test_a_step_from_equal_state_is_torchs(
    session: Session, rule: str, settings: dict[str, Any], kind: str
) -> None:
    mine, remote = attached(session, rule, settings)
    theirs = ScaledNetwork()
    rival = TORCH[rule](theirs.parameters(), **settings)
    for number in range(12):
        before = copy.deepcopy(mine)
        become(theirs, rival, mine, remote.state_dict())
        gradients = drawn_gradients(
            number, sparse=kind == "sparse" or (kind == "by turns" and number % 2 == 0)
        )
        set_gradients(mine, gradients)
        remote.step()
        set_gradients(theirs, gradients)
        torchs_step(rule, theirs, rival)
        assert_steps_close(mine, remote, theirs, rival, before)


def assert_steps_close(
    mine: nn.Module,
    remote: RemoteOptimizer,
    theirs: nn.Module,
    rival: torch.optim.Optimizer,
    before: nn.Module,
    gradient_ulps: int = 0,
) -> None:
    """Parameters and state within the bounds.

    Where the gradients themselves were up to `gradient_ulps` apart, their squares are twice that and the parameters,
    which are at most linear in them, that far apart before a step adds its own.
    """
    fetched, held = remote.state_dict(), rival.state_dict()
    for number, (name, parameter) in enumerate(mine.named_parameters()):
        old = before.get_parameter(name)
        assert_parameter_close(parameter, theirs.get_parameter(name), old, extra=gradient_ulps)
        assert_state_close(numbers_of(fetched, number), numbers_of(held, number), extra=2 * gradient_ulps)


def test_what_an_ulp_is() -> None:
    one = torch.tensor([1.0, 1.0, 1e-45, 2.0, 0.0])
    other = torch.tensor([1.0, 1.0 + 2**-23, -1e-45, 2.0 - 3 * 2**-23, -0.0])
    assert distance(one, other).tolist() == [0, 1, 2, 3, 0]
    with pytest.raises(ValueError, match="finite"):
        distance(one, torch.full((5,), torch.nan))
    # 1.0 to nearly nothing: an error of 2**-22 is two ulps of what was there before, and billions of what is left
    before, after = torch.tensor([1.0]), torch.tensor([1e-9])
    assert parameter_distance(after + 2**-22, after, before).item() == pytest.approx(2, abs=0.01)
    with pytest.raises(AssertionError, match="5"):
        assert_parameter_close(before + 5 * 2**-23, before, before)
    with pytest.raises(AssertionError, match="sum: 3 ulps"):
        assert_state_close({"sum": 1 + 3 * torch.tensor([2**-23])}, {"sum": torch.ones(1)})


# --- an operator steers


CHANGED_AT = 9


@pytest.mark.parametrize("rule", ["adadelta", "adagrad"])
def test_a_patched_learning_rate_holds_from_the_stated_version(
    server: RunningServer, session: Session, rule: str
) -> None:
    settings = {"lr": 0.4}
    mine, remote = attached(session, rule, settings)
    here, theirs = ScaledNetwork(), ScaledNetwork()
    local, rival = OPTIMIZERS[rule](here.parameters(), lr=0.4), TORCH[rule](theirs.parameters(), lr=0.4)
    for number in range(20):
        if number == CHANGED_AT:
            reply = patch_group(server, session.model, 0, lr=0.03)
            assert reply["effective_version"] == number + 1
            assert reply["lr"] == 0.03
            local.param_groups[0]["lr"] = rival.param_groups[0]["lr"] = 0.03
        before = copy.deepcopy(mine)
        become(theirs, rival, mine, remote.state_dict())
        gradients = drawn_gradients(number)
        for module, optimizer in ((mine, remote), (here, local), (theirs, rival)):
            set_gradients(module, gradients)
            optimizer.step()
        receipt = remote.last_receipt
        assert receipt is not None
        lr = 0.03 if receipt.version > CHANGED_AT else 0.4
        assert receipt.groups[0]["lr"] == receipt.effective_lr[0] == remote.param_groups[0]["lr"] == lr
        assert parameter_bits(mine) == parameter_bits(here), number
        assert_steps_close(mine, remote, theirs, rival, before)


# torch takes its norm in float32: over a few hundred squares that is within 4 ulps of the float64 one here. Adding
# 1e-6, dividing, and rounding the factor are an ulp each; multiplying by it is the last.
NORM_ULPS = 4
CLIPPED_GRADIENT_ULPS = NORM_ULPS + 4


@pytest.mark.parametrize("rule", ["adadelta", "adagrad"])
def test_an_added_clipping_hook_clips_as_torch_does(
    server: RunningServer, session: Session, rule: str
) -> None:
    mine, remote = attached(session, rule, {"lr": 0.4})
    theirs = ScaledNetwork()
    rival = TORCH[rule](theirs.parameters(), lr=0.4)
    here = ScaledNetwork()
    replay = Replay(here, lambda model: OPTIMIZERS[rule](model.parameters(), lr=0.4))
    factors = []
    norms = sorted(math.sqrt(square_sum(drawn_gradients(number))) for number in range(CHANGED_AT, 20))
    max_norm = norms[len(norms) // 2] * 0.99
    for number in range(20):
        if number == CHANGED_AT:
            reply = add_hook(server, session.model, "clip_grad_norm", "step_pre", {"max_norm": max_norm})
            assert reply["effective_version"] == number + 1
        before = copy.deepcopy(mine)
        become(theirs, rival, mine, remote.state_dict())
        gradients = drawn_gradients(number)
        set_gradients(mine, gradients)
        remote.step()
        set_gradients(theirs, gradients)
        clips = number >= CHANGED_AT
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm if clips else math.inf)
        rival.step()
        receipt = remote.last_receipt
        assert receipt is not None
        assert distance(norm, torch.tensor(receipt.gradient_norm)).item() <= NORM_ULPS
        exact = math.sqrt(square_sum(gradients))
        assert receipt.gradient_norm == pytest.approx(exact, rel=1e-14)
        expected = min(1.0, max_norm / (receipt.gradient_norm + 1e-6)) if clips else 1.0
        assert receipt.clip_factor == expected
        factors.append(expected)
        assert_steps_close(mine, remote, theirs, rival, before, CLIPPED_GRADIENT_ULPS if expected < 1 else 0)
        assert parameter_bits(mine) == replay.push(gradients, receipt.clip_factor), number
    # some are clipped and some are not
    assert 3 < sum(factor < 1 for factor in factors) < 20 - CHANGED_AT - 3
    reply = remove_hook(server, session.model, "clip_grad_norm-1")
    assert reply["effective_version"] == 21
    set_gradients(mine, drawn_gradients(CHANGED_AT + 1))
    remote.step()
    assert remote.last_receipt is not None
    assert remote.last_receipt.clip_factor == 1.0


def test_clipping_counts_rows_once(server: RunningServer, session: Session) -> None:
    """The norm is that of the gradient, in which a row that came twice is one sum."""
    mine, here = ScaledNetwork(sparse=True), ScaledNetwork(sparse=True)
    remote = session.attach(both(mine), module=mine)
    replay = Replay(here, both)
    add_hook(server, session.model, "clip_grad_norm", "step_pre", {"max_norm": 0.05})
    for number in range(10):
        gradients = drawn_gradients(number, sparse=True)
        set_gradients(mine, gradients)
        remote.step()
        receipt = remote.last_receipt
        assert receipt is not None
        assert receipt.gradient_norm == pytest.approx(math.sqrt(square_sum(gradients)), rel=1e-14)
        assert receipt.clip_factor == 0.05 / (receipt.gradient_norm + 1e-6) < 1
        assert parameter_bits(mine) == replay.push(gradients, receipt.clip_factor), number


SchedulerMaker = Callable[[torch.optim.Optimizer], Any]
SCHEDULERS: dict[str, tuple[dict[str, Any], SchedulerMaker]] = {
    "StepLR": (
        {"step_size": 4, "gamma": 0.5},
        lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5),
    ),
    "MultiStepLR": (
        {"milestones": [3, 5, 11], "gamma": 0.3},
        lambda optimizer: lr_scheduler.MultiStepLR(optimizer, milestones=[3, 5, 11], gamma=0.3),
    ),
    "ExponentialLR": ({"gamma": 0.9}, lambda optimizer: lr_scheduler.ExponentialLR(optimizer, gamma=0.9)),
    "LinearLR": (
        {"start_factor": 0.25, "total_iters": 8},
        lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=8),
    ),
    "CosineAnnealingLR": (
        {"T_max": 7, "eta_min": 0.01},
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=7, eta_min=0.01),
    ),
    "CosineAnnealingWarmRestarts": (
        {"T_0": 4, "T_mult": 2},
        lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=4, T_mult=2),
    ),
    "OneCycleLR": (
        {"max_lr": 0.9, "total_steps": 30},
        lambda optimizer: lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.9, total_steps=30, cycle_momentum=False
        ),
    ),
    "CyclicLR": (
        {"base_lr": 0.05, "max_lr": 0.6, "step_size_up": 3, "mode": "triangular2"},
        lambda optimizer: lr_scheduler.CyclicLR(
            optimizer, base_lr=0.05, max_lr=0.6, step_size_up=3, mode="triangular2", cycle_momentum=False
        ),
    ),
    "PolynomialLR": (
        {"total_iters": 9, "power": 2.0},
        lambda optimizer: lr_scheduler.PolynomialLR(optimizer, total_iters=9, power=2.0),
    ),
    "SequentialLR": (
        {
            "schedulers": [
                {"scheduler": "LinearLR", "arguments": {"start_factor": 0.1, "total_iters": 5}},
                {"scheduler": "ExponentialLR", "arguments": {"gamma": 0.8}},
            ],
            "milestones": [5],
        },
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [
                lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5),
                lr_scheduler.ExponentialLR(optimizer, gamma=0.8),
            ],
            milestones=[5],
        ),
    ),
    "ReduceLROnPlateau": (
        {"patience": 1, "factor": 0.5, "threshold": 0.2},
        lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5, threshold=0.2),
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_scheduler_hook_is_torchs_scheduler(server: RunningServer, session: Session, name: str) -> None:
    arguments, make = SCHEDULERS[name]
    mine, remote = attached(session, "adagrad", {"lr": 0.4})
    here = ScaledNetwork()
    local = OPTIMIZERS["adagrad"](here.parameters(), lr=0.4)
    scheduler = None
    lrs = []
    for number in range(24):
        if number == 4:
            settings = {"scheduler": name, "arguments": arguments}
            reply = add_hook(server, session.model, "lr_scheduler", "step_post", settings)
            assert reply["effective_version"] == number + 1
            scheduler = make(local)
        lr = local.param_groups[0]["lr"]
        lrs.append(lr)

        def closure(number: int = number) -> Tensor:
            remote.zero_grad()
            loss = loss_of(mine, number)
            loss.backward()
            return loss

        loss = remote.step(closure)
        local.zero_grad()
        here_loss = loss_of(here, number)
        here_loss.backward()
        local.step()
        assert bits(loss) == bits(here_loss)
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(here_loss.item())
        elif scheduler is not None:
            scheduler.step()
        receipt = remote.last_receipt
        assert receipt is not None
        assert receipt.effective_lr[0] == lr
        assert receipt.groups[0]["lr"] == remote.param_groups[0]["lr"] == local.param_groups[0]["lr"]
        assert parameter_bits(mine) == parameter_bits(here), number
    assert len(set(lrs)) > 2


# --- checkpoints leave
