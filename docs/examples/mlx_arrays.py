"""MLX: arrays travel by name, as numpy has them, and the server steps by MLX's Adagrad. `local` takes MLX's own steps instead.

    pushstep-server &
    python mlx_arrays.py [SERVER | local]

No torch optimizer is attached, since the parameters are not torch's. So the loop exchanges: gradients for parameters.
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn, optimizers
from mlx.utils import tree_flatten, tree_unflatten

from pushstep.client import connect

server = sys.argv[1] if len(sys.argv) > 1 else "localhost:7070"
local = server == "local"


def by_name(tree: Any) -> dict[str, Any]:
    return {name: np.array(array) for name, array in tree_flatten(tree)}


def tree_of(arrays: dict[str, Any]) -> Any:
    return tree_unflatten([(name, mx.array(array)) for name, array in arrays.items()])


mx.random.seed(0)
inputs = mx.random.normal((256, 8))
targets = mx.sin(inputs.sum(axis=1, keepdims=True))
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
loss_and_gradients = nn.value_and_grad(model, lambda x, y: nn.losses.mse_loss(model(x), y))

if local:
    optimizer = optimizers.Adagrad(0.1)
else:
    session = connect(server, model="mlx-arrays", worker="w0")
    values = by_name(model.parameters())
    session.create(values, [{"rule": "mlx_adagrad", "params": list(values), "lr": 0.1}])
    model.update(tree_of(session.pull()))

for _ in range(4):
    for start in range(0, 256, 32):
        loss, gradients = loss_and_gradients(inputs[start : start + 32], targets[start : start + 32])
        if local:
            optimizer.update(model, gradients)
        else:
            receipt, arrays = session.exchange(by_name(gradients), metrics={"loss": loss.item()})
            model.update(tree_of(arrays))

print("loss", nn.losses.mse_loss(model(inputs), targets).item())
if not local:
    session.close()
