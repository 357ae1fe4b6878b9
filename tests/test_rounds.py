"""sync through a real server: bit-equal to the same weighted sum made here, whatever the number of workers.

The workers are threads with sessions of their own; their gradients are computed on what the server returned. Every round
is made again here: the gradients added up in worker-name order by numpy, one rounding at a time, and stepped by the
same optimizer.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from harness import RunningServer
from torch import Tensor, nn
from twin import Network, adadelta, adagrad, loss_of

from pushstep.client import Outcome, Receipt, connect

STEPS = 100
Grads = dict[str, Tensor | None]


@dataclass(frozen=True)
class Push:
    """What a worker sent in one round and what it was told."""

    grads: Grads
    receipt: Receipt
    after: dict[str, Tensor]


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def crew(
    server: RunningServer,
    model: str,
    module: nn.Module,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    count: int,
    policy: dict[str, Any],
    samples: Sequence[float],
) -> list[list[Push]]:
    """What each of `count` workers sent and got in its STEPS rounds."""
    start = threading.Barrier(count)

    def work(index: int) -> list[Push]:
        mine, pushes = copy.deepcopy(module), []
        with connect(server.grpc, model=model, worker=f"w{index}", timeout_s=20, retry_for_s=60) as session:
            optimizer = session.attach(make(mine), module=mine, policy=policy)
            optimizer.samples = samples[index]
            start.wait(30)
            for step in range(STEPS):
                optimizer.zero_grad()
                loss_of(mine, index + count * step).backward()
                if (step + index) % 7 == 3:
                    mine.out.bias.grad = None  # counts as zero, unless nobody has it
                grads = {
                    name: None if p.grad is None else p.grad.clone() for name, p in mine.named_parameters()
                }
                optimizer.step()
                assert optimizer.last_receipt is not None
                pushes.append(Push(grads, optimizer.last_receipt, values(mine)))
            start.wait(30)
        return pushes

    with ThreadPoolExecutor(count) as threads:
        return [future.result() for future in [threads.submit(work, index) for index in range(count)]]


def added_up(grads: Sequence[Tensor | None], weights: Sequence[float], divisor: float) -> Tensor | None:
    """The weighted sum over the divisor in worker order, each product, sum and quotient rounded to float32."""
    there = [
        (grad, np.float32(weight)) for grad, weight in zip(grads, weights, strict=True) if grad is not None
    ]
    if not there:
        return None
    if there[0][0].is_sparse:
        rows: dict[int, Any] = {}
        for grad, weight in there:
            merged: dict[int, Any] = {}
            for row, part in zip(grad._indices()[0].tolist(), grad._values().numpy(), strict=True):
                merged[row] = merged[row] + part if row in merged else part
            for row, part in merged.items():  # a push's own duplicates are merged first
                rows[row] = rows[row] + part * weight if row in rows else part * weight
        ids = sorted(rows)
        stacked = torch.from_numpy(np.stack([rows[row] / np.float32(divisor) for row in ids]))
        return torch.sparse_coo_tensor(torch.tensor([ids]), stacked, there[0][0].shape, check_invariants=True)
    total = there[0][0].numpy() * there[0][1]
    for grad, weight in there[1:]:
        total = total + grad.numpy() * weight
    return torch.from_numpy(total / np.float32(divisor))


@pytest.mark.parametrize("make", [adadelta, adagrad])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("count", "reduce", "samples"),
    [(2, "mean", (0, 0)), (4, "mean", (3, 1, 5, 2)), (3, "sum", (0.25, 1.5, 3))],
)
def test_rounds_are_bit_equal_to_the_same_sum_made_here(
    server: RunningServer,
    model_name: str,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    sparse: bool,
    count: int,
    reduce: str,
    samples: Sequence[float],
) -> None:
    module = Network(sparse=sparse)
    policy = {"policy": "sync", "reduce": reduce, "min_workers": count}
    crews = crew(server, model_name, module, make, count, policy, samples)
    weights = [weight or 1.0 for weight in samples]
    local = copy.deepcopy(module)
    optimizer = make(local)
    for number, round_of in enumerate(zip(*crews, strict=True)):
        for push in round_of:
            assert (push.receipt.outcome, push.receipt.version) == (Outcome.APPLIED, number + 1)
            assert push.receipt.contributors == [f"w{index}" for index in range(count)]
            assert push.receipt.staleness == 0
        for name, parameter in local.named_parameters():
            grads = [push.grads[name] for push in round_of]
            parameter.grad = added_up(grads, weights, sum(weights) if reduce == "mean" else 1.0)
        optimizer.step()
        for name, value in values(local).items():
            for push in round_of:
                assert torch.equal(push.after[name], value), (number, name)


@pytest.mark.parametrize("make", [adadelta, adagrad])
def test_a_mean_of_equal_shares_is_close_to_one_big_batch(
    server: RunningServer, model_name: str, make: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    """The same examples in one batch: equal in exact arithmetic, so only roundings are between the two.

    100 steps carried them to 2.4e-7 (Adagrad) and 6e-8 (Adadelta) when it was measured, for parameters around 1.
    """
    module = Network()
    crews = crew(server, model_name, module, make, 4, {"policy": "sync", "min_workers": 4}, (0,) * 4)
    local = copy.deepcopy(module)
    optimizer = make(local)
    assert isinstance(local, Network)
    for number, _ in enumerate(zip(*crews, strict=True)):
        optimizer.zero_grad()
        torch.stack([loss_of(local, index + 4 * number) for index in range(4)]).mean().backward()
        if any((number + index) % 7 == 3 for index in range(4)):
            shares = []
            for index in range(4):
                single = copy.deepcopy(local)
                single.zero_grad()
                loss_of(single, index + 4 * number).backward()
                shares.append(0 if (number + index) % 7 == 3 else single.out.bias.grad)
            local.out.bias.grad = sum(shares) / 4
        optimizer.step()
    for name, value in values(local).items():
        torch.testing.assert_close(crews[0][-1].after[name], value, rtol=0, atol=2e-6)


def test_a_round_outlasts_an_attempt_and_its_body_is_sent_once(
    server: RunningServer, model_name: str
) -> None:
    """The other worker is slow: the first one's attempts end before the round does, and attach to the push that waits."""
    grads = {"p": np.full(4, 2.0, np.float32)}
    with contextlib.ExitStack() as stack:
        fast = stack.enter_context(
            connect(server.grpc, model=model_name, worker="a", timeout_s=0.6, retry_for_s=60)
        )
        fast.create({"p": np.zeros(4, np.float32)}, policy={"policy": "sync", "min_workers": 2})
        slow = stack.enter_context(connect(server.grpc, model=model_name, worker="b", timeout_s=20))
        slow.create({"p": np.zeros(4, np.float32)})
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(fast.push, grads)
            threading.Event().wait(2.0)
            assert not waiting.done()
            shown = server.rest("GET", f"/v1/models/{model_name}/workers").json()["workers"]
            assert {w["name"]: (w["round"], w["in_flight"]) for w in shown} == {
                "a": ("present", 1),
                "b": ("awaited", 0),
            }
            receipt = slow.push(grads)
            first = waiting.result(20)
        assert receipt.version == first.version == 1
        assert first.contributors == ["a", "b"]
        assert first.times["wait_s"] > 1.5
        assert first.duplicates == 0  # its retries brought no body, so there was nothing to count
