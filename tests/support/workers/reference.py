"""The small network that the end-to-end tests train, and a plain replayer of what a service was sent.

The replayer steps pushstep.optim's own classes here, one version after the other.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pushstep import optim

# sparse=True: what torch's Adadelta refuses and the service takes
OPTIMIZERS = {"adadelta": functools.partial(optim.Adadelta, sparse=True), "adagrad": optim.Adagrad}
ROWS = 40
BATCH = 12
Gradients = Mapping[str, Tensor]
Bits = dict[str, bytes]
StateBits = dict[tuple[int, str], tuple[torch.dtype, tuple[int, ...], bytes]]
_EXECUTION = frozenset({"foreach", "capturable", "differentiable", "fused"})


_DRAWING = threading.Lock()


class Network(nn.Module):
    """An embedding, a hidden layer, and a scale that only some batches use."""

    def __init__(self, *, sparse: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        # torch has one generator for all threads: another's seed in between would give other values
        with _DRAWING, torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(ROWS, 6, sparse=sparse)
            self.hidden = nn.Linear(6, 7)
            self.scale = nn.Parameter(torch.ones(()))
            self.out = nn.Linear(7, 1)
        self.to(dtype)

    def loss(self, number: int) -> Tensor:
        """The loss on batch `number`: the same batch for the same number, with ids that repeat."""
        draw = np.random.default_rng(number)
        ids = torch.from_numpy(draw.integers(0, ROWS, (BATCH, 2)))
        wanted = torch.from_numpy(draw.standard_normal((BATCH, 1))).to(self.scale.dtype)
        hidden = torch.tanh(self.hidden(self.embedding(ids).sum(dim=1)))
        if number % 3:
            hidden = hidden * self.scale
        return (self.out(hidden) - wanted).square().mean()


def split_optimizers(module: Network) -> list[torch.optim.Optimizer]:
    """Adagrad for the embedding, Adadelta for the rest: two optimizers that make one model."""
    rest = [parameter for name, parameter in module.named_parameters() if name != "embedding.weight"]
    return [
        optim.Adagrad([module.embedding.weight], lr=0.1, lr_decay=0.01),
        optim.Adadelta(rest, lr=0.8),
    ]


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients by name; what has none is left out."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def set_gradients(module: nn.Module, gradients: Gradients) -> None:
    """Give each parameter its gradient, or None."""
    for name, parameter in module.named_parameters():
        gradient = gradients.get(name)
        parameter.grad = None if gradient is None else gradient.clone()


def drawn_gradients(number: int, *, sparse: bool = False) -> dict[str, Tensor]:
    """Gradients for a Network: the same for the same number, whatever its parameters are by then."""
    module = Network(sparse=sparse, seed=number)
    module.loss(number).backward()
    return gradients_of(module)


def bits(tensor: Tensor) -> bytes:
    """A tensor's bytes: equal only if every element is, the sign of a zero included."""
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def parameter_bits(module: nn.Module) -> Bits:
    """Every parameter's bytes by name."""
    return {name: bits(parameter) for name, parameter in module.named_parameters()}


def array_bits(arrays: Mapping[str, Any]) -> Bits:
    """The same of arrays, as a session's pull returns them."""
    return {name: np.ascontiguousarray(array).tobytes() for name, array in arrays.items()}


def state_bits(state_dict: Mapping[str, Any]) -> StateBits:
    """An optimizer's whole state, `step` included, by (parameter number, name)."""
    return {
        (number, name): (value.dtype, tuple(value.shape), bits(value))
        for number, state in state_dict["state"].items()
        for name, value in state.items()
    }


def hyperparameters(state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of a state_dict without the keys that only say how torch executes a step."""
    groups = state_dict["param_groups"]
    return [{key: value for key, value in group.items() if key not in _EXECUTION} for group in groups]


class Replay:
    """A network and its optimizers here, stepped push by push. `history[v]` is version v, in bytes."""

    def __init__(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.module = module
        self.optimizers = list(optimizers)
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.history = [parameter_bits(module)]

    def push(self, gradients: Gradients, factor: float = 1.0) -> Bits:
        """The next version: one step with the gradients, which are first multiplied by `factor`."""
        set_gradients(self.module, {name: _scaled(g, factor) for name, g in gradients.items()})
        for optimizer in self.optimizers:
            optimizer.step()
        self.history.append(parameter_bits(self.module))
        return self.history[-1]

    def state(self) -> list[StateBits]:
        """Every optimizer's state."""
        return [state_bits(optimizer.state_dict()) for optimizer in self.optimizers]


def square_sum(gradients: Gradients) -> float:
    """The sum of squares of all gradients in float64; rows that come twice are summed first."""
    dense = [merged(g)._values() if g.is_sparse else g for g in gradients.values()]
    return sum(float(g.double().square().sum()) for g in dense)


def _scaled(gradient: Tensor, factor: float) -> Tensor:
    if factor == 1.0:
        return gradient
    # rows that come twice are summed before they are scaled, as a push sums them before it is sent
    return (merged(gradient) if gradient.is_sparse else gradient) * factor


def merged(gradient: Tensor) -> Tensor:
    """A row-sparse gradient whose rows come once, added one after the other: torch's `coalesce` adds in another order."""
    totals: dict[int, Tensor] = {}
    for row, values in zip(gradient._indices()[0].tolist(), gradient._values(), strict=True):
        totals[row] = totals[row] + values if row in totals else values
    ids = sorted(totals)
    rows = torch.stack([totals[row] for row in ids])
    return torch.sparse_coo_tensor(torch.tensor([ids]), rows, gradient.shape, check_invariants=True)
