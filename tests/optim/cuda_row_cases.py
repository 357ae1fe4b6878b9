"""Steps over rows, and norms, on CUDA. In the interpreter or on a device: `test_cuda` runs this file."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pushstep.optim.backends import dispatch
from pushstep.optim.cpu import dense as cpu
from pushstep.optim.cuda import steps as cuda
from pushstep.optim.ops import norms
from pushstep.optim.step.step import Step
from tests.support.cuda.comparison import DEVICE, REFERENCE, assert_same
from tests.support.cuda.reference import assert_rows, square_sum
from tests.support.cuda.steps import BF16, DTYPES, DUPLICATES, F16, F32, F64, make_rows, make_step, moved


class TestRows:
    @pytest.mark.parametrize("row_wise", [False, True], ids=["elements", "row-wise"])
    @pytest.mark.parametrize("ids", [[5, 0, 39], DUPLICATES, list(range(40)), [], [2] * 50], ids=str)
    @pytest.mark.parametrize("rule", ["adadelta", "adagrad"])
    def test_ids(self, rule, ids, row_wise):
        want = make_rows(rule, ids, row_wise=row_wise, steps=torch.tensor(2.0), lr_decay=0.5)
        got, before = moved(want, DEVICE), moved(want, "cpu")
        REFERENCE.step_rows(want)
        cuda.step_rows(got)
        assert_rows(before, got)
        # The mean over a row is added up in another order than on the CPU, in double, and then rounded.
        assert_same(got, want, ulps=2 if row_wise else 0)

    @pytest.mark.parametrize("width", [1, 3, 33, 1500, (2, 3)], ids=str)
    @pytest.mark.parametrize("row_wise", [False, True], ids=["elements", "row-wise"])
    def test_widths(self, width, row_wise):
        want = make_rows("adadelta", DUPLICATES, width, row_wise=row_wise)
        got, before = moved(want, DEVICE), moved(want, "cpu")
        REFERENCE.step_rows(want)
        cuda.step_rows(got)
        assert_rows(before, got)
        assert_same(got, want, ulps=2 if row_wise else 0)

    @pytest.mark.parametrize("dtypes", DTYPES, ids=str)
    @pytest.mark.parametrize("rule", ["adadelta", "adagrad"])
    def test_dtypes(self, rule, dtypes):
        want = make_rows(rule, [5, 0, 39], dtypes=dtypes, maximize=True, factor=0.5, grad_scale=4.0)
        got, before = moved(want, DEVICE), moved(want, "cpu")
        REFERENCE.step_rows(want)
        cuda.step_rows(got)
        assert_rows(before, got)
        assert_same(got, want)

    def test_half_rows_are_summed_in_float32(self):
        want = make_rows("adagrad", DUPLICATES, dtypes=(F32, F16, F32))
        got, before = moved(want, DEVICE), moved(want, "cpu")
        REFERENCE.step_rows(want)
        cuda.step_rows(got)
        assert_rows(before, got)
        assert_same(got, want)

    def test_coupled_decay(self):
        want = make_rows("adadelta", DUPLICATES, weight_decay=0.1)
        got, before = moved(want, DEVICE), moved(want, "cpu")
        REFERENCE.step_rows(want)
        cuda.step_rows(got)
        assert_rows(before, got)
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
        assert got == [square_sum(t) for t in tensors]
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
