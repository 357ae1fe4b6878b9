"""The same training twice: through a server and with pushstep.optim here, on the same data, compared bit for bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pushstep.client import RemoteOptimizer, Session
from pushstep.optim import Adadelta, Adagrad

ROWS = 9
Make = Callable[[nn.Module], torch.optim.Optimizer | Sequence[torch.optim.Optimizer]]


class Network(nn.Module):
    """An embedding (sparse gradients if asked) and two linear layers: enough to have every kind of gradient."""

    def __init__(self, *, seed: int = 0, sparse: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Embedding(ROWS, 3, sparse=sparse)
        self.hidden = nn.Linear(5, 4)
        self.out = nn.Linear(4, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.to(dtype)

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        """One number per row."""
        hidden: Tensor = self.hidden(torch.cat([self.table(ids), numbers], dim=1))
        result: Tensor = self.out(torch.tanh(hidden))
        return result


def loss_of(model: nn.Module, seed: int) -> Tensor:
    """The loss on batch number `seed`; its row ids repeat."""
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(0, ROWS // 2, (6,), generator=generator)
    like = next(model.parameters())
    numbers = torch.randn(6, 2, generator=generator).to(like)
    return model(ids.to(like.device), numbers).float().square().mean()


def adadelta(model: nn.Module) -> Adadelta:
    return Adadelta(model.parameters(), lr=0.7, sparse=True)  # torch's refuses what the service takes


def adagrad(model: nn.Module) -> Adagrad:
    return Adagrad(model.parameters(), lr=0.1, lr_decay=0.01)


def both(model: Network) -> list[torch.optim.Optimizer]:
    """The table under Adagrad, everything else under Adadelta."""
    dense = [*model.hidden.parameters(), *model.out.parameters()]
    return [Adagrad(model.table.parameters(), lr=0.1), Adadelta(dense, lr=0.7)]


def backward(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], seed: int) -> None:
    """Gradients of batch `seed`, and of nothing before it."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss_of(model, seed).backward()


class Twins:
    """A remote optimizer and the local one that it must equal."""

    def __init__(self, session: Session, model: nn.Module, make: Make, **attach: Any) -> None:
        self.model = model
        self.local_model = copy.deepcopy(model)
        made, local = make(model), make(self.local_model)
        self.original = made
        self.local = [local] if isinstance(local, torch.optim.Optimizer) else list(local)
        self.remote: RemoteOptimizer = session.attach(made, **{"module": model, **attach})

    def step(self, *seeds: int) -> None:
        """One step of both on each batch, then compare."""
        for seed in seeds:
            backward(self.model, [self.remote], seed)
            backward(self.local_model, self.local, seed)
            self.remote.step()
            for optimizer in self.local:
                optimizer.step()
            self.check()

    def check(self) -> None:
        """Equal parameters, bit for bit."""
        theirs = dict(self.local_model.named_parameters())
        for name, parameter in self.model.named_parameters():
            assert torch.equal(parameter, theirs[name]), name

    def check_state(self) -> None:
        """Equal state_dicts, bit for bit."""
        self.check()
        got = self.remote.state_dict()
        expected = [optimizer.state_dict() for optimizer in self.local]
        for one, other in zip([got] if isinstance(got, dict) else got, expected, strict=True):
            check_state_dict(one, other)


def check_state_dict(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """torch's format: the same keys, and tensors of the same dtype and bits."""
    assert got.keys() == expected.keys() == {"state", "param_groups"}
    assert len(got["param_groups"]) == len(expected["param_groups"])
    for one, other in zip(got["param_groups"], expected["param_groups"], strict=True):
        # fused: torch.optim.Adagrad has it; None, which Adadelta ignores
        assert {**one, "fused": None} == {**other, "fused": None}
        for kind in (bool, Tensor):  # whether a number is an int or a float is nobody's business
            assert [isinstance(one[key], kind) for key in other] == [
                isinstance(value, kind) for value in other.values()
            ]
    assert got["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        assert got["state"][number].keys() == state.keys()
        for name, tensor in state.items():
            found = got["state"][number][name]
            assert found.dtype == tensor.dtype, (number, name)
            assert torch.equal(found, tensor), (number, name)


def finite(model: nn.Module) -> bool:
    """Whether the training went anywhere sensible: equal NaNs would prove nothing (and are not equal)."""
    return all(math.isfinite(float(p.detach().float().sum())) for p in model.parameters())
