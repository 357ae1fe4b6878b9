"""The parity table: rule x options x dtype x layout x backend, each row beside the library whose terms it speaks.

A row says how to make our optimizer, a float64 twin of the same steps, and the peer. `kernels` rows take the CPU
kernels, `operations` rows the same rule in torch operations (`eager`). The CUDA kernels are held to the CPU's
bits by the `cuda_*_cases`, so what is true of a `kernels` row is true of them.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch

from pushstep import optim
from tests.support.numbers.optimizer_peers import KerasRun, MlxRun, TorchRun
from tests.support.numbers.ulps import PARAMETER_ULPS as PARAMETER_ULPS_OF_TORCH

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
HALF = (BF16, F16)

# Our parameters and the peer's, one step from equal state, float32: in ulps. What Keras overwrites parameters with, its
# averages, is that far from exact ones.
PARAMETER_ULPS = {"torch": PARAMETER_ULPS_OF_TORCH, "keras": 16, "mlx": 4}
# acc_delta squares a quotient of roots that torch rounds four times: with a large eps one element of 35 thousand was 9 ulps off.
EXTRA_ULPS = {"tensor lr, eps": 1}
# torch's own float16 Adagrad divides 0 by 0 where decay and gradient cancel.
TORCH_FAILS = {("torch", "Adagrad", "maximize, decay", torch.float16)}

OPTIONS: dict[tuple[str, str], dict[str, dict[str, Any]]] = {
    ("torch", "Adadelta"): {
        "plain": {},
        "lr, rho": {"lr": 0.3, "rho": 0.95},
        "decay": {"weight_decay": 0.1},
        "maximize, decay": {"maximize": True, "weight_decay": 0.1},
        "tensor lr, eps": {"lr": torch.tensor(0.5), "eps": 1e-3},
    },
    ("torch", "Adagrad"): {
        "plain": {},
        "lr_decay": {"lr": 0.1, "lr_decay": 0.5},
        "decay, initial value": {"weight_decay": 0.1, "initial_accumulator_value": 0.1},
        "maximize, decay": {"maximize": True, "weight_decay": 0.1},
        "tensor lr, eps": {"lr": torch.tensor([0.5]), "eps": 1e-3},
    },
    ("mlx", "AdaDelta"): {"plain": {}, "rho, eps": {"rho": 0.5, "eps": 1e-3}, "rho": {"rho": 0.999}},
    ("mlx", "Adagrad"): {"plain": {}, "eps": {"eps": 1e-3}},
}
# Limits and scales that float32 holds exactly: Keras rounds them to it, whatever the variables are.
KERAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.125},
    "clipnorm": {"clipnorm": 0.75},
    "clipnorm, large": {"clipnorm": 4096.0},
    "global_clipnorm": {"global_clipnorm": 0.75, "weight_decay": 0.125},
    "clipvalue": {"clipvalue": 0.0625},
    "ema": {"use_ema": True, "ema_momentum": 0.9},
    "ema, overwrite": {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 3},
    "scale": {"loss_scale_factor": 1024.0, "clipnorm": 0.5},
    "scale by 3": {"loss_scale_factor": 3.0},
    "accumulation": {"gradient_accumulation_steps": 3, "loss_scale_factor": 3.0},
    "accumulation, all else": {
        "gradient_accumulation_steps": 2,
        "weight_decay": 0.125,
        "global_clipnorm": 0.75,
        "use_ema": True,
        "ema_momentum": 0.75,
        "ema_overwrite_frequency": 3,
    },
}
OPTIONS["keras", "Adadelta"] = OPTIONS["keras", "Adagrad"] = KERAS
STATES_AS_PARAMETERS = {
    "state_dtype": "param",
    "learning_rate": 0.25,
    "use_ema": True,
    "gradient_accumulation_steps": 2,
}


def _gapped(shape):
    return torch.randn(*shape, 2)[..., 0]


def _channels_last(shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


# name: how to make parameters, and a gradient for each
LAYOUTS: dict[str, list[tuple[Any, Any]]] = {
    "contiguous": [
        (lambda: torch.randn(257, 131), lambda: torch.randn(257, 131)),
        (lambda: torch.randn(1031), lambda: torch.randn(1031)),
        (lambda: torch.randn(()), lambda: torch.randn(())),
    ],
    "empty": [(lambda: torch.randn(0, 3), lambda: torch.randn(0, 3))],
    "tail": [(lambda: torch.randn(67), lambda: torch.randn(67))],
    "transposed both": [(lambda: torch.randn(131, 257).t(), lambda: torch.randn(131, 257).t())],
    "transposed grad": [(lambda: torch.randn(257, 131), lambda: torch.randn(131, 257).t())],
    "transposed param": [(lambda: torch.randn(131, 257).t(), lambda: torch.randn(257, 131))],
    "channels last, grad not": [(lambda: _channels_last((8, 16, 7, 5)), lambda: torch.randn(8, 16, 7, 5))],
    "channels last": [(lambda: _channels_last((8, 16, 7, 5)), lambda: _channels_last((8, 16, 7, 5)))],
    "expanded grad": [(lambda: torch.randn(64, 33), lambda: torch.randn(33).expand(64, 33))],
    "gaps": [(lambda: _gapped((64, 33)), lambda: torch.randn(64, 33))],
    "offset": [(lambda: torch.randn(1025)[1:], lambda: torch.randn(1027)[3:])],
    "strided grad": [(lambda: torch.randn(1000), lambda: torch.randn(3000)[::3])],
}


class Row(NamedTuple):
    """One row; `options` names an entry of OPTIONS."""

    peer: str
    rule: str
    options: str
    dtype: torch.dtype = F32
    layout: str = "contiguous"
    backend: str = "kernels"

    def __str__(self):
        return " ".join((*self[:3], str(self.dtype).removeprefix("torch."), *self[4:]))

    def arguments(self, wide=False):
        """The constructor's arguments; those of the float64 twin where they are others."""
        given = dict(OPTIONS[self.peer, self.rule].get(self.options, STATES_AS_PARAMETERS))
        if self.peer == "torch":
            return given
        given.setdefault("learning_rate", 0.25 if self.peer == "keras" else 0.1)
        if (
            wide and self.peer == "mlx"
        ):  # MLX rounds lr to the gradient's dtype, which makes that the exact one
            given["learning_rate"] = torch.tensor(given["learning_rate"]).to(self.dtype).item()
        return given

    def values(self):
        """Start values of `dtype`, in this row's layout."""
        return [cast(make(), self.dtype) for make, _ in LAYOUTS[self.layout]]

    def grads(self):
        """Gradients of one step that `dtype` holds exactly, none of them so near 0 that its float16 square is."""
        made = [cast(make(), self.dtype) for _, make in LAYOUTS[self.layout]]
        if self.dtype == F16:
            return [g.where(g.abs() > 2e-3, torch.tensor(2e-3, dtype=F16)) for g in made]
        return made

    def ours(self, values):
        """Our optimizer and its parameters."""
        family = optim if self.peer == "torch" else getattr(optim, self.peer)
        params = [torch.nn.Parameter(v.clone(memory_format=torch.preserve_format)) for v in values]
        fused = None if self.backend == "kernels" else False
        return getattr(family, self.rule)(params, **self.arguments(), fused=fused), params

    def twin(self, values):
        """The same in float64: torch's own for torch's terms, ours (held to the golden values) for the others."""
        params = [torch.nn.Parameter(v.double()) for v in values]
        family = torch.optim if self.peer == "torch" else getattr(optim, self.peer)
        return getattr(family, self.rule)(params, **self.arguments(wide=True)), params

    def theirs(self, values):
        """The peer's run."""
        run = {"torch": TorchRun, "keras": KerasRun, "mlx": MlxRun}[self.peer]
        arguments = self.arguments()
        arguments.pop("state_dtype", None)
        return run(self.rule, values, self.dtype, **arguments)


def cast(tensor, dtype):
    """`tensor.to(dtype)`, which would make an expanded or gapped tensor dense."""
    if tensor.dtype == dtype:
        return tensor
    out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype)
    if 0 in tensor.stride() and tensor.numel():
        return tensor[:1].to(dtype).expand(tensor.shape)
    return out.copy_(tensor)


def _rows():
    for peer, rule in OPTIONS:
        for options, layout in itertools.product(OPTIONS[peer, rule], LAYOUTS):
            every = peer == "torch" and layout in ("transposed grad", "tail")
            if layout == "contiguous" or options == "plain" or every:
                yield Row(peer, rule, options, layout=layout)
        few = ("plain", "decay", "clipnorm", "accumulation, all else") if peer == "keras" else None
        for options, dtype in itertools.product(few or OPTIONS[peer, rule], HALF):
            if (peer, rule, options, dtype) not in TORCH_FAILS:
                yield Row(peer, rule, options, dtype)
        for layout, dtype in itertools.product(("transposed grad", "gaps"), HALF):
            yield Row(peer, rule, "plain", dtype, layout)
        if peer == "keras":
            for dtype in HALF:
                yield Row(peer, rule, "states as parameters", dtype)
        for options in OPTIONS[peer, rule]:
            if peer != "torch":  # whose operations are torch's own
                yield Row(peer, rule, options, backend="operations")


ROWS = list(_rows())

# name: p starts at 1 in float64, gradients 1, -2, 0.5; then the parameter and states
GOLDEN = [
    ("torch", "Adadelta", {}, 0.999501676893294, {"square_avg": 0.466, "acc_delta": 2.46888781739245e-06}),
    (
        "torch",
        "Adadelta",
        {"weight_decay": 0.1},
        0.999115776625651,
        {"square_avg": 0.45902725132785, "acc_delta": 2.46252735205765e-06},
    ),
    ("torch", "Adagrad", {}, 0.996762093008334, {"sum": 5.25}),
    (
        "torch",
        "Adagrad",
        {"lr_decay": 0.5, "weight_decay": 0.1},
        0.994453493866672,
        {"sum": 5.18329361135568},
    ),
    ("keras", "Adadelta", {}, 0.999999783622939, {"accumulated_grad": 0.247625}),
    (
        "keras",
        "Adadelta",
        {"learning_rate": 1.0, "weight_decay": 0.1},
        0.728872536742944,
        {"accumulated_delta_var": 2.61786754573132e-07},
    ),
    ("keras", "Adagrad", {}, 0.999715983482388, {"accumulator": 5.35}),
    (
        "keras",
        "Adagrad",
        {"learning_rate": 1.0, "weight_decay": 0.1},
        0.537579878424375,
        {"accumulator": 5.35},
    ),
    ("mlx", "AdaDelta", {"learning_rate": 0.1}, 0.999950167689329, {"v": 0.466, "u": 2.46888781739245e-06}),
    ("mlx", "Adagrad", {"learning_rate": 0.1}, 0.96762093077163, {"v": 5.25}),
]
