"""Compiles the CUDA kernels ahead for sm_80 and sm_90, as a step would on such a device, and reads the PTX.

No device is needed: triton is told what it would find, and a launch ends when the machine code is there. What no
test here can see is a kernel's results on hardware; the `cuda_*_cases` compare those where there is some.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from pushstep.optim.cuda import (
    arithmetic as cuda_arithmetic,
)
from pushstep.optim.cuda import (
    kernels as cuda_kernels,
)
from pushstep.optim.cuda import (
    row_kernels as cuda_row_kernels,
)
from pushstep.optim.cuda import (
    steps as cuda,
)
from pushstep.optim.kernels import dense as kernels
from pushstep.optim.kernels import norms as norm_kernels
from tests.support.cuda.steps import BF16, DTYPES, DUPLICATES, F16, F32, F64, OPTIONS, make_rows, make_step

APPROXIMATE = re.compile(r"\b(?:div\.full|\w+\.approx|\S+\.ftz)\S*")
FLOATING = re.compile(r"^\s+(?:@!?%p\d+ )?((?:fma|mul|add|sub|div|sqrt)\.\S*f(?:32|64))", re.MULTILINE)
# The elements that one thread steps with masks and without.
PER_THREAD = 2 * cuda_kernels.BLOCK // (32 * cuda_kernels.WARPS)


class Target:
    """What triton asks a driver for before it compiles."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # so that the two targets' kernels are kept apart

    def get_current_stream(self, device):
        return 0


class Built(list):
    """(name, PTX) of every kernel that was launched."""

    def add(self, kernel):
        assert kernel.asm["cubin"]
        self.append((kernel.metadata.name, kernel.asm["ptx"]))


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def built(request, monkeypatch):
    found = Built()
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **constants):
        found.add(run(self, *args, grid=grid, warmup=True, **constants))

    monkeypatch.setattr(triton.runtime.driver, "_active", Target(request.param))
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    return found


def check(built, real="f32"):
    """Correctly rounded roots and quotients everywhere, nothing approximate, nothing flushed to zero."""
    assert built
    for name, ptx in built:
        assert not APPROXIMATE.findall(ptx), name
        if name in ("step_list", "step_flat", "step_rows"):
            assert f"sqrt.rn.{real}" in ptx, name
            assert f"div.rn.{real}" in ptx, name


def arithmetic(ptx):
    return Counter(FLOATING.findall(ptx))


@pytest.mark.parametrize("sizes", [(7, 5000), (5000,)], ids=["list", "flat"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("rule", ["adadelta", "adagrad"])
def test_options(built, rule, option, sizes):
    options = dict(OPTIONS[option])
    if isinstance(options.get("factor"), list):
        options["factor"] = options["factor"][: len(sizes)]
    step = make_step(rule, sizes, options=options, steps=[torch.zeros(()) for _ in sizes])
    kernel = f"step_{'list' if len(sizes) > 1 else 'flat'}"
    cuda.step(step)
    assert [name for name, _ in built] == [kernel]
    if option == "all":
        numbers = {"lr": torch.tensor(0.1), "found_inf": torch.tensor(0.0), "grad_scale": torch.tensor(8.0)}
        cuda.step(dataclasses.replace(step, **numbers, lr_decay=0.1))
        assert [name for name, _ in built] == [kernel, "advance", kernel]
    check(built)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["adadelta", "adagrad"])
def test_dtypes(built, rule, dtypes):
    for sizes in ((7, 5000), (5000,)):
        cuda.step(make_step(rule, sizes, dtypes, OPTIONS["all"]))
        cuda.step(make_step(rule, sizes, dtypes))
    check(built, "f64" if F64 in (dtypes[0], dtypes[2]) else "f32")


@pytest.mark.parametrize("ids", [[3, 5], DUPLICATES], ids=["unique", "duplicates"])
@pytest.mark.parametrize("row_wise", [False, True], ids=["elements", "row-wise"])
@pytest.mark.parametrize("dtypes", [DTYPES[k] for k in (0, 1, 2)], ids=str)
@pytest.mark.parametrize("rule", ["adadelta", "adagrad"])
def test_rows(built, rule, dtypes, row_wise, ids):
    for width in (3, 1500):
        cuda.step_rows(
            make_rows(
                rule, ids, width, row_wise=row_wise, dtypes=dtypes, maximize=True, weight_decay=0.1, factor=0.5,
                grad_scale=torch.tensor(8.0), found_inf=torch.tensor(0.0), steps=torch.tensor(0.0),
            )
        )  # fmt: skip
    check(built, "f64" if F64 in (dtypes[0], dtypes[2]) else "f32")


def test_every_row(built):
    for option in ({"grad_scale": 8.0}, {"zero_grad": True}):
        step = make_step("adadelta", (6,), options=option)
        step = dataclasses.replace(
            step, params=[step.params[0].view(2, 3)], grads=[step.grads[0].view(2, 3)],
            states=[[torch.zeros(2, 1)], [torch.zeros(2, 1)]],
        )  # fmt: skip
        cuda.step(step)
    check(built)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_norms(built, dtype):
    cuda.square_sums([torch.ones(5000, dtype=dtype), torch.ones(8191, dtype=dtype)[1:]])
    [(name, ptx)] = built
    assert name == "square_blocks"
    assert not any(op.startswith("fma") for op in arithmetic(ptx)), "a product and a sum are two roundings"


@pytest.mark.parametrize(
    "rule, option, wanted",
    [
        ("adadelta", "plain", {"fma": 3, "div": 1, "sqrt": 1}),
        ("adadelta", "coupled", {"fma": 4, "div": 1, "sqrt": 1}),
        ("adadelta", "first", {"fma": 3, "div": 1, "sqrt": 2}),
        ("adagrad", "plain", {"fma": 1, "div": 1, "sqrt": 1}),
        ("adagrad", "decoupled", {"fma": 1, "div": 1, "sqrt": 1}),  # p*keep + quotient must not become one
        ("adagrad", "unscale", {"fma": 1, "div": 2, "sqrt": 1}),
        ("adagrad", "ema", {"fma": 2, "div": 1, "sqrt": 1}),
    ],
)
def test_fma_where_it_is_meant_and_nowhere_else(built, rule, option, wanted):
    cuda.step(make_step(rule, (5000,), options=OPTIONS[option]))
    found = Counter()
    for operation, times in arithmetic(built[0][1]).items():
        found[operation.split(".")[0]] += times
    assert {name: found[name] / PER_THREAD for name in wanted} == wanted


@pytest.mark.parametrize("dtypes", DTYPES[:5], ids=str)
@pytest.mark.parametrize("sizes", [(1 << 14, 5000), (5000,)], ids=["list", "flat"])
def test_full_blocks_move_whole_vectors(built, sizes, dtypes):
    step = make_step("adadelta", sizes, dtypes)
    cuda.step(step)
    [(_, ptx)] = built
    # Four elements per thread and operand, in 16 bytes each for float32; nothing takes a detour.
    wide = {2: "v2.b32", 4: "v4.b32", 8: "v2.b64"}
    for dtype in dtypes:
        assert f"ld.global.{wide[dtype.itemsize]}" in ptx
    assert "ld.shared" not in ptx


def test_unaligned_tensors_get_narrow_accesses(built):
    step = make_step("adagrad", (4096, 4096))
    step.params[0] = torch.randn(4097)[1:]
    cuda.step(step)
    assert "ld.global.v4" not in built[0][1]


def test_the_constants_are_the_cpu_kernels():
    assert cuda_arithmetic.QUOTIENT_SCALE.value == kernels.QUOTIENT_SCALE
    assert cuda_arithmetic.QUOTIENT_UNSCALE.value == kernels.QUOTIENT_SCALE**-0.5
    assert cuda_row_kernels.NORM_BLOCK.value == norm_kernels.BLOCK_ELEMENTS
    assert cuda_row_kernels.LANES.value == norm_kernels.LANES


class Watch(TorchDispatchMode):
    """Fails at whatever would make the host wait for the device: reading a number, copying to the host."""

    WAITS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name() not in self.WAITS, func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sizes", [(7, 5000), (5000,)], ids=["list", "flat"])
@pytest.mark.parametrize("lr_decay", [0.0, 0.5])
@pytest.mark.parametrize("counter", [F32, torch.int64], ids=str)
def test_the_host_never_waits(built, sizes, lr_decay, counter):
    # Tensors beside the parameters count as on the device, wherever that is.
    step = make_step(
        "adagrad", sizes, options=OPTIONS["all"], lr_decay=lr_decay,
        steps=[torch.zeros((), dtype=counter) for _ in sizes],
    )  # fmt: skip
    step = dataclasses.replace(
        step, lr=torch.tensor(0.1), grad_scale=torch.tensor(8.0), found_inf=torch.tensor(0.0)
    )
    with Watch():
        cuda.step(step)
    assert built
