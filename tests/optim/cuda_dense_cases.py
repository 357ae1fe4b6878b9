"""Dense steps on CUDA: parity, lists and arenas, numbers on the device. In the interpreter or on a device: `test_cuda` runs this file."""

from __future__ import annotations

import dataclasses
import itertools
import mmap

import numpy as np
import pytest
import torch

from pushstep.optim.cpu import dense as cpu
from pushstep.optim.cuda import (
    arithmetic as cuda_arithmetic,
)
from pushstep.optim.cuda import (
    kernels as cuda_kernels,
)
from pushstep.optim.cuda import (
    launch as cuda_launch,
)
from pushstep.optim.cuda import (
    steps as cuda,
)
from pushstep.optim.cuda import (
    tables as cuda_tables,
)
from tests.support.cuda.comparison import BLOCK, DEVICE, INTERPRETED, REFERENCE, assert_same, count_launches
from tests.support.cuda.reference import assert_step
from tests.support.cuda.steps import BF16, DTYPES, F32, F64, OPTIONS, SIZES, make_step, moved

NORESERVE = 0x4000  # MAP_NORESERVE of Linux; mmap names it from Python 3.13 on


@pytest.fixture
def launches(monkeypatch):
    return count_launches(monkeypatch)


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
            before = moved(want, "cpu")
            REFERENCE.step(want)
            cuda.step(got)
            assert_same(got, want)
            for a, b in zip(got.grads, want.grads, strict=True):
                assert torch.equal(a.cpu(), b)
            assert_step(before, got)

    @pytest.mark.parametrize("option", ["plain", "all"])
    @pytest.mark.parametrize("dtypes", DTYPES, ids=str)
    @pytest.mark.parametrize("rule", ["adadelta", "adagrad"])
    def test_dtypes(self, rule, dtypes, option):
        want = make_step(rule, (7, BLOCK + 1), dtypes, OPTIONS[option])
        got, before = moved(want, DEVICE), moved(want, "cpu")
        REFERENCE.step(want)
        cuda.step(got)
        assert_same(got, want)
        assert_step(before, got)

    @pytest.mark.parametrize(
        "other",
        [{"rho": 0.90001}, {"eps": 1e-4}, {"eps_inside_root": True}, {"decoupled": True}, {"maximize": True},
         {"factor": 0.999999}, {"lr_decay": 1e-5}, {"lr": 0.100001}, {"clip_value": 2.0}, {"weight_decay": 0.100001},
         {"ema_momentum": 0.990001}, {"zero_grad": True}],
        ids=str,
    )  # fmt: skip
    def test_the_equations_tell_steps_apart(self, other):
        # of the rule that the option makes a difference to
        rule = "adagrad" if "eps_inside_root" in other else "adadelta"
        before = make_step(rule, (5000,), options={"weight_decay": 0.1, "ema": True}, step=3, eps=1e-5)
        after = moved(before, "cpu")
        cpu.step(after)
        assert_step(before, after)
        with pytest.raises(AssertionError):
            assert_step(dataclasses.replace(before, **other), after)

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
            torch, "empty", lambda n, dtype, device, pin_memory: torch.zeros(n, dtype=dtype)
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
        numbers = (0.5, 1.0, 1.0, 0.0, 1.0, 1e-10, 0.0, 0.0, 0.0)
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
        assert bool(flags & cuda_arithmetic.LR_EACH.value) == (len(rates) == 3)

    def test_step_number_without_counters(self):
        for lr in (0.1, torch.tensor(0.1, dtype=F64)):
            want = make_step("adagrad", (5, 70), lr=lr, lr_decay=0.5, step=4)
            got = moved(want, DEVICE)
            REFERENCE.step(want)
            cuda.step(got)
            assert_same(got, want)
