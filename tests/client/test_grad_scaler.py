"""torch.amp.GradScaler on a remote optimizer, unchanged: torch's gradients, and a worker that is there when it skips."""

from __future__ import annotations

import math

import pytest
import torch
from torch.amp import GradScaler

from pushstep.client import Outcome
from pushstep.proto.errors import LocalParameterEdit
from tests.support.servers.harness import RunningServer
from tests.support.trainings.bits import check_state_dict
from tests.support.trainings.network import Network, loss_of
from tests.support.trainings.optimizers import Make, adadelta, adagrad, backward, both
from tests.support.trainings.twins import Twins


def _scalers(**options: float) -> list[GradScaler]:
    settings = {"init_scale": 2.0**10, "growth_interval": 2, **options}
    return [GradScaler("cpu", **settings) for _ in range(2)]  # type: ignore[arg-type]


def _scaled_step(twins: Twins, scalers: list[GradScaler], seed: int, *, inf: bool, unscale: str) -> None:
    """One iteration of both sides as torch's documentation writes it."""
    sides: list[tuple[torch.nn.Module, list[torch.optim.Optimizer]]]
    sides = [(twins.model, [twins.remote]), (twins.local_model, twins.local)]
    for (model, optimizers), scaler in zip(sides, scalers, strict=True):
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(loss_of(model, seed)).backward()
        if inf:
            for (
                optimizer
            ) in optimizers:  # of a list: a push is all or nothing, local optimizers skip one by one
                gradient = optimizer.param_groups[0]["params"][0].grad
                (gradient._values() if gradient.is_sparse else gradient).view(-1)[0] = math.inf
        if unscale != "by the step":
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            dense = [p for p in model.parameters() if p.grad is not None and not p.grad.is_sparse]
            torch.nn.utils.clip_grad_norm_(dense, 0.5)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    twins.check()
    assert scalers[0].state_dict() == scalers[1].state_dict()


@pytest.mark.parametrize("unscale", ["by the step", "before clipping"])
@pytest.mark.parametrize(
    ("make", "sparse"), [(adadelta, False), (adagrad, False), (adagrad, True), (both, True)]
)
def test_training_is_bit_equal_and_a_step_with_inf_is_left_out(
    server: RunningServer, model_name: str, make: Make, sparse: bool, unscale: str
) -> None:
    twins = Twins(server.connect(model_name), Network(sparse=sparse), make)
    scalers = _scalers()
    outcomes, scales = [], []
    for seed, inf in enumerate([False, True, False, False, True, False]):
        held = [p.detach().clone() for p in twins.model.parameters()]
        _scaled_step(twins, scalers, seed, inf=inf, unscale=unscale)
        unmoved = all(torch.equal(p, h) for p, h in zip(twins.model.parameters(), held, strict=True))
        assert unmoved == inf
        assert twins.remote.last_receipt is not None
        outcomes.append(twins.remote.last_receipt.outcome)
        scales.append(scalers[0].get_scale())
    applied, skipped = Outcome.APPLIED, Outcome.SKIPPED
    assert outcomes == [applied, skipped, applied, applied, skipped, applied]
    assert scales == [1024.0, 512.0, 512.0, 1024.0, 512.0, 512.0]
    assert twins.remote.last_receipt is not None
    assert (twins.remote.last_receipt.sequence, twins.remote.last_receipt.version) == (6, 4)
    twins.check_state()


def test_the_gradients_are_torch_s_for_any_scale(server: RunningServer, model_name: str) -> None:
    """Bit for bit what `unscale_` makes of them: a scale that is no power of two shows how it is divided."""
    model = Network(sparse=True)
    remote = server.connect(model_name).attach(adagrad(model), module=model)
    scaler = GradScaler("cpu", init_scale=1000.0 / 3.0)
    scaler.scale(loss_of(model, 0)).backward()
    copies = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
    for copy, parameter in zip(copies, model.parameters(), strict=True):
        assert parameter.grad is not None
        copy.grad = parameter.grad.clone()
    scaler.unscale_(torch.optim.SGD(copies))
    scaler.step(remote)
    for copy, parameter in zip(copies, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert copy.grad is not None
        assert torch.equal(parameter.grad.to_dense(), copy.grad.to_dense())


def test_a_skip_push_is_a_push(server: RunningServer, model_name: str) -> None:
    """It takes a sequence and brings what others did meanwhile; nothing is stepped."""
    model, other = Network(), Network()
    session = server.connect(model_name)
    remote = session.attach(adagrad(model), module=model)
    another = server.connect(model_name, "w1").attach(adagrad(other), module=other)
    backward(other, [another], 0)
    another.step()
    scaler = GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    assert model.out.bias.grad is not None
    model.out.bias.grad.fill_(math.nan)
    scaler.step(remote)
    receipt = remote.last_receipt
    assert receipt is not None
    assert (receipt.outcome, receipt.reason, receipt.sequence, receipt.version) == (
        Outcome.SKIPPED,
        "skip_push",
        1,
        1,
    )
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    check_state_dict(remote.state_dict(), another.state_dict())
    workers = server.rest("GET", f"/v1/models/{model_name}/workers").json()["workers"]
    assert [worker["outcomes"] for worker in workers] == [{"skipped": 1}, {"applied": 1}]


def test_a_step_that_failed_may_be_tried_again(server: RunningServer, model_name: str) -> None:
    """The scaler does not know that the gradients are unscaled already and hands the same scale again."""
    twins = Twins(server.connect(model_name), Network(), adadelta)
    scalers = _scalers()
    for model, optimizers, scaler in zip(
        [twins.model, twins.local_model], [[twins.remote], twins.local], scalers, strict=True
    ):
        backward(model, optimizers, 0)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(scaler.scale(torch.ones(())))
    sent = twins.remote._worker.step

    def broken(*_: object, **__: object) -> None:
        raise ConnectionError

    twins.remote._worker.step = broken  # type: ignore[assignment, method-assign]
    with pytest.raises(ConnectionError):
        scalers[0].step(twins.remote)
    twins.remote._worker.step = sent  # type: ignore[method-assign]
    assert not {"grad_scale", "found_inf"} & vars(twins.remote).keys()
    scalers[0].step(twins.remote)
    scalers[1].step(twins.local[0])
    twins.check_state()


def test_a_refused_step_leaves_the_scaler_usable(server: RunningServer, model_name: str) -> None:
    model = Network()
    remote = server.connect(model_name).attach(adagrad(model), module=model)
    scaler = GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with torch.no_grad():
        model.out.bias.add_(1.0)
    with pytest.raises(LocalParameterEdit):
        scaler.step(remote)
    assert not {"grad_scale", "found_inf"} & vars(remote).keys()
    remote.upload()
    scaler.step(remote)
    scaler.update()
    assert remote.last_receipt is not None
    assert remote.last_receipt.outcome is Outcome.APPLIED
