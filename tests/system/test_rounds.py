"""sync through a real server: bit-equal to the same weighted sum made here, whatever the number of workers.

The workers are threads with sessions of their own; their gradients are computed on what the server returned. Every round
is made again here: the gradients added up in worker-name order by numpy, one rounding at a time, and stepped by the
same optimizer.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pushstep.client import Outcome, Receipt, connect
from tests.support.servers.harness import RunningServer
from tests.support.trainings.network import Network, loss_of
from tests.support.trainings.optimizers import adadelta, adagrad

STEPS = 40
Grads = dict[str, Tensor | None]


@dataclass(frozen=True)
class Push:
    """What a worker sent in one round and what it was told."""

    grads: Grads
    receipt: Receipt
    after: dict[str, Tensor]


class Towers(nn.Module):
    """Two networks under two rules, each with a table of row-sparse gradients and dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Network(sparse=True), Network(seed=1, sparse=True)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [adadelta(self.one), adagrad(self.other)]

    def biases(self) -> list[nn.Parameter]:
        return [self.one.out.bias, self.other.out.bias]

    def loss(self, step: int, index: int, count: int) -> Tensor:
        """Of one worker's share of a step. Now and then it has nothing for the last biases, and once nobody has."""
        lacks = step % 25 == 24 or (step + index) % 7 == 3
        for bias in self.biases():
            bias.requires_grad_(not lacks)
        losses = [loss_of(tower, index + count * step) for tower in (self.one, self.other)]
        for bias in self.biases():
            bias.requires_grad_(True)
        return torch.stack(losses).sum()


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def crew(
    server: RunningServer,
    model: str,
    module: Towers,
    count: int,
    policy: dict[str, Any],
    samples: Sequence[float],
) -> list[list[Push]]:
    """What each of `count` workers sent and got in its STEPS rounds."""
    start = threading.Barrier(count)

    def work(index: int) -> list[Push]:
        mine, pushes = copy.deepcopy(module), []
        with connect(server.grpc, model=model, worker=f"w{index}", timeout_s=20, retry_for_s=60) as session:
            optimizer = session.attach(mine.optimizers(), module=mine, policy=policy)
            optimizer.samples = samples[index]
            start.wait(30)
            for step in range(STEPS):
                optimizer.zero_grad()
                mine.loss(step, index, count).backward()
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


# Both sides sum in float32, in different orders. 100 steps carried them 7.2e-7 apart at most, for parameters around 1.
APART = 2e-6
# A weight of 0 says nothing, and is then 1.
EVEN, UNEVEN = (0.0,) * 8, (3.0, 1.0, 5.0, 2.0, 0.25, 1.5, 4.0, 0.5)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize(("count", "samples"), [(2, EVEN), (4, UNEVEN), (8, EVEN)])
def test_rounds_are_the_same_sum_made_here_and_close_to_one_big_batch(
    server: RunningServer, model_name: str, count: int, samples: Sequence[float], reduce: str
) -> None:
    """Dense and sparse gradients under both rules: bit for bit the weighted sum, within APART of the batch of all."""
    module, samples = Towers(), samples[:count]
    policy = {"policy": "sync", "reduce": reduce, "min_workers": count}
    crews = crew(server, model_name, module, count, policy, samples)
    weights = [weight or 1.0 for weight in samples]
    divisor = sum(weights) if reduce == "mean" else 1.0
    local, batch = copy.deepcopy(module), copy.deepcopy(module)
    optimizers, batch_optimizers = local.optimizers(), batch.optimizers()
    for number, round_of in enumerate(zip(*crews, strict=True)):
        for push in round_of:
            assert (push.receipt.outcome, push.receipt.version) == (Outcome.APPLIED, number + 1)
            assert push.receipt.contributors == [f"w{index}" for index in range(count)]
            assert push.receipt.staleness == 0
        for name, parameter in local.named_parameters():
            parameter.grad = added_up([push.grads[name] for push in round_of], weights, divisor)
        assert {parameter.grad is None for parameter in local.biases()} == {number % 25 == 24}
        for optimizer in optimizers:
            optimizer.step()
        for name, value in values(local).items():
            for push in round_of:
                assert torch.equal(push.after[name], value), (number, name)
        for parameter in batch.parameters():
            parameter.grad = None
        losses = [weight * batch.loss(number, index, count) for index, weight in enumerate(weights)]
        (torch.stack(losses).sum() / divisor).backward()
        for optimizer in batch_optimizers:
            optimizer.step()
    for name, value in values(batch).items():
        torch.testing.assert_close(crews[0][-1].after[name], value, rtol=0, atol=APART)


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
            first = waiting.result(60)
        assert receipt.version == first.version == 1
        assert first.contributors == ["a", "b"]
        assert first.times["wait_s"] > 1.5
        assert first.duplicates == 0  # its retries brought no body, so there was nothing to count
