"""torch, the real Keras (on torch, on the CPU) and the real MLX, run step by step as references.

Import this module, not keras: the backend is chosen by the environment and fixed at the first import, and Keras writes
a file into KERAS_HOME when it finds none there.
"""

from __future__ import annotations

import os
import sys
import tempfile

import numpy as np
import torch

_kept = {name: os.environ.get(name) for name in ("KERAS_BACKEND", "KERAS_HOME", "KERAS_TORCH_DEVICE")}
# What Keras imports only because it is there, and takes longer than Keras itself.
_unneeded = [name for name in ("IPython", "matplotlib", "pandas", "sklearn") if name not in sys.modules]
sys.modules.update(dict.fromkeys(_unneeded))  # type: ignore[arg-type]
with tempfile.TemporaryDirectory() as _home:
    os.environ.update(KERAS_BACKEND="torch", KERAS_HOME=_home, KERAS_TORCH_DEVICE="cpu")
    import keras
    import mlx.core as mx
    import mlx.optimizers as mlx_optimizers
for _name in _unneeded:
    del sys.modules[_name]

for _name, _value in _kept.items():
    if _value is None:
        del os.environ[_name]
    else:
        os.environ[_name] = _value

if keras.backend.backend() != "torch":
    raise RuntimeError("Keras was imported before this module, on another backend")

mx.set_default_device(mx.cpu)

__all__ = ["KerasRun", "MlxRun", "TorchRun", "keras", "mlx_optimizers", "mx"]


class TorchRun:
    """One of torch's own optimizers over parameters that start at `values`, laid out as they are."""

    def __init__(self, name, values, dtype, **options):
        self.tensors = [
            torch.nn.Parameter(value.clone(memory_format=torch.preserve_format).to(dtype)) for value in values
        ]
        self.optimizer = getattr(torch.optim, name)(self.tensors, **options)

    @property
    def params(self):
        return [tensor.detach() for tensor in self.tensors]

    @property
    def states(self):
        return [self.optimizer.state[tensor] for tensor in self.tensors]

    def step(self, grads):
        for tensor, grad in zip(self.tensors, grads, strict=True):
            tensor.grad = grad
        self.optimizer.step()


class KerasRun:
    """A real Keras optimizer over variables that start at `values`, one per tensor."""

    def __init__(self, name, values, dtype, **options):
        # With floatx below float64 even the learning rate of float64 variables is rounded to float32.
        keras.config.set_floatx("float64" if dtype == torch.float64 else "float32")
        kind = str(dtype).removeprefix("torch.")
        self.variables = [
            keras.Variable(value.double().numpy().copy(), dtype=kind, name=f"variable_{k}")
            for k, value in enumerate(values)
        ]
        self.dtype = dtype
        self.optimizer = getattr(keras.optimizers, name)(**options)
        self.optimizer.build(self.variables)

    @property
    def params(self):
        return [variable.value for variable in self.variables]

    @property
    def states(self):
        """Per parameter, by the names that `pushstep.optim.keras` uses too."""
        slots = {
            "accumulated_grad": "_accumulated_grads",
            "accumulated_delta_var": "_accumulated_delta_vars",
            "accumulator": "_accumulators",
            "average": "_model_variables_moving_average",
            "gradient_accumulator": "_accumulated_gradients",
        }
        found = {name: getattr(self.optimizer, slot, None) for name, slot in slots.items()}
        return [
            {name: held[k].value for name, held in found.items() if held is not None}
            for k in range(len(self.variables))
        ]

    def step(self, grads):
        self.optimizer.apply([None if g is None else g.to(self.dtype) for g in grads], self.variables)


class MlxRun:
    """A real MLX optimizer over arrays that start at `values`; `params` and `states` are copies as torch tensors."""

    def __init__(self, name, values, dtype, **options):
        self.dtype = dtype
        self.optimizer = getattr(mlx_optimizers, name)(**options)
        self.arrays = {str(k): to_mlx(value, dtype) for k, value in enumerate(values)}
        self.optimizer.init(self.arrays)

    @property
    def params(self):
        return [to_torch(array) for array in self.arrays.values()]

    @property
    def states(self):
        return [
            {name: to_torch(array) for name, array in self.optimizer.state[key].items()}
            for key in self.arrays
        ]

    def step(self, grads):
        tree = {
            key: to_mlx(g, self.dtype) for key, g in zip(self.arrays, grads, strict=True) if g is not None
        }
        with mx.stream(mx.cpu):
            self.arrays.update(self.optimizer.apply_gradients(tree, self.arrays))
            mx.eval(self.arrays, self.optimizer.state)


def to_mlx(tensor, dtype):
    kind = getattr(mx, str(dtype).removeprefix("torch."))
    wide = tensor.detach().double().numpy()
    with mx.stream(mx.cpu):
        return mx.array(wide if dtype == torch.float64 else wide.astype(np.float32)).astype(kind)


def to_torch(array):
    with mx.stream(mx.cpu):
        wide = array.astype(mx.float64 if array.dtype == mx.float64 else mx.float32)
        tensor = torch.from_numpy(np.array(wide))
    return tensor.to(getattr(torch, str(array.dtype).removeprefix("mlx.core.")))
