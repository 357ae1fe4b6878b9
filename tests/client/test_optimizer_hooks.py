"""torch's six hook registrations on a remote optimizer: moved over at attach, run once, in torch's order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.servers.harness import RunningServer
from tests.support.trainings.network import Network, loss_of
from tests.support.trainings.optimizers import Make, adadelta, both


def _log_hooks(optimizer: torch.optim.Optimizer, log: list[str], name: str) -> dict[str, Any]:
    def note(what: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            log.append(f"{name}.{what}")

        return hook

    return {
        what: getattr(optimizer, f"register_{what}_hook")(note(what))
        for what in (
            "step_pre",
            "step_post",
            "state_dict_pre",
            "state_dict_post",
            "load_state_dict_pre",
            "load_state_dict_post",
        )
    }


@pytest.mark.parametrize("make", [adadelta, both])
def test_hooks_move_over_and_run_once_in_torch_s_order(
    server: RunningServer, model_name: str, make: Make
) -> None:
    model, log = Network(), list[str]()
    made = make(model)
    originals = [made] if isinstance(made, torch.optim.Optimizer) else list(made)
    names = [str(number) for number in range(len(originals))]
    for name, optimizer in zip(names, originals, strict=True):
        _log_hooks(optimizer, log, name)
    remote = server.connect(model_name).attach(made, module=model)
    _log_hooks(remote, log, "later")
    names.append("later")
    kept: list[Any] = []
    loss_of(model, 0).backward()
    acts: dict[str, Callable[[], Any]] = {
        "step": remote.step,
        "state_dict": lambda: kept.append(remote.state_dict()),
        "load_state_dict": lambda: remote.load_state_dict(kept[0]),
    }
    for what, act in acts.items():
        log.clear()
        act()
        assert log == [f"{name}.{what}_{when}" for when in ("pre", "post") for name in names]


def test_hooks_are_given_the_remote_optimizer_and_may_change_what_passes(
    server: RunningServer, model_name: str
) -> None:
    model = Network()
    original = adadelta(model)
    seen: list[torch.optim.Optimizer] = []

    def stamp(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(optimizer)
        return {**state_dict, "stamped": True}

    def unstamp(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(optimizer)
        return {key: value for key, value in state_dict.items() if key != "stamped"}

    original.register_state_dict_post_hook(stamp)
    original.register_load_state_dict_pre_hook(unstamp)
    remote = server.connect(model_name).attach(original, module=model)
    state_dict = remote.state_dict()
    assert state_dict["stamped"]
    remote.load_state_dict(state_dict)
    assert seen == [remote, remote]


@pytest.mark.parametrize("make", [adadelta, both])
def test_a_handle_from_before_attach_still_removes_its_hook(
    server: RunningServer, model_name: str, make: Make
) -> None:
    model, log = Network(), list[str]()
    made = make(model)
    originals = [made] if isinstance(made, torch.optim.Optimizer) else list(made)
    handles = [_log_hooks(optimizer, log, str(number)) for number, optimizer in enumerate(originals)]
    remote = server.connect(model_name).attach(made, module=model)
    handles[-1]["step_pre"].remove()
    handles[0]["step_post"].remove()
    late = remote.register_step_pre_hook(lambda *_: log.append("late"))
    remote.register_step_pre_hook(lambda *_: log.append("last"))
    late.remove()
    loss_of(model, 0).backward()
    remote.step()
    numbers = [str(number) for number in range(len(originals))]
    assert log == [*(f"{n}.step_pre" for n in numbers[:-1]), "last", *(f"{n}.step_post" for n in numbers[1:])]
