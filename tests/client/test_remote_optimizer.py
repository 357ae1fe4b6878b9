"""A RemoteOptimizer is torch's optimizer to whoever holds it, and its steps are the local optimizer's, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pushstep.client import Outcome, RemoteOptimizer
from pushstep.optim import Adadelta, Adagrad
from pushstep.proto.errors import LocalParameterEdit, NonfiniteGradient, NotAttached
from tests.support.processes.forked import workers
from tests.support.servers.harness import RunningServer
from tests.support.trainings.network import Network, finite, loss_of
from tests.support.trainings.optimizers import Make, adadelta, adagrad, backward, both
from tests.support.trainings.twins import Twins

RULES = pytest.mark.parametrize("make", [adadelta, adagrad])


def test_it_is_an_optimizer(server: RunningServer, model_name: str) -> None:
    twins = Twins(server.connect(model_name), Network(), adadelta)
    remote, original = twins.remote, twins.original
    assert isinstance(original, Adadelta)
    assert isinstance(remote, torch.optim.Optimizer)
    assert remote.state == {}
    assert remote.defaults == original.defaults
    assert len(remote.param_groups) == 1
    assert remote.param_groups[0] is original.param_groups[0]
    assert [id(p) for p in remote.param_groups[0]["params"]] == [id(p) for p in twins.model.parameters()]
    assert model_name in repr(remote) and "lr=0.7" in repr(remote)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [adadelta, adagrad, both])
def test_steps_and_state_are_the_local_ones(
    server: RunningServer, model_name: str, make: Make, dtype: torch.dtype
) -> None:
    twins = Twins(server.connect(model_name), Network(dtype=dtype), make)
    before = [p.detach().clone() for p in twins.model.parameters()]
    twins.check_state()
    for seed in range(5):
        twins.step(seed)
        twins.check_state()
        assert twins.remote.last_receipt is not None
        assert twins.remote.last_receipt.outcome is Outcome.APPLIED
        assert twins.remote.last_receipt.version == seed + 1
    assert finite(twins.model)
    # half types swallow Adadelta's first small steps
    if dtype.itemsize > 2:
        assert all(not torch.equal(p, b) for p, b in zip(twins.model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [adadelta, adagrad, both])
def test_sparse_embeddings_with_repeated_rows(
    server: RunningServer, model_name: str, make: Make, dtype: torch.dtype
) -> None:
    model = Network(sparse=True, dtype=dtype)
    twins = Twins(server.connect(model_name), model, make)
    table = model.table.weight
    untouched = table.detach().clone()[5:]
    twins.step(0)
    assert table.grad is not None and table.grad.is_sparse
    ids = table.grad._indices()[0].tolist()
    assert len(ids) > len(set(ids)), "the batch must repeat a row"
    twins.step(1, 2, 3)
    assert torch.equal(table.detach()[5:], untouched)
    twins.check_state()


def test_dense_and_sparse_gradients_of_one_parameter(server: RunningServer, model_name: str) -> None:
    """Which of the two it is belongs to each gradient, as in torch."""
    model = Network(sparse=True)
    twins = Twins(server.connect(model_name), model, adagrad)
    for seed, sparse in enumerate([True, False, True, True, False]):
        model.table.sparse = twins.local_model.table.sparse = sparse  # type: ignore[union-attr,assignment]
        twins.step(seed)
    twins.check_state()


@RULES
def test_edits_of_groups_take_effect_on_the_next_step(
    server: RunningServer, model_name: str, make: Make
) -> None:
    twins = Twins(server.connect(model_name), Network(), make)
    edits: list[dict[str, Any]] = [
        {"lr": 0.03},
        {"eps": 1e-3, "weight_decay": 0.1},
        {"maximize": True},
        {"lr": 2},
    ]
    for seed, edit in enumerate(edits):
        twins.remote.param_groups[0].update(edit)
        twins.local[0].param_groups[0].update(edit)
        twins.step(seed)
        assert twins.remote.last_receipt is not None
        assert edit.items() <= twins.remote.last_receipt.groups[0].items()
    group = server.rest("GET", f"/v1/models/{model_name}/param-groups/0").json()
    assert (group["lr"], group["eps"], group["weight_decay"], group["maximize"]) == (2.0, 1e-3, 0.1, True)


@RULES
def test_a_tensor_lr_is_compared_by_value_and_written_in_place(
    server: RunningServer, model_name: str, make: Make
) -> None:
    def with_tensor(model: nn.Module) -> torch.optim.Optimizer:
        made = make(model)
        assert isinstance(made, torch.optim.Optimizer)
        made.param_groups[0]["lr"] = torch.tensor(0.1)
        return made

    twins = Twins(server.connect(model_name), Network(), with_tensor)
    lr = twins.remote.param_groups[0]["lr"]
    twins.step(0)
    for group in (twins.remote.param_groups[0], twins.local[0].param_groups[0]):
        group["lr"].mul_(3)
    twins.step(1)
    # 0.3 is no float32: what comes back rounds, and that is no edit of this worker's
    path = f"/v1/models/{model_name}/param-groups/0"
    assert server.rest("PATCH", path, json={"lr": 0.3}).status_code == 200
    backward(twins.model, [twins.remote], 2)
    twins.remote.step()
    assert twins.remote.param_groups[0]["lr"] is lr
    assert torch.equal(lr, torch.tensor(0.3))
    backward(twins.model, [twins.remote], 3)
    twins.remote.step()
    assert server.rest("GET", path).json()["lr"] == 0.3
    state_dict = twins.remote.state_dict()
    assert torch.equal(state_dict["param_groups"][0]["lr"], torch.tensor(0.3))
    assert state_dict["param_groups"][0]["lr"] is not lr


@RULES
def test_missing_gradients_are_skipped_and_zero_ones_step(
    server: RunningServer, model_name: str, make: Make
) -> None:
    twins = Twins(server.connect(model_name), Network(), make)
    twins.step(0)
    for set_to_none, steps in ((True, 1.0), (False, 2.0)):
        for model, optimizers in ((twins.model, [twins.remote]), (twins.local_model, twins.local)):
            loss_of(model, 1).backward()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=set_to_none)
            model.out.weight.grad = torch.ones_like(model.out.weight)  # type: ignore[union-attr,arg-type]
            for optimizer in optimizers:
                optimizer.step()
        twins.check_state()
        assert float(twins.remote.state_dict()["state"][0]["step"]) == steps
        assert (twins.model.table.weight.grad is None) is set_to_none


def test_a_parameter_that_never_stepped_has_torch_s_state(server: RunningServer, model_name: str) -> None:
    twins = Twins(server.connect(model_name), Network(), both)
    for model, optimizers in ((twins.model, [twins.remote]), (twins.local_model, twins.local)):
        model.hidden.weight.grad = torch.ones(4, 5)  # type: ignore[union-attr]
        for optimizer in optimizers:
            optimizer.step()
    twins.check_state()
    table, dense = twins.remote.state_dict()
    assert float(table["state"][0]["step"]) == 0.0
    assert list(dense["state"]) == [0]


def test_no_gradient_at_all_sends_nothing(server: RunningServer, model_name: str) -> None:
    twins = Twins(server.connect(model_name), Network(), adadelta)
    twins.step(0)
    receipt = twins.remote.last_receipt
    twins.remote.zero_grad()
    assert twins.remote.step() is None
    assert twins.remote.step(lambda: torch.tensor(4.0)) == 4.0
    assert twins.remote.last_receipt is receipt
    assert server.rest("GET", f"/v1/models/{model_name}").json()["version"] == 1


def test_a_closure_runs_with_gradients_and_its_loss_comes_back(
    server: RunningServer, model_name: str
) -> None:
    twins = Twins(server.connect(model_name), Network(), adagrad)

    def closure_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], float]:
        def closure() -> float:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = loss_of(model, 3)
            loss.backward()
            return loss.item()

        return closure

    for _ in range(3):
        got = twins.remote.step(closure_of(twins.model, twins.remote))
        assert got == twins.local[0].step(closure_of(twins.local_model, twins.local[0]))
        twins.check()
    worker = server.rest("GET", f"/v1/models/{model_name}/workers").json()["workers"][0]
    assert worker["metrics"] == {"loss": got}


def test_gradients_of_any_memory_layout(server: RunningServer, model_name: str) -> None:
    model = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    local = copy.deepcopy(model)
    remote = server.connect(model_name).attach(adagrad(model), module=model)
    twin = adagrad(local)
    pictures = torch.randn(2, 2, 5, 5)
    for _ in range(2):
        for one, optimizer in ((model, remote), (local, twin)):
            optimizer.zero_grad()
            one(pictures).square().sum().backward()
            one.bias.grad = torch.ones(1).expand(3)  # a view whose elements share memory
            optimizer.step()
        assert model.weight.grad is not None and not model.weight.grad.is_contiguous()
        assert torch.equal(model.weight, local.weight) and torch.equal(model.bias, local.bias)


# --- the original, copies, forks


@pytest.mark.parametrize("make", [adadelta, both])
def test_the_originals_give_up_their_step_and_their_state(
    server: RunningServer, model_name: str, make: Make
) -> None:
    model = Network()
    made = make(model)
    originals = [made] if isinstance(made, torch.optim.Optimizer) else list(made)
    backward(model, originals, 0)
    for original in originals:
        original.step()
    server.connect(model_name).attach(made, module=model)
    for original in originals:
        assert original.state == {}
        with pytest.raises(NotAttached, match=r"call step\(\) of what attach\(\) returned"):
            original.step()


@pytest.mark.parametrize(
    "duplicate",
    [pickle.dumps, copy.copy, copy.deepcopy, lambda optimizer: torch.save(optimizer, io.BytesIO())],
    ids=["pickle", "copy", "deepcopy", "torch.save"],
)
def test_it_cannot_be_copied(
    server: RunningServer, model_name: str, duplicate: Callable[[RemoteOptimizer], Any]
) -> None:
    remote = Twins(server.connect(model_name), Network(), adadelta).remote
    with pytest.raises(TypeError, match=r"save its state_dict\(\)"):
        duplicate(remote)


FORK = """
    import os, sys, warnings
    import torch
    from pushstep.client import connect
    from pushstep.proto.errors import ForkedSession

    model = torch.nn.Linear(2, 1)
    session = connect(sys.argv[1], model=sys.argv[2], worker="parent", timeout_s=20, retry_for_s=20)
    optimizer = session.attach(torch.optim.Adagrad(model.parameters()), module=model)

    def step():
        model.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    step()
    child = os.fork()
    if child == 0:
        for call in (step, session.pull, optimizer.state_dict, lambda: session.push({})):
            try:
                call()
            except ForkedSession as error:
                assert str(os.getppid()) in error.message
            else:
                os._exit(3)
        session.close()
        sys.exit(0)  # through the interpreter's end, as a DataLoader's worker goes
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    step()
    print(session, optimizer.last_receipt.version)
    session.close()
"""


def test_a_forked_child_is_refused_and_leaves_the_parent_alone(
    server: RunningServer, model_name: str
) -> None:
    done = workers().call(textwrap.dedent(FORK), server.grpc, model_name)
    assert done.returncode == 0, done.stderr
    # the same epoch, and the second step is version 2: nobody had left in between
    assert "epoch 1" in done.stdout and done.stdout.split()[-1] == "2"


# --- values changed here


@pytest.mark.parametrize("through", ["optimizer", "session"])
def test_a_local_edit_is_refused_until_it_is_uploaded(
    server: RunningServer, model_name: str, through: str
) -> None:
    session = server.connect(model_name)
    twins = Twins(session, Network(), adagrad)
    twins.step(0)
    for model in (twins.model, twins.local_model):
        with torch.no_grad():
            model.out.bias.fill_(5.0)  # type: ignore[union-attr,operator]
    loss_of(twins.model, 1).backward()
    with pytest.raises(LocalParameterEdit, match=r"'out.bias'.*session.upload\(\)"):
        twins.remote.step()
    assert server.rest("GET", f"/v1/models/{model_name}").json()["version"] == 1
    version = session.upload() if through == "session" else twins.remote.upload()
    assert version == 2
    twins.step(2, 3)
    twins.check_state()
    assert twins.remote.last_receipt is not None and twins.remote.last_receipt.version == 4


def test_a_rejected_gradient_changes_nothing_and_its_edit_travels_again(
    server: RunningServer, model_name: str
) -> None:
    twins = Twins(server.connect(model_name), Network(), adadelta)
    twins.step(0)
    twins.remote.param_groups[0]["lr"] = twins.local[0].param_groups[0]["lr"] = 0.25
    twins.model.out.bias.grad = torch.full((1,), float("nan"))
    with pytest.raises(NonfiniteGradient, match=r"out\.bias"):
        twins.remote.step()
    twins.check()
    assert server.rest("GET", f"/v1/models/{model_name}/param-groups/0").json()["lr"] == 0.7
    twins.step(1)
    twins.check_state()


def test_rejections_may_be_warnings(server: RunningServer, model_name: str) -> None:
    twins = Twins(server.connect(model_name, on_reject="skip"), Network(), adadelta)
    twins.model.out.bias.grad = torch.full((1,), float("inf"))
    with pytest.warns(RuntimeWarning, match=r"push rejected.*out\.bias"):
        twins.remote.step()
    assert twins.remote.last_receipt is not None
    assert twins.remote.last_receipt.outcome is Outcome.REJECTED
    twins.check()
    twins.step(0, 1)


def test_a_grad_scaler_unscales_and_skips(server: RunningServer, model_name: str) -> None:
    twins = Twins(server.connect(model_name), Network(), adadelta)
    sides = [
        (twins.model, twins.remote, torch.amp.GradScaler("cpu", init_scale=1024.0)),
        (twins.local_model, twins.local[0], torch.amp.GradScaler("cpu", init_scale=1024.0)),
    ]
    for seed, overflow in enumerate([False, True, False]):
        for model, optimizer, scaler in sides:
            optimizer.zero_grad()
            scaler.scale(loss_of(model, seed) * (float("inf") if overflow else 1.0)).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        twins.check()
    twins.check_state()
    assert twins.remote.last_receipt is not None and twins.remote.last_receipt.version == 2
    assert sides[0][2].get_scale() == sides[1][2].get_scale() == 512.0


def test_torch_s_own_classes_are_taken_too(server: RunningServer, model_name: str) -> None:
    """One step from equal state: torch rounds in another order, so a few ulps."""
    for number, kind in enumerate((torch.optim.Adadelta, torch.optim.Adagrad)):
        model, local = Network(), Network()
        remote = server.connect(f"{model_name}-{number}").attach(kind(model.parameters()), module=model)
        twin = kind(local.parameters())
        backward(model, [remote], 0)
        backward(local, [twin], 0)
        remote.step()
        twin.step()
        for one, other in zip(model.parameters(), local.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=4 * 2**-23, atol=4 * 2**-24)
        assert isinstance(remote, RemoteOptimizer) and not isinstance(remote, (Adadelta, Adagrad))
