"""The small networks that tests train: enough to have every kind of gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

ROWS = 9


class Network(nn.Module):
    """An embedding (sparse gradients if asked) and two linear layers."""

    def __init__(self, *, seed: int = 0, sparse: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        # a generator of its own: torch's is one for all threads, and another's draw in between would give other values
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


class ScaledNetwork(Network):
    """Network with a scale, a tensor without dimensions, that only some batches use."""

    def __init__(self, *, seed: int = 0, sparse: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(seed=seed, sparse=sparse)
        self.scale = nn.Parameter(torch.ones(()))
        self.to(dtype)

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        """Network's, scaled in two of three batches."""
        result = super().forward(ids, numbers)
        return result * self.scale if int(ids.sum()) % 3 else result


def loss_of(model: nn.Module, seed: int) -> Tensor:
    """The loss on batch number `seed`; its row ids repeat."""
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(0, ROWS // 2, (6,), generator=generator)
    like = next(model.parameters())
    numbers = torch.randn(6, 2, generator=generator).to(like)
    return model(ids.to(like.device), numbers).float().square().mean()


def finite(model: nn.Module) -> bool:
    """Whether the training went anywhere sensible: equal NaNs would prove nothing (and are not equal)."""
    return all(math.isfinite(float(p.detach().float().sum())) for p in model.parameters())
