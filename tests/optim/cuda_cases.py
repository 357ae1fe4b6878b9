"""The CUDA backend against references, in Triton's interpreter or on a device; `test_cuda` runs this file in both.

In the interpreter (TRITON_INTERPRET=1 before triton is imported) tensors lie on the CPU. It has its limits: fma is
a product and a sum, so the reference is `cuda_reference`; stores to bfloat16 truncate, so they may be 1 ulp off.
On a device nothing is allowed for: the bits must be those of the CPU kernels.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import mmap
import os

import cuda_reference
import numpy as np
import pytest
import torch
from cuda_steps import BF16, DTYPES, DUPLICATES, F16, F32, F64, OPTIONS, SIZES, make_rows, make_step, moved

from pushstep.optim import (
    Adadelta,
    Adagrad,
    cpu,
    cuda,
    cuda_kernels,
    cuda_launch,
    cuda_tables,
    dispatch,
    norms,
)
from pushstep.optim.dispatch import Step

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda:0")
REFERENCE = cuda_reference if INTERPRETED else cpu
BLOCK = cuda_kernels.BLOCK
NORESERVE = 0x4000  # MAP_NORESERVE of Linux; mmap names it from Python 3.13 on


def ordered(tensor):
    """Floating point numbers as integers in the same order, so that a difference counts ulps."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().resolve_neg().view(integer).to(torch.int64)
    return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)


def assert_same(got, want, ulps=0):
    """The same bits, or `ulps` apart; where the interpreter stores bfloat16, one."""
    for a, b in zip(got.written(), want.written(), strict=True):
        assert a.dtype == b.dtype
        if a.dtype.is_floating_point:
            allowed = max(ulps, 1 if INTERPRETED and a.dtype == BF16 else 0)
            apart = (ordered(a.cpu()) - ordered(b.cpu())).abs()
            assert apart.numel() == 0 or int(apart.max()) <= allowed, (a.dtype, int(apart.max()))
        else:
            assert torch.equal(a.cpu(), b.cpu())


@pytest.fixture
def launches(monkeypatch):
    names = []
    launch = cuda_launch.launch

    def counted(kernel, *args, **constants):
        names.append(kernel.__name__)
        launch(kernel, *args, **constants)

    monkeypatch.setattr(cuda_launch, "launch", counted)
    return names


class TestParity:
    @pytest.mark.parametrize("sizes", [SIZES, (BLOCK + 1,)], ids=["list", "flat"])
    @pytest.mark.parametrize("option", OPTIONS)
    @pytest.mark.parametrize("rule", ["adadelta", "adagrad"])
    def test_options(self, rule, option, sizes):
        options = dict(OPTIONS[option])
        if isinstance(options.get("factor"), list):
            options["factor"] = options["factor"][: len(sizes)]
        want = make_step(rule, sizes, options=options)
        got = moved(want, DEVICE)
        for _ in range(2):
            REFERENCE.step(want)
            cuda.step(got)
            assert_same(got, want)
            for a, b in zip(got.grads, want.grads, strict=True):
                assert torch.equal(a.cpu(), b)

    @pytest.mark.parametrize("option", ["plain", "all"])
    @pytest.mark.parametrize("dtypes", DTYPES, ids=str)
    @pytest.mark.parametrize("rule", ["adadelta", "adagrad"])
    def test_dtypes(self, rule, dtypes, option):
        want = make_step(rule, (7, BLOCK + 1), dtypes, OPTIONS[option])
        got = moved(want, DEVICE)
        REFERENCE.step(want)
        cuda.step(got)
        # A double's own arithmetic is the interpreter's too, but not the way a double becomes a half.
        assert_same(got, want)

    @pytest.mark.parametrize("rule", ["adadelta", "adagrad"])
    def test_close_to_the_cpu_kernels(self, rule):
        want = make_step(rule, options=OPTIONS["coupled"])
        got = moved(want, DEVICE)
        for _ in range(10):
            cpu.step(want)
            cuda.step(got)
        for a, b in zip(got.written(), want.written(), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=2e-6, atol=1e-6)

    def test_not_a_number_passes_the_clip(self):
        want = make_step("adagrad", (5,), options={"clip_value": 0.5})
        want.grads[0][2] = torch.nan
        got = moved(want, DEVICE)
        cuda.step(got)
        assert got.params[0].isnan().tolist() == [False, False, True, False, False]

    def test_wide_scalars_are_not_rounded_to_float32(self):
        want = make_step("adagrad", (9,), (F64, F64, F64), lr=0.1, lr_decay=0.3, steps=[torch.tensor(4.0)])
        got = moved(want, DEVICE)
        REFERENCE.step(want)
        cuda.step(got)
        assert_same(got, want)


class TestLists:
    @pytest.mark.parametrize("rule", ["adadelta", "adagrad"])
    def test_one_launch_for_all_sizes(self, rule, launches):
        step = moved(
            make_step(rule, (*range(0, 90, 3), 3 * BLOCK), steps=[torch.zeros(()) for _ in range(31)]), DEVICE
        )
        cuda.step(step)
        assert launches == ["step_list"]
        assert [t.item() for t in step.steps] == [1.0] * 31

    def test_decaying_rates_take_a_second_one(self, launches):
        counters = [torch.tensor(float(k)) for k in range(len(SIZES))]
        want = make_step("adagrad", lr_decay=0.5, steps=counters)
        got = moved(want, DEVICE)
        REFERENCE.step(want)
        cuda.step(got)
        assert launches == ["advance", "step_list"]
        assert_same(got, want)

    def test_arena_has_the_bits_of_the_list(self, launches):
        # Block borders fall elsewhere in the two, and nothing may depend on them.
        many = moved(
            make_step("adadelta", (5, BLOCK - 3, 0, 700, 2 * BLOCK + 1), options=OPTIONS["coupled"]), DEVICE
        )
        one = dataclasses.replace(
            many,
            params=[torch.cat(list(many.params))],
            grads=[torch.cat(list(many.grads))],
            states=[[torch.cat(list(state))] for state in many.states],
        )
        for step in (many, one):
            cuda.step(step)
        assert launches == ["step_list", "step_flat"]
        assert torch.equal(torch.cat(list(many.params)), one.params[0])
        for a, b in zip(many.states, one.states, strict=True):
            assert torch.equal(torch.cat(list(a)), b[0])

    def test_any_split_has_the_same_bits(self):
        whole = moved(make_step("adagrad", (4 * BLOCK + 9,)), DEVICE)
        parts = moved(whole, DEVICE)
        cuts = [0, 1, 77, BLOCK, 3 * BLOCK + 5, 4 * BLOCK + 9]
        pieces = list(itertools.pairwise(cuts))

        def cut(tensors):
            return [tensors[0][a:b] for a, b in pieces]

        cuda.step(whole)
        cuda.step(
            dataclasses.replace(
                parts, params=cut(parts.params), grads=cut(parts.grads), states=[cut(s) for s in parts.states]
            )
        )
        assert_same(parts, whole)

    def test_dtypes_are_launched_apart(self, launches):
        one, two = make_step("adagrad", (9, 10)), make_step("adagrad", (11, 12), (BF16, BF16, F32), seed=1)
        want = dataclasses.replace(
            one,
            params=[*one.params, *two.params],
            grads=[*one.grads, *two.grads],
            states=[[*one.states[0], *two.states[0]]],
        )
        got = moved(want, DEVICE)
        REFERENCE.step(want)
        cuda.step(got)
        assert launches == ["step_list", "step_list"]
        assert_same(got, want)

    def test_nothing_to_step(self, launches):
        cuda.step(make_step("adagrad", ()))
        empty = moved(make_step("adagrad", (0,), steps=[torch.zeros(())]), DEVICE)
        cuda.step(empty)
        assert launches == ["step_flat"]
        assert empty.steps[0].item() == 1

    def test_tables_are_kept(self, monkeypatch):
        step = moved(make_step("adadelta", (3, 4, 5)), DEVICE)
        cuda.step(step)
        monkeypatch.setattr(cuda_tables, "upload", None)  # a second upload would fail
        cuda.step(step)

    def test_few_tables_are_kept(self):
        device = torch.device("cpu")
        for k in range(3 * cuda_tables.KEPT_TABLES):
            cuda_tables.pointers(np.array([16 * k + 1]), device)
        assert len(cuda_tables._kept) <= cuda_tables.KEPT_TABLES

    def test_under_capture_tables_are_not_kept_but_those_in_use_are(self, monkeypatch):
        before, kept = np.array([16, 32]), []
        table = cuda_tables.pointers(before, torch.device("cpu"))
        monkeypatch.setattr(cuda_tables, "capturing", lambda device: True)
        monkeypatch.setattr(cuda_tables, "_used_by_graphs", kept)
        assert cuda_tables.pointers(before, torch.device("cpu")) is table
        assert cuda_tables.pointers(before, torch.device("cpu")) is table
        assert len(kept) == 1
        assert kept[0] is table
        new = np.array([48, 64])
        assert cuda_tables.pointers(new, torch.device("cpu")) is not cuda_tables.pointers(
            new, torch.device("cpu")
        )

    def test_staging_is_never_given_out_twice(self, monkeypatch):
        monkeypatch.setattr(cuda_tables, "_staging", [torch.zeros(64, dtype=torch.uint8)])
        monkeypatch.setattr(cuda_tables, "STAGING_BYTES", 48)
        monkeypatch.setattr(
            torch, "empty", lambda n, dtype, pin_memory: torch.zeros(n, dtype=dtype)
        )  # pinning needs a driver
        taken = [cuda_tables._set_aside(size) for size in (5, 16, 33, 8, 100)]
        assert [t.numel() for t in taken] == [5, 16, 33, 8, 100]
        ranges = sorted((t.data_ptr(), t.data_ptr() + t.numel()) for t in taken)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
        assert all((t.data_ptr() - t.untyped_storage().data_ptr()) % 16 == 0 for t in taken)

    def test_beyond_two_to_the_31(self):
        # One program is told that it is block 2^21 + 1: elements from 2^31 + 1024 on. The pages before are never touched.
        block, size = (1 << 21) + 1, (1 << 31) + 2 * BLOCK
        runs = []
        for dtype in (torch.float16, torch.float16, torch.float32):
            if INTERPRETED:
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
                runs.append(torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize, flags=flags), dtype=dtype))
            else:
                runs.append(torch.zeros(size, dtype=dtype, device=DEVICE))
        param, grad, state = runs
        grad[-BLOCK:] = 1.0
        grad[-BLOCK - 1] = 1.0
        table = torch.tensor(
            [[param.data_ptr(), grad.data_ptr(), state.data_ptr(), 0, 0, 0, 0]], device=DEVICE
        )
        extents, blocks = (
            torch.tensor([[size, -block]], device=DEVICE),
            torch.zeros(1, dtype=torch.int32, device=DEVICE),
        )
        numbers = (0.5, 1.0, 1.0, 0.0, 1.0, 1e-10, 0.0, 0.0, 0.0, 0.0)
        types = dict(zip("PGSUECT", [cuda.DTYPE[t.dtype] for t in (*runs, *[state] * 4)], strict=True))
        cuda_launch.launch(
            cuda_kernels.step_list, (1,), DEVICE, table, extents, blocks, None, None, None, None, *numbers, **types,
            REAL=cuda.DTYPE[F32], FLAGS=0, BLOCK=BLOCK,
        )  # fmt: skip
        assert param[-BLOCK:].unique().tolist() == [-0.5]
        assert param[-BLOCK - 1] == 0
        assert param[:BLOCK].abs().max() == 0


class TestNumbers:
    """Numbers that are tensors, counters, and what found_inf skips."""

    @pytest.mark.parametrize("sizes", [(5, 70), (70,)], ids=["list", "flat"])
    def test_on_the_device_or_not_is_the_same(self, sizes):
        given = {"lr": 0.1, "grad_scale": 8.0, "found_inf": 0.0}
        plain = moved(make_step("adadelta", sizes, options={"weight_decay": 0.1}, **given), DEVICE)
        tensors = {name: torch.tensor(value, dtype=F64, device=DEVICE) for name, value in given.items()}
        pointers = dataclasses.replace(moved(plain, DEVICE), **tensors)
        cuda.step(plain)
        cuda.step(pointers)
        assert_same(pointers, plain)

    @pytest.mark.parametrize("found", [1.0, torch.tensor(1.0)], ids=["number", "tensor"])
    @pytest.mark.parametrize("sizes", [(5, 70), (70,)], ids=["list", "flat"])
    @pytest.mark.parametrize("rule", ["adadelta", "adagrad"])
    def test_found_inf_skips_everything(self, rule, sizes, found):
        for lr_decay in (0.0, 0.5):
            step = make_step(
                rule, sizes, options=OPTIONS["all"], lr_decay=lr_decay, steps=[torch.zeros(()) for _ in sizes],
                found_inf=found,
            )  # fmt: skip
            got = moved(step, DEVICE)
            cuda.step(got)
            assert_same(got, step)

    @pytest.mark.parametrize("dtype", [F32, F64, torch.int64, BF16])
    @pytest.mark.parametrize("lr_decay", [0.0, 0.5])
    @pytest.mark.parametrize("found", [None, 0.0, 1.0])
    def test_counters(self, dtype, lr_decay, found):
        counters = [torch.tensor(k, dtype=dtype) for k in (0, 3, 7)]
        want = make_step("adagrad", (5, 0, 6), lr_decay=lr_decay, steps=counters)
        want = dataclasses.replace(want, found_inf=None if found is None else torch.tensor(found))
        got = moved(want, DEVICE)
        REFERENCE.step(want)
        cuda.step(got)
        assert_same(got, want, ulps=1 if dtype == BF16 else 0)

    def test_counters_of_several_kinds(self):
        counters = [torch.tensor(1.0), torch.tensor(2, dtype=torch.int64), torch.tensor(3.0, dtype=F64)]
        want = make_step("adagrad", (5, 6, 7), lr_decay=0.5, steps=counters)
        got = moved(want, DEVICE)
        REFERENCE.step(want)
        cuda.step(got)
        assert_same(got, want)

    @pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=F64)], ids=["number", "tensor"])
    @pytest.mark.parametrize("start", [(4, 4, 4), (1, 2, 3)], ids=["equal", "different"])
    def test_counters_on_the_host(self, lr, start):
        counters = [torch.tensor(float(k)) for k in start]
        lr = lr.to(DEVICE) if isinstance(lr, torch.Tensor) else lr
        lr_pointer = lr if isinstance(lr, torch.Tensor) else None
        divisors = cuda_launch._advance_on_host(counters, DEVICE, 0.5)
        assert [c.item() for c in counters] == [k + 1 for k in start]
        assert divisors.tolist() == [1 + k * 0.5 for k in start]
        flags, rate, pointer = cuda_launch._rates_of(divisors, 0.1, lr_pointer, DEVICE)
        rates = [rate] if pointer is None else pointer.cpu().reshape(-1).tolist()
        assert rates == [0.1 / (1 + k * 0.5) for k in start][: len(rates)]
        assert len(rates) == (1 if len(set(start)) == 1 else 3)
        assert bool(flags & cuda_kernels.LR_EACH.value) == (len(rates) == 3)

    def test_step_number_without_counters(self):
        for lr in (0.1, torch.tensor(0.1, dtype=F64)):
            want = make_step("adagrad", (5, 70), lr=lr, lr_decay=0.5, step=4)
            got = moved(want, DEVICE)
            REFERENCE.step(want)
            cuda.step(got)
            assert_same(got, want)


def channels_last(shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


LAYOUTS = {
    "transposed both": lambda: (torch.randn(31, 57).t(), torch.randn(31, 57).t()),
    "transposed grad": lambda: (torch.randn(57, 31), torch.randn(31, 57).t()),
    "transposed param": lambda: (torch.randn(31, 57).t(), torch.randn(57, 31)),
    "channels last": lambda: (channels_last((4, 8, 5, 3)), channels_last((4, 8, 5, 3))),
    "channels last param": lambda: (channels_last((4, 8, 5, 3)), torch.randn(4, 8, 5, 3)),
    "expanded grad": lambda: (torch.randn(64, 33), torch.randn(33).expand(64, 33)),
    "gaps": lambda: (torch.randn(64, 33, 2)[..., 0], torch.randn(64, 33)),
    "offset": lambda: (torch.randn(1025)[1:], torch.randn(1027)[3:]),
    "strided grad": lambda: (torch.randn(1000), torch.randn(3000)[::3]),
    "negated grad": lambda: (torch.randn(100), torch._neg_view(torch.randn(100))),
    "scalar": lambda: (torch.randn(()), torch.randn(())),
    "lazy zeros": lambda: (torch.randn(9), torch._efficientzerotensor(9)),
}


class TestLayouts:
    @pytest.mark.parametrize("option", ["plain", "all"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_like_contiguous(self, layout, option, launches):
        torch.manual_seed(0)
        param, grad = LAYOUTS[layout]()
        for rule in ("adadelta", "adagrad"):
            launches.clear()
            shapes = make_step(rule, (param.numel(), 5), options=OPTIONS[option])
            states = [[torch.empty_like(param).copy_(s[0].view(param.shape)), s[1]] for s in shapes.states]
            extra = {
                name: [torch.empty_like(param, dtype=t[0].dtype).copy_(t[0].view(param.shape)), t[1]]
                for name in ("ema", "copy_out")
                if (t := getattr(shapes, name))
            }
            odd = dataclasses.replace(
                shapes,
                params=[param, shapes.params[1]],
                grads=[grad, shapes.grads[1]],
                states=states,
                **extra,
            )

            def place(tensor):
                if tensor._is_zerotensor():
                    return torch._efficientzerotensor(tensor.shape, device=DEVICE)
                # .to and .clone keep neither gaps nor expansions: move the storage under the same view.
                if tensor.is_neg():
                    return torch._neg_view(place(torch._neg_view(tensor)))
                storage = (
                    torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(DEVICE, copy=True)
                )
                return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

            def each(values, function):
                return [each(v, function) if isinstance(v, list) else function(v) for v in values]

            def rebuilt(function, odd=odd):
                lists = ("params", "grads", "states", "ema", "copy_out")
                fields = {
                    name: each(list(v), function) for name in lists if (v := getattr(odd, name)) is not None
                }
                return dataclasses.replace(odd, **fields)

            got, want = (
                rebuilt(place),
                rebuilt(lambda t: t.clone(memory_format=torch.contiguous_format).resolve_neg()),
            )
            assert got.grads[0].stride() == grad.stride()
            REFERENCE.step(want)
            cuda.step(got)
            assert launches == ["step_list"]  # copies or not, there is one launch
            assert_same(got, want)
            for a, b in zip(got.grads, want.grads, strict=True):
                assert torch.equal(a.cpu(), b)

    def test_shapes_must_agree(self):
        step = moved(make_step("adagrad", (6, 8)), DEVICE)
        step.grads[1] = step.grads[1][:4].view(2, 2)
        with pytest.raises(RuntimeError, match=r"the gradient has shape \(2, 2\), its parameter \(8,\)"):
            cuda.step(step)

    def test_refuses(self):
        assert cuda.refuses(torch.zeros(3, device=DEVICE)) is None
        assert "complex64" in (cuda.refuses(torch.zeros(3, dtype=torch.complex64, device=DEVICE)) or "")
        assert "share" in (cuda.refuses(torch.zeros(1, device=DEVICE).expand(3)) or "")


class TestRows:
    @pytest.mark.parametrize("row_wise", [False, True], ids=["elements", "row-wise"])
    @pytest.mark.parametrize("ids", [[5, 0, 39], DUPLICATES, list(range(40)), [], [2] * 50], ids=str)
    @pytest.mark.parametrize("rule", ["adadelta", "adagrad"])
    def test_ids(self, rule, ids, row_wise):
        want = make_rows(rule, ids, row_wise=row_wise, steps=torch.tensor(2.0), lr_decay=0.5)
        got = moved(want, DEVICE)
        REFERENCE.step_rows(want)
        cuda.step_rows(got)
        # The mean over a row is added up in another order than numpy's, in double, and then rounded.
        assert_same(got, want, ulps=2 if row_wise else 0)

    @pytest.mark.parametrize("width", [1, 3, 33, 1500, (2, 3)], ids=str)
    @pytest.mark.parametrize("row_wise", [False, True], ids=["elements", "row-wise"])
    def test_widths(self, width, row_wise):
        want = make_rows("adadelta", DUPLICATES, width, row_wise=row_wise)
        got = moved(want, DEVICE)
        REFERENCE.step_rows(want)
        cuda.step_rows(got)
        assert_same(got, want, ulps=2 if row_wise else 0)

    @pytest.mark.parametrize("dtypes", DTYPES, ids=str)
    @pytest.mark.parametrize("rule", ["adadelta", "adagrad"])
    def test_dtypes(self, rule, dtypes):
        want = make_rows(rule, [5, 0, 39], dtypes=dtypes, maximize=True, factor=0.5, grad_scale=4.0)
        got = moved(want, DEVICE)
        REFERENCE.step_rows(want)
        cuda.step_rows(got)
        assert_same(got, want)

    def test_half_rows_are_summed_in_float32(self):
        want = make_rows("adagrad", DUPLICATES, dtypes=(F32, F16, F32))
        got = moved(want, DEVICE)
        REFERENCE.step_rows(want)
        cuda.step_rows(got)
        assert_same(got, want)

    def test_coupled_decay(self):
        want = make_rows("adadelta", DUPLICATES, weight_decay=0.1)
        got = moved(want, DEVICE)
        REFERENCE.step_rows(want)
        cuda.step_rows(got)
        assert_same(got, want)

    @pytest.mark.parametrize("bad", [-1, 40])
    def test_out_of_bounds_changes_nothing(self, bad):
        step = moved(make_rows("adagrad", [3, bad, 5], steps=torch.tensor(1.0)), DEVICE)
        before = moved(step, "cpu")
        with pytest.raises(IndexError, match=f"index {bad} is out of bounds for dimension 0 with size 40"):
            cuda.step_rows(step)
        assert_same(step, before)

    def test_where_nobody_can_look_a_bad_row_is_passed_over(self, monkeypatch):
        monkeypatch.setattr(cuda, "capturing", lambda device: True)
        for ids in ([3, 40, 5], [3, -1, 3, 40, 40]):
            good = [row for row in ids if 0 <= row < 40]
            step = make_rows("adagrad", ids)
            rows = step.rows[[k for k, row in enumerate(ids) if row in good]]
            want = dataclasses.replace(moved(step, "cpu"), ids=torch.tensor(good), rows=rows)
            got = moved(step, DEVICE)
            REFERENCE.step_rows(want)
            cuda.step_rows(got)
            assert_same(got, want)

    @pytest.mark.parametrize("found", [1.0, torch.tensor(1.0)], ids=["number", "tensor"])
    def test_found_inf(self, found):
        step = make_rows("adadelta", DUPLICATES, steps=torch.tensor(1.0), found_inf=found)
        got = moved(step, DEVICE)
        cuda.step_rows(got)
        assert_same(got, step)

    def test_a_table_with_gaps(self):
        want = make_rows("adadelta", DUPLICATES)
        got = moved(want, DEVICE)
        got.param = torch.stack([got.param, got.param], dim=-1)[..., 0]
        got.states = [s.t().contiguous().t() for s in got.states]
        REFERENCE.step_rows(want)
        cuda.step_rows(got)
        assert_same(got, want)

    @pytest.mark.parametrize(
        "option", [{}, {"grad_scale": 8.0}, {"grad_scale": 8.0, "zero_grad": True}], ids=str
    )
    @pytest.mark.parametrize("rule", ["adadelta", "adagrad"])
    def test_every_row_of_a_dense_gradient(self, rule, option):
        shapes = [(40, 8), (7,), (3, 5, 2), ()]
        torch.manual_seed(0)
        step = Step(
            rule=rule, params=[torch.randn(s) for s in shapes], grads=[torch.randn(s) for s in shapes], lr=0.1, eps=1e-6,
            rho=0.9, weight_decay=0.1, factor=[1.0, 2.0, 3.0, 4.0], steps=[torch.zeros(()) for _ in shapes],
            states=[[torch.rand(s[0] if s else 1, 1) for s in shapes] for _ in range(2 if rule == "adadelta" else 1)],
            **option,
        )  # fmt: skip
        want, got = moved(step, "cpu"), moved(step, DEVICE)
        cpu.step(want)
        cuda.step(got)
        for a, b in zip([*got.written(), *got.grads], [*want.written(), *want.grads], strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-6)

    def test_row_wise_lacks(self):
        step = moved(make_step("adagrad", (6,)), DEVICE)
        wide = dataclasses.replace(
            step, params=[step.params[0].view(2, 3)], grads=[step.grads[0].view(2, 3)],
            states=[[torch.zeros(2, 1, device=DEVICE)]], clip_value=1.0,
        )  # fmt: skip
        with pytest.raises(NotImplementedError, match="clip_value"):
            cuda.step(wide)


class TestNorms:
    def test_fixed_order(self, monkeypatch):
        torch.manual_seed(0)
        tensors = [
            torch.randn(n).to(dtype)
            for n in (0, 1, 4095, 4096, 4097, 13000)
            for dtype in (F32, F64, BF16, F16)
        ]
        tensors.append(torch.randn(60, 70).t())
        got = cuda.square_sums([t.to(DEVICE) for t in tensors])
        assert got == [cuda_reference.square_sum(t) for t in tensors]
        assert got == cpu.square_sums(tensors)
        monkeypatch.setattr(norms, "path_of", lambda tensor, group: dispatch.Path("cuda", ""))
        monkeypatch.setattr(norms, "FUSED_DTYPES", ())
        assert norms.square_sums([t.to(DEVICE) for t in tensors]) == got

    @pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    def test_not_finite(self, bad):
        good, tensor = torch.full((5000,), 1e38), torch.zeros(5000)
        tensor[4321] = bad
        total = cuda.square_sums([good.to(DEVICE), tensor.to(DEVICE)])
        assert np.isfinite(total[0])
        assert not np.isfinite(total[1])


class TestOptimizers:
    """The classes over this backend, against torch."""

    @pytest.fixture(autouse=True)
    def through_cuda(self, monkeypatch):
        if INTERPRETED:
            monkeypatch.setitem(dispatch.BACKENDS, "cpu", ".cuda")
        dispatch.backend.cache_clear()
        yield
        dispatch.backend.cache_clear()

    @pytest.mark.parametrize(
        "ours, theirs, arguments",
        [
            (Adadelta, torch.optim.Adadelta, {}),
            (
                Adadelta,
                torch.optim.Adadelta,
                {"lr": torch.tensor(0.5), "weight_decay": 0.1, "maximize": True},
            ),
            (Adagrad, torch.optim.Adagrad, {}),
            (Adagrad, torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.1}),
        ],
    )
    def test_dense(self, ours, theirs, arguments, launches):
        torch.manual_seed(0)
        shapes = [(7, 5), (3,), (BLOCK + 1,)]
        mine = [torch.randn(s, device=DEVICE).requires_grad_() for s in shapes]
        yours = [p.detach().clone().requires_grad_() for p in mine]
        optimizers = ours(mine, **copy.deepcopy(arguments)), theirs(yours, **copy.deepcopy(arguments))
        for _ in range(5):
            for a, b in zip(mine, yours, strict=True):
                a.grad = torch.randn_like(a)
                b.grad = a.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        assert "step_list" in launches
        for a, b in zip(mine, yours, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
        for a, b in zip(optimizers[0].state.values(), optimizers[1].state.values(), strict=True):
            assert a["step"].item() == b["step"].item() == 5

    def test_sparse(self, launches):
        torch.manual_seed(0)
        mine = torch.randn(20, 4, device=DEVICE).requires_grad_()
        yours = mine.detach().clone().requires_grad_()
        optimizers = Adagrad([mine], lr=0.1), torch.optim.Adagrad([yours], lr=0.1)
        with torch.sparse.check_sparse_tensor_invariants():
            for _ in range(3):
                ids = torch.randint(20, (1, 9), device=DEVICE)
                for p in (mine, yours):
                    p.grad = torch.sparse_coo_tensor(ids, torch.ones(9, 4, device=DEVICE), (20, 4))
                for optimizer in optimizers:
                    optimizer.step()
        assert "step_rows" in launches
        torch.testing.assert_close(mine, yours)

    def test_scaled(self):
        param = torch.ones(9, device=DEVICE).requires_grad_()
        optimizer = Adagrad([param], lr=0.1, fused=True)
        assert optimizer._step_supports_amp_scaling
        for found in (1.0, 0.0):
            param.grad = torch.full_like(param, 8.0)
            optimizer.grad_scale = torch.tensor(4.0, device=DEVICE)
            optimizer.found_inf = torch.tensor(found, device=DEVICE)
            optimizer.step()
        assert optimizer.state[param]["step"].item() == 1
        assert param.grad.unique().tolist() == [2.0]
        torch.testing.assert_close(param.detach(), torch.full_like(param, 0.9).detach())


@pytest.mark.gpu
class TestGraphs:
    """What the interpreter has nothing of: streams, capture, waiting."""

    def test_replay(self):
        counters = [torch.zeros(()) for _ in SIZES]
        want = make_step("adagrad", lr_decay=0.5, steps=counters, lr=torch.tensor(0.1))
        got = moved(want, DEVICE)
        got.found_inf, got.grad_scale = torch.zeros((), device=DEVICE), torch.ones((), device=DEVICE)
        want.grad_scale = 1.0
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            cuda.step(got)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cuda.step(got)
        for _ in range(3):
            graph.replay()
        got.found_inf.fill_(1)
        graph.replay()
        for _ in range(4):
            cpu.step(want)
        assert_same(got, want)

    def test_new_tensors_under_capture(self):
        warm = moved(make_step("adadelta"), DEVICE)
        cuda.step(warm)
        fresh = moved(make_step("adadelta", seed=3), DEVICE)
        want = moved(fresh, "cpu")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cuda.step(fresh)
        for k in range(3 * cuda_tables.KEPT_TABLES):  # what the graph reads must outlive the cache
            cuda_tables.pointers(np.array([16 * k + 1]), DEVICE)
        graph.replay()
        cpu.step(want)
        assert_same(fresh, want)

    def test_counters_on_the_host_are_refused(self):
        step = moved(make_step("adagrad", (5,)), DEVICE)
        step.steps = [torch.zeros(())]
        cuda.step(step)
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="fused=True"), torch.cuda.graph(graph):
            cuda.step(step)

    def test_nothing_waits(self):
        counters = [torch.zeros((), device=DEVICE) for _ in SIZES]
        step = moved(make_step("adagrad", lr_decay=0.5), DEVICE)
        step.steps, step.lr = counters, torch.tensor(0.1, device=DEVICE)
        step.grad_scale, step.found_inf = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
        cuda.step(step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step.grads = [g.clone() for g in step.grads]  # new addresses, so a new table too
            cuda.step(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
