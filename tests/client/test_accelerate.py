"""Hugging Face Accelerate around a remote optimizer: its documented training loop, unchanged, bit-equal to local."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from pushstep.proto.errors import LocalParameterEdit
from tests.support.servers.harness import RunningServer
from tests.support.trainings.bits import check_state_dict
from tests.support.trainings.network import ROWS, Network, loss_of
from tests.support.trainings.optimizers import Make, adadelta, adagrad, both
from tests.support.trainings.twins import Twins


@pytest.fixture(autouse=True)
def accelerate() -> Iterator[Any]:
    """Accelerate, imported when the first test runs. Its state is the process's; the next test's is another training."""
    import accelerate.state

    yield accelerate
    forget(accelerate)


def forget(accelerate: Any) -> None:
    """Have Accelerate begin again."""
    for name in ("AcceleratorState", "GradientState", "PartialState"):
        getattr(accelerate.state, name)._reset_state()


def _data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, ROWS, (20, 6), generator=generator)
    return DataLoader(TensorDataset(ids, torch.randn(20, 6, 2, generator=generator)), batch_size=None)


def _train(accelerator: Any, model: Any, optimizer: Any, data: Any, scheduler: Any, batches: slice) -> None:
    """The loop of Accelerate's documentation."""
    for ids, numbers in list(data)[batches]:
        with accelerator.accumulate(model):
            accelerator.backward(model(ids, numbers).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.7)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def _compare(remote: torch.nn.Module, local: torch.nn.Module) -> None:
    theirs = dict(local.named_parameters())
    for name, parameter in remote.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


def _shown(server: RunningServer, model: str) -> tuple[int, int]:
    shown = server.rest("GET", f"/v1/models/{model}").json()
    return shown["timeline"], shown["version"]


@pytest.mark.parametrize("make", [adadelta, adagrad])
def test_the_documented_loop_with_checkpoints(
    accelerate: Any, server: RunningServer, model_name: str, make: Make, tmp_path: Path
) -> None:
    """Accumulation, clipping, a scheduler; saved in the middle, trained on, gone back to, and trained on again."""
    start, ends = Network(), list[Any]()
    for side in ("remote", "local"):
        forget(accelerate)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model: Any = copy.deepcopy(start)
        optimizer: Any = make(model)
        if side == "remote":
            optimizer = server.connect(model_name).attach(optimizer, module=model)
        scheduler: Any = lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        prepared = accelerator.prepare(model, optimizer, _data(), scheduler)
        if side == "remote":
            assert _shown(server, model_name) == (1, 0), "prepare() loads what state_dict() gave: nothing"
        _train(accelerator, *prepared, slice(0, 10))
        accelerator.save_state(str(tmp_path / side))
        for repeated in range(2):  # at the version that was saved, then from one that is further on
            accelerator.load_state(str(tmp_path / side))
            if side == "remote" and not repeated:
                assert _shown(server, model_name)[0] == 1, "nothing was different"
            _train(accelerator, *prepared, slice(10, 20))
        if side == "remote":
            assert _shown(server, model_name)[0] == 2, "going back is a restore, for everyone"
            exported = server.connect(model_name, "reader").pull()
            assert all(
                (exported[name] == p.detach().numpy()).all() for name, p in prepared[0].named_parameters()
            )
        ends.append((prepared[0], prepared[1].state_dict(), prepared[3].get_last_lr()))
    _compare(ends[0][0], ends[1][0])
    check_state_dict(ends[0][1], ends[1][1])
    assert ends[0][2] == ends[1][2]


def test_prepare_in_every_worker_changes_nothing(
    accelerate: Any, server: RunningServer, model_name: str
) -> None:
    """Whatever one of them does to the model, all would see; `one` steps between the others' two calls too."""
    one = Network()
    stepping = server.connect(model_name, "one").attach(adagrad(one), module=one)
    prepared = []
    for number in range(3):
        model = Network()
        optimizer = server.connect(model_name, f"w{number}").attach(adagrad(model), module=model)
        fetch = optimizer.state_dict

        def fetch_and_step(fetch: Any = fetch) -> Any:
            found = fetch()
            for parameter in one.parameters():
                parameter.grad = torch.ones_like(parameter)
            stepping.step()
            return found

        optimizer.state_dict = fetch_and_step  # type: ignore[method-assign]
        scheduler = lr_scheduler.StepLR(optimizer, step_size=1000)
        prepared.append(accelerate.Accelerator(cpu=True).prepare(model, optimizer, _data(), scheduler))
        assert _shown(server, model_name) == (1, number * 3 + 1)
        _train(accelerate.Accelerator(cpu=True), *prepared[-1], slice(0, 2))
    assert _shown(server, model_name) == (1, 9)


def test_a_list_of_optimizers_is_prepared_as_one(
    accelerate: Any, server: RunningServer, model_name: str
) -> None:
    twins = Twins(server.connect(model_name), Network(sparse=True), both)
    accelerator = accelerate.Accelerator(cpu=True)
    model, remote = accelerator.prepare(twins.model, twins.remote)
    local = accelerator.prepare(twins.local_model, *twins.local)
    for seed in range(3):
        for side, optimizers in ((model, [remote]), (local[0], local[1:])):
            accelerator.backward(loss_of(side, seed))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        twins.check()
    assert _shown(server, model_name) == (1, 3)
    twins.check_state()


def test_a_checkpoint_of_torch_s_is_gone_back_to(server: RunningServer, model_name: str) -> None:
    """Module first, then the optimizer, as torch's documentation has it; without the optimizer it is an edit."""
    model = Network()
    remote = server.connect(model_name).attach(adadelta(model), module=model)
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": remote.state_dict()})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    remote.step()
    model.load_state_dict(saved["model"])
    remote.load_state_dict(saved["optimizer"])
    assert _shown(server, model_name) == (2, 1), "nobody ever saw the one without the other"
    assert all(torch.equal(model.state_dict()[name], value) for name, value in saved["model"].items())
    pulled = server.connect(model_name, "reader").pull()
    assert all((pulled[name] == value.numpy()).all() for name, value in saved["model"].items())
    remote.step()
    model.load_state_dict(saved["model"])
    with pytest.raises(LocalParameterEdit):
        remote.step()
