"""Train N, kill -9, start again, train M: to the bit what N + M make without a kill, whatever is trained and how."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch.optim import lr_scheduler

from pushstep.client import RemoteOptimizer, Session
from pushstep.optim import keras, mlx
from tests.support.servers.harness import RunningServer, kill_and_restart, start_server
from tests.support.servers.operators import add_hook, set_policy
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import Make, adadelta, adagrad, backward, both

BEFORE, AFTER = 5, 4
Hooks = Sequence[tuple[str, str, dict[str, Any]]]
CLIP: Hooks = [("clip_grad_norm", "step_pre", {"max_norm": 0.5})]
SCHEDULE: Hooks = [
    ("lr_scheduler", "step_post", {"scheduler": "StepLR", "arguments": {"step_size": 2, "gamma": 0.5}})
]
AVERAGE: Hooks = [("ema", "step_post", {"momentum": 0.6, "overwrite_frequency": 4})]
CHANGE: Hooks = [
    ("gradient_noise", "step_pre", {"eta": 0.01, "seed": 3}),
    ("gradient_centralization", "step_pre", {}),
    ("clip_grad_value", "step_pre", {"clip_value": 0.05}),
    ("clipnorm", "step_pre", {"clipnorm": 0.1}),
    *CLIP,
]


@dataclass(frozen=True)
class Case:
    """One training."""

    make: Make
    sparse: bool = False
    shared_memory: bool = False
    workers: int = 1
    policy: dict[str, Any] | None = None
    hooks: Hooks = ()
    # a scheduler of the lead's own
    schedules: bool = False


CASES = {
    "adadelta": Case(adadelta),
    "adagrad": Case(adagrad),
    "adadelta by rows": Case(adadelta, sparse=True),
    "adagrad by rows": Case(adagrad, sparse=True),
    "both rules": Case(both, sparse=True),
    "keras": Case(lambda model: keras.Adadelta(model.parameters(), learning_rate=0.7, rho=0.8)),
    "mlx": Case(lambda model: mlx.AdaDelta(model.parameters(), learning_rate=0.7, rho=0.8)),
    "mlx adagrad": Case(lambda model: mlx.Adagrad(model.parameters(), learning_rate=0.1)),
    "keras adagrad": Case(lambda model: keras.Adagrad(model.parameters(), learning_rate=0.1)),
    "shared memory": Case(adadelta, shared_memory=True),
    "shared memory by rows": Case(adagrad, sparse=True, shared_memory=True),
    "clipped": Case(adagrad, hooks=CLIP),
    "scheduled by a hook": Case(adadelta, hooks=SCHEDULE),
    "averaged": Case(adadelta, hooks=AVERAGE),
    "averaged by rows": Case(adagrad, sparse=True, shared_memory=True, hooks=[*AVERAGE, *CLIP]),
    "changed in every way": Case(adagrad, hooks=CHANGE),
    "changed by rows, in a round": Case(
        both,
        sparse=True,
        workers=2,
        policy={"policy": "sync", "min_workers": 2},
        hooks=[*CHANGE, *AVERAGE, *SCHEDULE],
    ),
    "scheduled by the lead": Case(adagrad, schedules=True),
    "two workers": Case(adadelta, sparse=True, workers=2, policy={"policy": "async", "scale": True}),
    "a round of three": Case(
        adagrad,
        workers=3,
        policy={"policy": "sync", "reduce": "mean", "min_workers": 3},
        hooks=[*CLIP, *SCHEDULE],
    ),
    "a round by rows, in shared memory": Case(
        both, sparse=True, shared_memory=True, workers=2, policy={"policy": "sync", "min_workers": 2}
    ),
}


class Training:
    """A case under way on one server."""

    def __init__(self, server: RunningServer, model: str, case: Case) -> None:
        self.case = case
        self.networks = [Network(sparse=case.sparse) for _ in range(case.workers)]
        self.sessions: list[Session] = []
        self.remotes: list[RemoteOptimizer] = []
        for number, network in enumerate(self.networks):
            session = server.connect(
                model,
                f"w{number}",
                shared_memory=case.shared_memory,
                retry_for_s=60.0,
                **({"address": f"unix:{server.unix}"} if case.shared_memory else {}),
            )
            self.sessions.append(session)
            self.remotes.append(session.attach(case.make(network), module=network))
        for hook in case.hooks:
            add_hook(server, model, *hook)
        if case.policy is not None:
            set_policy(server, model, **case.policy)
        self.scheduler = lr_scheduler.StepLR(self.remotes[0], 2, gamma=0.5) if case.schedules else None

    def step(self, seed: int) -> None:
        """A step of each worker: in turn, or together in a round."""
        rounds = (self.case.policy or {}).get("policy") == "sync"
        with ThreadPoolExecutor(len(self.remotes)) as pool:
            for number, (network, remote) in enumerate(zip(self.networks, self.remotes, strict=True)):
                backward(network, [remote], seed * 10 + number)
                if not rounds:
                    remote.step()
            if rounds:
                list(pool.map(lambda remote: remote.step(), self.remotes))
        if self.scheduler is not None:
            self.scheduler.step()

    def result(self, server: RunningServer) -> tuple[int, list[torch.Tensor], Any]:
        """The version, and everything that the model holds."""
        versions = [remote.last_receipt.version for remote in self.remotes if remote.last_receipt is not None]
        return max(versions), self._held(server), self.sessions[0].pull()

    def _held(self, server: RunningServer) -> list[Any]:
        """The state_dict, the hooks with their state, and their averages."""
        model = f"/v1/models/{self.sessions[0].model}"
        hooks = server.rest("GET", f"{model}/state-dict").json()["hooks"]
        averages = [
            dict(
                sorted(
                    load(
                        server.rest("GET", f"{model}/export", params={"average": hook["id"]}).content
                    ).items()
                )
            )
            for hook in hooks
            if hook["name"] == "ema"
        ]
        return _tensors([self.remotes[0].state_dict(), hooks, averages])

    def close(self) -> None:
        """Close the sessions."""
        for session in self.sessions:
            session.close()


def _tensors(state: Any) -> list[Any]:
    """The tensors and numbers of a state_dict, in order."""
    if isinstance(state, dict):
        return [found for key in state for found in (key, *_tensors(state[key]))]
    if isinstance(state, (list, tuple)):
        return [found for entry in state for found in _tensors(entry)]
    return [state]


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True)
    )


def _trained(
    data: Path, case: Case, level: str, between: Callable[[RunningServer], RunningServer]
) -> tuple[int, list[Any], Any]:
    server = start_server(data, "--durability", level)
    try:
        training = Training(server, "m", case)
        for seed in range(BEFORE):
            training.step(seed)
        server = between(server)
        for seed in range(BEFORE, BEFORE + AFTER):
            training.step(seed)
        result = training.result(server)
        receipts = [remote.last_receipt for remote in training.remotes]
        assert all(receipt is not None and receipt.timeline == 1 for receipt in receipts)
        training.close()
        assert server.stop() == 0
        return result
    finally:
        server.kill()


@pytest.mark.parametrize("name", CASES)
def test_a_kill_changes_nothing(tmp_path: Path, name: str) -> None:
    """Nobody has to join again, and nobody is told of anything: it was as if the network had been away."""
    case = CASES[name]
    level = "everysec" if name in ("adagrad", "shared memory") else "durable"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        straight = _trained(tmp_path / "straight", case, "applied", lambda server: server)
        killed = _trained(tmp_path / "killed", case, level, kill_and_restart)
    assert killed[0] == straight[0]
    assert _same(killed[1], straight[1])
    assert killed[2].keys() == straight[2].keys()
    assert all((killed[2][key] == straight[2][key]).all() for key in killed[2])
