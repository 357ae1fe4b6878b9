"""Where the CUDA cases run, and how closely they are compared with the CPU kernels: to the bit.

In Triton's interpreter (TRITON_INTERPRET=1 before triton is imported) tensors lie on the CPU. Two of its operations round
otherwise than the instructions that they stand for: fma is a product and a sum, and bfloat16 is truncated. They are
replaced here by ones that round once, to nearest even. What the kernels should compute, whoever has written them, is
in `reference.py`.
"""

from __future__ import annotations

import functools
import os
import types

import numpy as np
import torch

from pushstep.optim.cpu import dense as cpu
from pushstep.optim.cuda import kernels as cuda_kernels
from pushstep.optim.cuda import launch as cuda_launch
from pushstep.optim.kernels import intrinsics

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda:0")
REFERENCE = cpu
BLOCK = cuda_kernels.BLOCK


def _round_as_instructions_do():
    """Have the interpreter's fma and its way to bfloat16 round once, to nearest even."""
    import numba
    from triton.runtime import interpreter

    fused = intrinsics.fma

    @numba.vectorize(["float32(float32, float32, float32)", "float64(float64, float64, float64)"])
    def fma(a, b, c):
        return fused(a, b, c)

    convert = interpreter._convert_float

    def converted(source, from_dtype, to_dtype, rounding):
        if (from_dtype, to_dtype) != (interpreter.tl.float32, interpreter.tl.bfloat16):
            return convert(source, from_dtype, to_dtype, rounding)
        floats = torch.from_numpy(np.ascontiguousarray(source, np.float32))
        return floats.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    def create_fma(_, x, y, z):
        return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma
    interpreter._convert_float = converted


def _patch_once():
    """Have the interpreter's operations stay in `triton.language`.

    Each launch, and each call of another function within it, looks through the whole language to put them there: that is
    most of what a launch takes.
    """
    from triton.runtime import interpreter

    patch_lang = interpreter._patch_lang

    @functools.cache
    def patched(fn):
        patch_lang(fn)
        return types.SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patched


if INTERPRETED:
    _round_as_instructions_do()
    _patch_once()


def ordered(tensor):
    """Floating point numbers as integers in the same order, so that a difference counts ulps."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().resolve_neg().view(integer).to(torch.int64)
    return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)


def assert_same(got, want, ulps=0):
    """The same bits, or `ulps` apart."""
    for a, b in zip(got.written(), want.written(), strict=True):
        assert a.dtype == b.dtype
        if a.dtype.is_floating_point:
            apart = (ordered(a.cpu()) - ordered(b.cpu())).abs()
            assert apart.numel() == 0 or int(apart.max()) <= ulps, (a.dtype, int(apart.max()))
        else:
            assert torch.equal(a.cpu(), b.cpu())


def count_launches(monkeypatch):
    """A list that gets the name of every kernel as it is launched."""
    names = []
    launch = cuda_launch.launch

    def counted(kernel, *args, **constants):
        names.append(kernel.__name__)
        launch(kernel, *args, **constants)

    monkeypatch.setattr(cuda_launch, "launch", counted)
    return names
